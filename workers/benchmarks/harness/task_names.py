"""Which tasks lm-evaluation-harness has, read off its files: to ask it takes half a minute."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from jobs.evaluate import RANKED
from jobs.yaml_nodes import quoted, suggestion

_NAMED = re.compile(r"^[ \t-]*(?:task|group|tag):[ \t]*[\"']?([\w.-]+)", re.MULTILINE)


def trouble_with(task: str) -> str:
    """Why there can be no task, group or tag of this name; empty where its name stands in some task's file.

    A benchmark of a job file, such as `custom`, must be the name of a task, as its word stands in many files.
    """
    if task in RANKED and task not in _names():
        return (
            f"lm_eval has no task {quoted(task)}, which is a benchmark of mergeyard; ask it as `{task}:` of `evaluate:`"
            ", and name here tasks of lm-evaluation-harness, such as gsm8k"
        )
    word = re.compile(rf"(?<![\w.-]){re.escape(task)}(?![\w-])")
    if any(word.search(text) for text in _texts()):
        return ""
    return f"lm_eval has no task {quoted(task)}{suggestion(task, sorted(_names())) or '; see `lm-eval ls tasks`'}"


def _names() -> set[str]:
    return {name for text in _texts() for name in _NAMED.findall(text)}


@cache
def _texts() -> tuple[str, ...]:
    return tuple(file.read_text(encoding="utf-8", errors="replace") for file in _files())


def _files() -> Iterator[Path]:
    """The YAML files of all tasks, and those they include, whose names have no ending."""
    found = find_spec("lm_eval")
    assert found is not None and found.submodule_search_locations is not None
    tasks = Path(found.submodule_search_locations[0]) / "tasks"
    return (file for file in tasks.rglob("*") if file.suffix in ("", ".yaml", ".yml") and file.is_file())
