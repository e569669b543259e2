"""The bundled tiny parents and their tokenizer, a byte-level BPE of 2,048 tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

import jobs
from workers.benchmarks.texts.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def parents() -> Path:
    """The folder of the tiny parents `base`, `long` and `fmt`."""
    return Path(jobs.__file__).parent / "examples" / "parents"


@pytest.fixture(scope="session")
def tokenizer(parents: Path) -> Tokenizer:
    return Tokenizer.from_folder(parents / "base")
