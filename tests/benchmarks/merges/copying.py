"""The floor: reads files, and copies one. Imports nothing slow.

python tests/benchmarks/merges/copying.py OUT POINTS plain|synced COPIED [READ …]
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

BLOCK = 16 << 20


def read_and_copy(read: Iterable[Path], copied: Path, out: Path, points: int, synced: bool) -> None:
    """Reads every file, then writes `points` copies of one into a folder; `synced` waits until the disk has each."""
    for path in read:
        for _ in blocks(path):
            pass
    for point in range(points):
        with (out / f"{point}").open("wb", buffering=0) as target:
            for block in blocks(copied):
                target.write(block)
            if synced:
                os.fsync(target.fileno())


def blocks(path: Path) -> Iterator[memoryview]:
    """The bytes of a file, in a buffer that is used again."""
    buffer = bytearray(BLOCK)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            yield memoryview(buffer)[:count]


if __name__ == "__main__":
    out, points, synced, copied, *read = sys.argv[1:]
    read_and_copy(map(Path, read), Path(copied), Path(out), int(points), synced == "synced")
