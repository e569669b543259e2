"""Digests of tensors as they lie in a store."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor

from jobs.errors import CorruptData, StorageUnavailable
from jobs.merge_tasks import FISHER, ParentFile, ParentTensor
from workers.checkpoints.safetensors import TensorHeader, read_header
from workers.digests import TensorHash
from workers.storage import ObjectInfo, Store

CHUNK_BYTES = 16 << 20


def range_digest(
    store: Store, key: str, start: int, end: int, *, etag: str | None = None, like: str = "blake3:"
) -> str:
    """The digest of bytes `[start, end)` of one object, by the algorithm of the digest `like`."""
    found = TensorHash(like)
    for position in range(start, end, CHUNK_BYTES):
        found.update(store.read(key, start=position, length=min(CHUNK_BYTES, end - position), etag=etag))
    return found.digest()


def changed_tensors(store: Store, key: str, tensors: Collection[TensorHeader], digests: Mapping[str, str]) -> list[str]:
    """The names of those tensors of one safetensors file that do not have these digests; on all processors."""

    def changed(tensor: TensorHeader) -> bool:
        digest = digests[tensor.name]
        return range_digest(store, key, tensor.start, tensor.end, like=digest) != digest

    with ThreadPoolExecutor(os.cpu_count(), "hash") as pool:
        return [
            tensor.name for tensor, is_changed in zip(tensors, pool.map(changed, tensors), strict=True) if is_changed
        ]


def has_digests(store: Store, info: ObjectInfo, digests: Mapping[str, str]) -> bool:
    """Whether a safetensors file has exactly the tensors of these digests; `CorruptData` when it is none."""
    tensors = read_header(store, info)
    names = {tensor.name for tensor in tensors}
    return names == set(digests) and not changed_tensors(store, info.key, tensors, digests)


def check_digest(found: str, store: Store, file: ParentFile, parent: str, tensor: str, source: ParentTensor) -> None:
    """Whether a tensor came as the manifest of its parent has it, or the file of its Fisher information.

    If not, it is read again: `StorageUnavailable` when it was damaged on its way, `CorruptData` when where it lies.
    """
    if found == source.digest:
        return
    where = f"{store.url}/{file.key}: tensor {tensor}"
    again = range_digest(store, file.key, source.start, source.end, etag=file.etag, like=source.digest)
    if again == source.digest:
        raise StorageUnavailable(f"{where} was damaged on its way; use https://, which notices, and run again")
    if parent.startswith(FISHER):
        raise CorruptData(f"{where} is damaged; fetch the file again, or measure again")
    raise CorruptData(f"{where} is not the one of manifest.json there; put it right, or remove that manifest")
