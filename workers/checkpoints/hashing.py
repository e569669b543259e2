"""sha256 of tensors as they lie in a store."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from jobs.errors import CorruptData, StorageUnavailable
from jobs.merge_tasks import ParentFile, ParentTensor, TensorMerge
from workers.checkpoints.safetensors import TensorHeader, read_header
from workers.storage import ObjectInfo, Store

CHUNK_BYTES = 16 << 20


def range_sha256(store: Store, key: str, start: int, end: int, *, etag: str | None = None) -> str:
    """sha256 of bytes `[start, end)` of one object, in hexadecimal."""
    found = hashlib.sha256()
    for position in range(start, end, CHUNK_BYTES):
        found.update(store.read(key, start=position, length=min(CHUNK_BYTES, end - position), etag=etag))
    return found.hexdigest()


def tensor_sha256s(store: Store, key: str, tensors: Iterable[TensorHeader]) -> dict[str, str]:
    """sha256 of each of these tensors of one safetensors file, by name; on all processors."""

    def hashed(tensor: TensorHeader) -> tuple[str, str]:
        return tensor.name, range_sha256(store, key, tensor.start, tensor.end)

    with ThreadPoolExecutor(os.cpu_count(), "hash") as pool:
        return dict(pool.map(hashed, tensors))


def shard_sha256s(store: Store, info: ObjectInfo) -> dict[str, str]:
    """sha256 of every tensor of one safetensors file; `CorruptData` when it is none."""
    return tensor_sha256s(store, info.key, read_header(store, info))


def check_sha256(found: str, store: Store, file: ParentFile, tensor: TensorMerge, source: ParentTensor) -> None:
    """Whether a parent's tensor came as its manifest has it.

    If not, it is read again: `StorageUnavailable` when it was damaged on its way, `CorruptData` when where it lies.
    """
    if found == source.sha256:
        return
    where = f"{store.url}/{file.key}: tensor {tensor.name}"
    if range_sha256(store, file.key, source.start, source.end, etag=file.etag) == source.sha256:
        raise StorageUnavailable(f"{where} was damaged on its way; use https://, which notices, and run again")
    raise CorruptData(f"{where} is not the one of manifest.json there; put it right, or remove that manifest")
