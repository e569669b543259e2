"""The protocol of every store: a folder, memory, a bucket or the hub.

Everything above this package speaks of keys, sizes and ETags; nothing above it sees boto3, obstore or an HTTP status.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol

from typing_extensions import Buffer


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """One object: its key relative to the store, its size in bytes, and a tag that changes when its bytes may have.

    `outside` is set in a listing of a folder: the file that a symbolic link leads to, if that is neither in the folder
    nor in a cache of the hub.
    """

    key: str
    size: int
    etag: str
    outside: str | None = None


class Upload(Protocol):
    """One object being written front to back; invisible to every reader until `commit` returns.

    Leaving the `with` block without `commit` aborts and leaves nothing behind.
    """

    def write(self, data: Buffer) -> None:
        """Append; the caller may reuse the buffer as soon as this returns."""
        ...

    def commit(self) -> ObjectInfo:
        """Make the object visible, whole and durable, replacing any earlier one under the key.

        Of an upload that creates, `ObjectExists` if there is one, which stays as it is.
        """
        ...

    def abort(self) -> None:
        """Throws away the written bytes; does nothing after `commit` or when called twice."""
        ...

    def __enter__(self) -> Upload: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Store(Protocol):
    """A flat set of objects under one URL. Keys are relative, with `/`; `..`, `//` and a leading `/` are refused.

    Every method raises the errors of `jobs.errors` only: `ObjectMissing`, `StorageRefused`, `ObjectChanged`,
    `ObjectExists`, `StorageUnavailable` (after its own retries), `CorruptData`. All methods may be called from
    several threads at once.
    """

    @property
    def url(self) -> str:
        """Where this store is, without credentials and without a trailing slash; `open_store(url)` opens it again."""
        ...

    @property
    def pinned_url(self) -> str:
        """A URL that names this very version for ever where the store has versions (a hub commit), else `url`."""
        ...

    def locate(self, key: str) -> ObjectInfo:
        """Size and ETag of one object, by reading no content."""
        ...

    def read(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> Buffer:
        """Exactly `length` bytes from `start` (to the end if None), all of the version named by `etag`.

        `CorruptData` if the object ends earlier. The answer is in fresh memory, which costs as much as the reading when
        it is large: for that, `read_into` a buffer that is used again.
        """
        ...

    def read_into(self, key: str, buffer: memoryview, *, start: int = 0, etag: str | None = None) -> None:
        """Fill the whole of `buffer` (writable, contiguous, bytes) with the bytes from `start`."""
        ...

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Every object whose key begins with `prefix`, in no promised order; uploads in progress are not objects."""
        ...

    def write(self, key: str, data: Buffer, *, mode: Literal["create", "overwrite"] = "overwrite") -> ObjectInfo:
        """Write a small object at once; with `create`, `ObjectExists` if there is one: of many racers, one wins."""
        ...

    def swap(self, key: str, data: Buffer, *, etag: str) -> ObjectInfo:
        """Replace the object if it is still the version `etag`, else `ObjectChanged`, as when it is gone.

        Of several writers, one wins. Some stores' ETags are digests of the content: put a nonce into it, so that no
        earlier version can come back.
        """
        ...

    def upload(self, key: str, *, mode: Literal["create", "overwrite"] = "overwrite") -> Upload:
        """Begin a large object of unknown size; with `create`, of many that commit, one wins.

        Of objects in parts, those of more than 16 MiB, GCS takes no condition (its XML API answers 400), and obstore
        passes none on to Azure: there `commit` looks whether there is an object, and replaces one that came since.
        """
        ...

    def delete(self, key: str) -> None:
        """Remove one object; no error if it is not there."""
        ...

    def sweep(self, prefix: str = "") -> int:
        """Removes partial files and open multipart uploads of dead uploads under `prefix`; returns their number.

        A folder knows its living uploads and spares them. S3 does not: a living upload is ended too, and its `write` or
        `commit` raises `StorageUnavailable`: it has to begin again. On GCS and Azure unfinished uploads go by the
        bucket's own rules; the answer is 0.
        """
        ...

    def check_writable(self) -> None:
        """`AccessDenied` or `BadInput` if nothing can be written here; leaves nothing behind."""
        ...

    def free_bytes(self) -> int | None:
        """Room left, where the store knows it (a local disk), else None."""
        ...
