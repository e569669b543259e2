"""Parents on disk and mergekit's answers, made once a session."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests.conformance import cases
from tests.conformance.checkpoints import write_parents
from tests.conformance.oracle import MISSING, ORACLE_PYTHON, Answer, Merge, run_mergekit


@pytest.fixture(scope="session")
def parents() -> Iterator[Path]:
    """The folder that PARENTS stands for in a case; always the same path, as random masks are keyed by it."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "alone")
    root = Path(tempfile.gettempdir()) / f"mergeyard-conformance-{worker}"
    shutil.rmtree(root, ignore_errors=True)
    write_parents(root)
    yield root
    shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="session")
def mergekit(parents: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Answer]:
    """mergekit's answers, by name: to every case, computed in float32; `bit exact NAME` in bfloat16; `refused NAME`;
    `sharded output` in files of at most 30 kB."""
    if not ORACLE_PYTHON.exists():
        pytest.skip(MISSING)
    merges = [Merge(name, cases.in_float32(cases.parsed(text, parents))) for name, text in cases.CASES.items()]
    merges += [Merge(f"bit exact {name}", cases.parsed(text, parents)) for name, text in cases.BIT_EXACT.items()]
    merges += [Merge(f"refused {name}", cases.parsed(text, parents)) for name, text in cases.REFUSED.items()]
    sharded = cases.parsed(cases.CASES["linear-bf16"], parents)
    merges.append(Merge("sharded output", sharded, shard_bytes=30_000))
    return run_mergekit(merges, tmp_path_factory.mktemp("mergekit"))
