"""The files that a task of the user's own is made of: its scores hold as long as none of them changes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import yaml


def files_of(task: Path) -> dict[str, str]:
    """Path relative to the task's folder → sha256, of each file that its YAML names, and so on through its includes.

    A file is named by a text anywhere in the YAML, or by `!function module.name`. Not covered: that module's own files.
    Empty for a task in a bucket, where the harness finds no file beside it.
    """
    if not task.is_file():
        return {}
    found: dict[Path, str] = {}
    waiting = [task.resolve()]
    while waiting:
        source = waiting.pop()
        if source not in found:
            found[source] = hashlib.sha256(source.read_bytes()).hexdigest()
            for key, path in _named(source):
                if key == "include":
                    waiting.append(path)
                else:
                    found.setdefault(path, hashlib.sha256(path.read_bytes()).hexdigest())
    return {os.path.relpath(path, task.parent.resolve()): sha256 for path, sha256 in sorted(found.items())}


def _named(source: Path) -> Iterator[tuple[str, Path]]:
    """The files that a YAML file names, each with the key that it stands under."""
    for key, node in _scalars(source):
        name = f"{node.value.rpartition('.')[0].replace('.', '/')}.py" if node.tag == "!function" else node.value
        try:
            path = (source.parent / name).resolve()
            if path.is_file():
                yield key, path
        except (OSError, ValueError):  # a template of many lines is not a name
            continue


def _scalars(source: Path) -> Iterator[tuple[str, yaml.ScalarNode]]:
    """Every scalar of a YAML file, with its key; no tag is built or run."""
    try:
        root = yaml.compose(source.read_text(encoding="utf-8"), yaml.SafeLoader)
    except (yaml.YAMLError, UnicodeDecodeError):  # the harness reports the fault
        return
    waiting = [("", root)]
    while waiting:
        key, node = waiting.pop()
        if isinstance(node, yaml.ScalarNode):
            yield key, node
        elif isinstance(node, yaml.SequenceNode):
            waiting.extend((key, entry) for entry in node.value)
        elif isinstance(node, yaml.MappingNode):
            waiting.extend((str(name.value), entry) for name, entry in node.value)
