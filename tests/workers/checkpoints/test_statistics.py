"""Files of statistics: of two writers of one file the first wins."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from jobs.errors import ObjectExists
from workers.checkpoints.statistics import write_statistics
from workers.storage import open_store


def test_a_file_that_came_meanwhile_is_not_replaced(tmp_path: Path):
    store = open_store(tmp_path)

    def overtaken() -> Iterator[tuple[str, NDArray[np.float32]]]:
        yield "x", np.ones(3, np.float32)
        write_statistics(store, "f.safetensors", [("x", np.zeros(3, np.float32))], {})

    with pytest.raises(ObjectExists, match=r"f\.safetensors: there is such a file already; give another name"):
        write_statistics(store, "f.safetensors", overtaken(), {})
    assert not load_file(tmp_path / "f.safetensors")["x"].any()
    assert [file.name for file in tmp_path.iterdir()] == ["f.safetensors"]
