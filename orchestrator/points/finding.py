"""A point by its URL or by run and name, with its manifest."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from jobs.errors import CorruptData
from orchestrator.points.publishing import FoundPoint
from orchestrator.points.verifying import point_problems
from orchestrator.words import size

if TYPE_CHECKING:
    pass


def check_files(point: FoundPoint, say: Callable[[str], None]) -> None:
    """`CorruptData` unless every file is what the manifest says."""
    say(f"verifying {point.name}, {size(sum(entry.size for entry in point.manifest.files.values()))}")
    for problem in point_problems(point.store, point.prefix, point.manifest):
        raise CorruptData(f"{point.store.url}/{point.prefix}{problem}; nothing was published")
