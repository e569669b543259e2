"""A store in this process's memory: the same promises as a bucket, for tests and simulations."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Literal

from typing_extensions import Buffer

from jobs.errors import ObjectChanged, ObjectExists, ObjectMissing, StorageUnavailable
from workers.storage.keys import check_key, check_prefix, length_within
from workers.storage.store import ObjectInfo


class MemoryStore:
    """Objects in a dict; an ETag is the number of the write that made the object, so it never comes back."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._lock = threading.Lock()
        self._writes = itertools.count(1)
        self._objects: dict[str, tuple[bytes, str]] = {}
        self._uploads: set[MemoryUpload] = set()

    @property
    def url(self) -> str:
        return self._url

    @property
    def pinned_url(self) -> str:
        return self._url

    def locate(self, key: str) -> ObjectInfo:
        data, etag = self._get(check_key(key))
        return ObjectInfo(key, len(data), etag)

    def read(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> Buffer:
        data, current = self._get(check_key(key))
        if etag is not None and etag != current:
            raise ObjectChanged(f"{self._place(key)} changed while it was in use; run again to pin the new version")
        return data[start : start + length_within(self._place(key), len(data), start, length)]

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, etag: str | None = None) -> None:
        buffer[:] = memoryview(self.read(key, start=start, length=buffer.nbytes, etag=etag))

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        check_prefix(prefix)
        with self._lock:
            found = [
                ObjectInfo(k, len(data), etag) for k, (data, etag) in self._objects.items() if k.startswith(prefix)
            ]
        return iter(found)

    def write(self, key: str, data: Buffer, *, mode: Literal["create", "overwrite"] = "overwrite") -> ObjectInfo:
        check_key(key)
        content = bytes(data)
        with self._lock:
            if mode == "create" and key in self._objects:
                raise ObjectExists(f"{self._place(key)} is already there")
            return self._put(key, content)

    def swap(self, key: str, data: Buffer, *, etag: str) -> ObjectInfo:
        check_key(key)
        content = bytes(data)
        with self._lock:
            if key not in self._objects or self._objects[key][1] != etag:
                raise ObjectChanged(f"{self._place(key)} was replaced by another writer")
            return self._put(key, content)

    def upload(self, key: str, *, mode: Literal["create", "overwrite"] = "overwrite") -> MemoryUpload:
        upload = MemoryUpload(self, check_key(key), mode)
        with self._lock:
            self._uploads.add(upload)
        return upload

    def delete(self, key: str) -> None:
        check_key(key)
        with self._lock:
            self._objects.pop(key, None)

    def sweep(self, prefix: str = "") -> int:
        check_prefix(prefix)
        with self._lock:
            dead = {upload for upload in self._uploads if upload.key.startswith(prefix)}
            self._uploads -= dead
        return len(dead)

    def check_writable(self) -> None:
        pass

    def free_bytes(self) -> int | None:
        return None

    def finish(self, upload: MemoryUpload, data: bytes) -> ObjectInfo:
        """Make an upload's bytes the object; `StorageUnavailable` when the upload was swept away: begin it again."""
        with self._lock:
            if upload not in self._uploads:
                raise StorageUnavailable(f"the upload of {self._place(upload.key)} was aborted; start it again")
            self._uploads.discard(upload)
            if upload.mode == "create" and upload.key in self._objects:
                raise ObjectExists(f"{self._place(upload.key)} is already there")
            return self._put(upload.key, data)

    def forget(self, upload: MemoryUpload) -> None:
        """Drop an upload that will not be committed."""
        with self._lock:
            self._uploads.discard(upload)

    def _get(self, key: str) -> tuple[bytes, str]:
        with self._lock:
            if key not in self._objects:
                raise ObjectMissing(f"{self._place(key)} does not exist")
            return self._objects[key]

    def _put(self, key: str, data: bytes) -> ObjectInfo:
        etag = f'"{next(self._writes)}"'
        self._objects[key] = (data, etag)
        return ObjectInfo(key, len(data), etag)

    def _place(self, key: str) -> str:
        return f"{self._url}/{key}"


class MemoryUpload:
    """An object of a `MemoryStore` being written."""

    def __init__(self, store: MemoryStore, key: str, mode: Literal["create", "overwrite"]) -> None:
        self.key = key
        self.mode = mode
        self._store = store
        self._data = bytearray()

    def write(self, data: Buffer) -> None:
        self._data += memoryview(data).cast("B")

    def commit(self) -> ObjectInfo:
        return self._store.finish(self, bytes(self._data))

    def abort(self) -> None:
        self._store.forget(self)

    def __enter__(self) -> MemoryUpload:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abort()


_STORES: dict[str, MemoryStore] = {}
_STORES_LOCK = threading.Lock()


def named_memory_store(url: str) -> MemoryStore:
    """The one store of this process under `url`."""
    with _STORES_LOCK:
        return _STORES.setdefault(url, MemoryStore(url))
