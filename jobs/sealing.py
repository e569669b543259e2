"""JSON that mergeyard writes and reads again: it carries its own digest, so that damage is detected."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jobs.errors import CorruptData

SEAL = "sha256"
"""The key of the digest, which is over the rest of the document."""


def sealed(document: Mapping[str, Any], *, lines: bool = False) -> bytes:
    """The document as JSON, with its digest; dataclasses in it become objects.

    With `lines` every entry, and every entry of those that are objects, has a line of its own, for people to read. A
    manifest may have a hundred thousand: each is encoded once.
    """
    entries = [(_encode(key), _entries(value)) for key, value in sorted(document.items())]
    compact = "{" + ",".join(f"{key}:{_joined(value, ',')}" for key, value in entries) + "}"
    entries.append((_encode(SEAL), _encode(hashlib.sha256(compact.encode()).hexdigest())))
    separator = ",\n" if lines else ","
    return ("{" + separator.join(f"{key}:{_joined(value, separator)}" for key, value in entries) + "}").encode()


def _entries(value: Any) -> str | list[str]:
    """A value as JSON, or each of its entries where it is an object."""
    if not isinstance(value, Mapping):
        return _encode(value)
    return [f"{_encode(str(key))}:{_encode(entry)}" for key, entry in sorted(value.items())]


def _joined(value: str | list[str], separator: str) -> str:
    return value if isinstance(value, str) else "{" + separator.join(value) + "}"


def unsealed(data: bytes) -> dict[str, Any]:
    """The object that `sealed` wrote; `CorruptData` for anything else."""
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptData(f"damaged, not JSON ({error}); remove it and run again") from None
    if not isinstance(document, dict) or SEAL not in document:
        raise CorruptData("damaged, or of another version of mergeyard; remove it and run again")
    if document.pop(SEAL) != hashlib.sha256(_encode(document).encode()).hexdigest():
        raise CorruptData("damaged, its digest is of something else; remove it and run again")
    return document


def _plain(entry: Any) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}


_encode = json.JSONEncoder(separators=(",", ":"), sort_keys=True, default=_plain, allow_nan=False).encode
