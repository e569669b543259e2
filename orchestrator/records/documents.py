"""Reading one JSON or text document of a run, with errors that name it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from jobs.errors import CorruptData
from jobs.sealing import unsealed
from workers.storage import Store
from workers.storage.records import read_record

Read = TypeVar("Read")


def read_document(store: Store, key: str, parse: Callable[[dict[str, Any]], Read], remedy: str) -> Read:
    """`parse` of a JSON object; `CorruptData` if it is damaged or lacks a part. Older versions wrote no digest."""

    def checked(data: bytes) -> Read:
        document = unsealed(data, remedy, older=True)
        try:
            return parse(document)
        except KeyError as error:
            raise CorruptData(f"damaged, there is no {error}; {remedy}") from None
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise CorruptData(f"damaged ({error}); {remedy}") from None

    return read_record(store, key, checked)


def text_of(document: Mapping[str, Any], name: str) -> str:
    """An entry that has to be text; `KeyError` or `TypeError` where it is not there or is not."""
    if not isinstance(document[name], str):
        raise TypeError(f"{name} is not text")
    return document[name]
