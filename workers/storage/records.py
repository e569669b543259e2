"""Objects that mergeyard left in a store, read so that damage on the way costs a second look, no more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, overload

from jobs.errors import CorruptData
from jobs.merge_tasks import Receipt
from jobs.sealing import REMEDY, is_sealed, unsealed
from workers.storage import Store

Record = TypeVar("Record")


@overload
def read_record(store: Store, key: str, *, etag: str | None = None) -> dict[str, Any]: ...
@overload
def read_record(store: Store, key: str, parse: Callable[[bytes], Record], *, etag: str | None = None) -> Record: ...
def read_record(store: Store, key: str, parse: Callable[[bytes], Any] = unsealed, *, etag: str | None = None) -> Any:
    """`parse` of the object. On `CorruptData` the object is read once more; a second `CorruptData` is raised."""
    try:
        return parse(bytes(store.read(key, etag=etag)))
    except CorruptData:
        pass
    try:
        return parse(bytes(store.read(key, etag=etag)))
    except CorruptData as error:
        raise CorruptData(f"{store.url}/{key}: {error}") from None


def read_sealed(store: Store, key: str, remedy: str = REMEDY) -> bytes:
    """The bytes of a file that carries its digest; `CorruptData` if it is wrong. Older files without one are taken."""

    def checked(data: bytes) -> bytes:
        is_sealed(data, key, remedy)
        return data

    return read_record(store, key, checked)


def read_receipt(store: Store, key: str) -> Receipt:
    """The receipt that a finished unit left."""
    return read_record(store, key, Receipt.from_json)
