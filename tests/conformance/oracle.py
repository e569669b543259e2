"""mergekit from PyPI as a judge: a process of its own environment, which answers one question after another."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).parent
ORACLE_PYTHON = HERE.parents[1] / ".venv-mergekit" / "bin" / "python"
MISSING = "mergekit's environment .venv-mergekit is not there; `make oracle` installs it"
QUIET = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Failed(Exception):
    """What mergekit or PEFT raised, as text."""


class Oracle:
    """The process, on one CPU thread: it starts at the first question, which takes ten seconds of CPU time."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._process: subprocess.Popen[str] | None = None

    def ask(self, request: str, **arguments: Any) -> Any:
        """The answer of a function of `oracle_driver.py`; raises `Failed` where it raised."""
        process = self._process or self._started()
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps([request, arguments]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"the oracle ended at {request} of {arguments}: {self._log.read_text()[-3000:]}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["value"]

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def _started(self) -> subprocess.Popen[str]:
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [ORACLE_PYTHON, HERE / "oracle_driver.py"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env={**os.environ, **QUIET},
            )
        return self._process


@dataclass(frozen=True)
class Answer:
    """The folder mergekit wrote, or the exception it raised."""

    folder: Path
    error: str | None


class Answers(Mapping[str, Answer]):
    """mergekit's merges of documents by name, each made when it is first looked at: 0.1 s."""

    def __init__(self, oracle: Oracle, documents: Mapping[str, Callable[[], dict[str, Any] | str]], root: Path) -> None:
        self._oracle, self._documents, self._root = oracle, documents, root
        self._found: dict[str, Answer] = {}

    def __getitem__(self, name: str) -> Answer:
        if name not in self._found:
            document = self._documents[name]()
            self._found[name] = self.merge(name, document)
        return self._found[name]

    def merge(self, name: str, document: dict[str, Any] | str, shard_bytes: int = 5_000_000_000) -> Answer:
        """The merge of a document, or of its text, in files of at most so many bytes."""
        text = document if isinstance(document, str) else yaml.safe_dump(document, sort_keys=False)
        folder = self._root / name
        try:
            self._oracle.ask("merge", config=text, out=str(folder), seed=0, shard_bytes=shard_bytes)
        except Failed as failed:
            return Answer(folder, str(failed))
        return Answer(folder, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._documents)

    def __len__(self) -> int:
        return len(self._documents)
