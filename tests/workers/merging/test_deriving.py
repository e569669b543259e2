"""Derived tensors, read as a whole and by parts."""

from __future__ import annotations

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from jobs.errors import CorruptData, ObjectChanged
from jobs.merge_tasks import Derived, LowRank, Parent, ParentFile, ParentTensor, Source
from workers.digests import digest_of
from workers.merging.deriving import Deriving
from workers.storage import open_store

ROWS, COLUMNS, RANK = 9, 11, 3


@pytest.mark.parametrize("digest", [False, True], ids=["plain", "with a digest"])
def test_parts_of_an_adapted_tensor_have_the_bytes_of_the_whole(tmp_path: Path, digest: bool) -> None:
    generator = np.random.default_rng(5)
    weight = generator.standard_normal(ROWS * COLUMNS).astype(ml_dtypes.bfloat16).tobytes()
    factors = generator.standard_normal(RANK * (ROWS + COLUMNS)).astype(np.float32).tobytes()
    (tmp_path / "model").write_bytes(weight + factors)
    store = open_store(str(tmp_path))
    parent = Parent(store.pinned_url, tuple(ParentFile(info.key, info.size, info.etag) for info in store.list()))
    middle, end = len(weight) + 4 * RANK * COLUMNS, len(weight) + len(factors)
    inputs: tuple[tuple[str, Source], ...] = (
        ("p", ParentTensor(0, "BF16", 0, len(weight), digest_of(weight) if digest else "")),
        ("p", ParentTensor(0, "F32", len(weight), middle)),
        ("p", ParentTensor(0, "F32", middle, end)),
    )
    derived = Derived("BF16", (ROWS, COLUMNS), LowRank(0.5, RANK), inputs)
    deriving = Deriving({"p": parent})
    whole = deriving.whole("p", derived, "w")
    assert whole.tobytes() != weight
    part = deriving.in_parts("p", derived, "w")
    for first in range(0, ROWS * COLUMNS, 7):
        for stop in (first + 1, first + 7, ROWS * COLUMNS):
            stop = min(stop, ROWS * COLUMNS)
            assert part(first, stop).tobytes() == whole[first:stop].tobytes()


def test_a_stored_tensor_comes_in_pieces_or_by_its_file_and_is_checked(tmp_path: Path) -> None:
    data = np.random.default_rng(6).standard_normal(50).astype(ml_dtypes.bfloat16)
    (tmp_path / "model").write_bytes(b"header" + data.tobytes())
    store = open_store(str(tmp_path))
    parent = Parent(store.pinned_url, tuple(ParentFile(info.key, info.size, info.etag) for info in store.list()))
    for digest in ("", digest_of(data.tobytes())):
        deriving, at = Deriving({"p": parent}), ParentTensor(0, "BF16", 6, 106, digest)
        assert [piece.tolist() for piece in deriving.pieces("p", at, "w", 20)] == [
            data[:20].tolist(), data[20:40].tolist(), data[40:].tolist()
        ]  # fmt: skip
        assert deriving.mapped("p", at, "w").tobytes() == data.tobytes()
    wrong = ParentTensor(0, "BF16", 6, 106, digest_of(b"others"))
    for read in (lambda: list(deriving.pieces("p", wrong, "w", 20)), lambda: deriving.mapped("p", wrong, "w")):
        with pytest.raises(CorruptData, match="tensor w is not the one of manifest"):
            read()
    for another in (b"header" + bytes(100), b""):
        (tmp_path / "model").write_bytes(another)
        for read in (lambda: list(deriving.pieces("p", at, "w", 20)), lambda: deriving.mapped("p", at, "w")):
            with pytest.raises(ObjectChanged):
                read()


def test_a_file_that_changes_while_it_is_used_where_it_lies_is_refused_at_the_end(tmp_path: Path) -> None:
    data = np.arange(5000, dtype=np.float32)
    (tmp_path / "model").write_bytes(data.tobytes())
    store = open_store(str(tmp_path))
    parent = Parent(store.pinned_url, tuple(ParentFile(info.key, info.size, info.etag) for info in store.list()))
    deriving, at = Deriving({"p": parent}), ParentTensor(0, "F32", 4, 20000, "")
    assert np.array_equal(deriving.mapped("p", at, "w"), data[1:])
    deriving.release()
    elements = deriving.mapped("p", at, "w")
    os.truncate(tmp_path / "model", 0)
    assert not elements.any()
    with pytest.raises(ObjectChanged, match="model changed while it was in use; run again"):
        deriving.release()
