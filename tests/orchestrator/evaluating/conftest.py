"""Job files over the tiny parents, and answers by a function in place of a model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.orchestrator.tiny_jobs import job_text


@pytest.fixture
def job_file(tmp_path: Path) -> Callable[..., Path]:
    """job_file(**keys of the job): the path of a job file."""

    def write(**keys: Any) -> Path:
        (tmp_path / "job.yaml").write_text(job_text(tmp_path, **keys))
        return tmp_path / "job.yaml"

    return write
