"""What a task of the user's own reads, off its YAML: a score of it holds as long as none of these files changes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from jobs.errors import BadInput

MOST_HASHED = 64 << 20
"""Larger files are known by size and time alone."""

MOST_FILES = 2000
"""So many files at most may lie in the folder of a task."""


def files_of(task: Path) -> dict[str, Any]:
    """Name → sha256, or size and time, of what lies in the task's folder and of what it includes or names elsewhere.

    `BadInput` for a folder of more than `MOST_FILES`.
    """
    if not task.is_file():  # in a bucket, where nothing lies beside it for the harness to read
        return {}
    found: set[Path] = set()
    for path in _beneath(task.parent):
        found.add(path)
        if len(found) > MOST_FILES:
            raise BadInput(
                f"{task}: more than {MOST_FILES} files lie in its folder, and a score holds as long as none of them"
                " changes; give the task a folder of its own"
            )
    _follow(task.resolve(), found, set())
    return {os.path.relpath(path, task.parent.resolve()): _version(path) for path in sorted(found)}


def _beneath(folder: Path) -> Iterator[Path]:
    """Every file in a folder and those in it, but for hidden ones, what Python leaves, and our own jobs and runs."""
    for parent, folders, files in os.walk(folder.resolve()):
        if "lease.json" in files and Path(parent) != folder.resolve():  # a driver's, of a run or of nights
            folders.clear()
            continue
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name != "__pycache__")
        paths = (Path(parent, name) for name in files if not name.startswith("."))
        yield from (path for path in paths if not _is_job(path))


def _is_job(path: Path) -> bool:
    """Whether a file is a job of ours: a task has no parents."""
    return path.suffix in (".yaml", ".yml") and any(line.startswith("parents:") for line in _lines(path))


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.stat().st_size < MOST_HASHED else []


def _follow(task: Path, found: set[Path], seen: set[Path]) -> None:
    """Adds the files that a task's YAML names, and those that the YAML it includes names."""
    seen.add(task)
    for key, text in _scalars(task):
        try:
            path = (task.parent / text).resolve()
            if not path.is_file():
                continue
        except (OSError, ValueError):  # a template of many lines is no name
            continue
        found.add(path)
        if key == "include" and path not in seen:
            _follow(path, found, seen)


def _scalars(task: Path) -> Iterator[tuple[str, str]]:
    """Every text in a YAML file, with the key that it stands under; nothing of it is built or run."""
    try:
        root = yaml.compose(task.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError):  # the harness says what is wrong with it
        return
    waiting = [("", root)]
    while waiting:
        key, node = waiting.pop()
        if isinstance(node, yaml.ScalarNode):
            yield key, str(node.value)
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend((key, entry) for entry in node.value)
        elif isinstance(node, yaml.MappingNode):
            waiting.extend((str(name.value), entry) for name, entry in node.value)


def _version(path: Path) -> Any:
    found = path.stat()
    if found.st_size > MOST_HASHED:
        return [found.st_size, found.st_mtime_ns]
    return hashlib.sha256(path.read_bytes()).hexdigest()
