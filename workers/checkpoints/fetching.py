"""The files of a checkpoint in a local folder, for libraries that read nothing else."""

from __future__ import annotations

from pathlib import Path

from jobs.merge_tasks import Parent
from workers.storage import open_store

FETCHED_BYTES = 256 << 20
"""Memory of a download; a store reads parts of it side by side."""


def fetch(checkpoint: Parent, folder: Path) -> None:
    """The files of a checkpoint in a folder: links to those of a local one, downloads of the pinned versions else."""
    store = open_store(checkpoint.url)
    for file in checkpoint.files:
        local = Path(checkpoint.url, file.key)
        if local.is_file():
            (folder / file.key).symlink_to(local.resolve())
            continue
        with (folder / file.key).open("wb") as target:
            for start in range(0, file.size, FETCHED_BYTES):
                length = min(FETCHED_BYTES, file.size - start)
                target.write(store.read(file.key, start=start, length=length, etag=file.etag))
