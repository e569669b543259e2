"""Snapshots of repositories in the cache of huggingface_hub, read where the hub is out of reach.

Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache. A file of a snapshot is a link to
`blobs/<ETag>`, so its ETag is that of the hub, and a run that began online goes on offline.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from huggingface_hub import constants, errors, snapshot_download

from jobs.errors import StorageError
from workers.storage.store import ObjectInfo


def cached_snapshot(repository: str, kind: str, revisions: Sequence[str]) -> tuple[Path, str] | None:
    """The folder of the first of these revisions that lies whole in the cache, and the revision."""
    for revision in revisions:
        try:
            folder = snapshot_download(
                repository,
                repo_type=kind,
                revision=revision,
                cache_dir=constants.HF_HUB_CACHE,
                local_files_only=True,
            )
        except (errors.LocalEntryNotFoundError, errors.IncompleteSnapshotError, errors.HFValidationError):
            continue
        return Path(folder), revision
    return None


def cached_info(snapshot: Path, key: str) -> ObjectInfo | None:
    """Size and ETag of one file of a snapshot; None if it is not there."""
    path = snapshot / key
    if not path.is_file():
        return None
    blob = path.resolve()
    if not blob.is_relative_to(snapshot.resolve().parents[2]):
        raise StorageError(f"{path} leads outside the cache; remove it and download the repository again")
    etag = path.readlink().name if path.is_symlink() else path.name
    return ObjectInfo(key, blob.stat().st_size, etag)


def cached_infos(snapshot: Path) -> Iterator[ObjectInfo]:
    """Every file of a snapshot."""
    for path in sorted(snapshot.rglob("*")):
        if (info := cached_info(snapshot, path.relative_to(snapshot).as_posix())) is not None:
            yield info
