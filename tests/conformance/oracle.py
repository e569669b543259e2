"""mergekit from PyPI as a judge: many merges in one subprocess of its own environment."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ORACLE_PYTHON = HERE.parents[1] / ".venv-mergekit" / "bin" / "python"
MISSING = "mergekit's environment .venv-mergekit is not there; `make oracle` installs it"


@dataclass(frozen=True)
class Merge:
    """One merge to ask of mergekit: of a document, or of its text."""

    name: str
    document: dict[str, Any] | str
    seed: int = 0
    shard_bytes: int = 5_000_000_000


@dataclass(frozen=True)
class Answer:
    """The folder mergekit wrote, or the exception it raised."""

    folder: Path
    error: str | None


def run_mergekit(merges: Sequence[Merge], root: Path) -> dict[str, Answer]:
    """Runs all merges on one CPU thread; each one's output goes to `root/<name>`. About 10 s to start, 0.2 s a
    merge."""
    tasks = [
        {
            "name": merge.name,
            "config": merge.document
            if isinstance(merge.document, str)
            else yaml.safe_dump(merge.document, sort_keys=False),
            "out": str(root / merge.name),
            "seed": merge.seed,
            "shard_bytes": merge.shard_bytes,
        }
        for merge in merges
    ]
    lines = [
        json.loads(line[7:]) for line in _run("mergekit_driver.py", tasks).splitlines() if line.startswith("result ")
    ]
    if len(lines) != len(tasks):
        raise RuntimeError(f"mergekit finished {len(lines)} of {len(tasks)} merges")
    return {line["name"]: Answer(root / line["name"], line["error"]) for line in lines}


def run_making(requests: Sequence[dict[str, Any]]) -> None:
    """Runs programs of mergekit, and PEFT, as `making_driver.py` says; about 15 s to start."""
    _run("making_driver.py", requests)


def run_genomes(cases: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The documents of mergekit-evolve, as `evolve_driver.py` says; about 10 s to start."""
    [line] = [line for line in _run("evolve_driver.py", cases).splitlines() if line.startswith("result ")]
    return json.loads(line[7:])


def _run(driver: str, tasks: Sequence[dict[str, Any]]) -> str:
    quiet = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(ORACLE_PYTHON), str(HERE / driver)],
        input=json.dumps(tasks),
        capture_output=True,
        text=True,
        env={**os.environ, **quiet},
        timeout=540,
    )
    if done.returncode:
        raise RuntimeError(f"{driver} failed: {done.stderr[-3000:]}")
    return done.stdout
