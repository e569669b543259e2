"""Where each file of a run lies below its folder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Places:
    """Where things lie under a run's prefix: every point in a folder of its own, or the only point right there."""

    points: str = "points/{point}/"
    records: str = ""

    def file(self, point: str, name: str) -> str:
        """Key of one file of a point."""
        return self.points.format(point=point) + name

    def record(self, name: str) -> str:
        """Key of one of the run's own files."""
        return self.records + name

    def receipt(self, unit: str) -> str:
        """Key of a unit's receipt."""
        return self.record(f"receipts/{unit[:2]}/{unit}.json")


FLAT = Places(points="", records=".mergeyard/")
"""For `mergeyard merge`: the output folder is the checkpoint; the records vanish when it is whole."""

SEVERAL = Places(points="{point}/", records=FLAT.records)
"""For `mergeyard merge` of a file with several results: each has a folder in the output folder."""
