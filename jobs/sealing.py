"""Files that mergeyard writes and reads again: each carries its own digest, so that damage is detected.

JSON has the digest under a key, over the rest of the document. Any other file has it behind `MARK`, over its own bytes
with zeros in the place of the digest: Parquet in the metadata at its end, YAML and HTML in a comment on the first line,
so that a file that was cut still has it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from jobs.errors import CorruptData

SEAL = "sha256"
"""The key of the digest of a JSON document."""

MARK = "mergeyard.sha256"
"""The text before the digest of any other file."""

BLANK = "0" * 64
"""The digest before it is known."""

PARQUET = b"PAR1"
"""The first and the last four bytes of a Parquet file."""

REMEDY = "remove it and run again"

_STAMP = re.compile(MARK.replace(".", r"\.").encode() + rb"(?:\x18@|: )([0-9a-f]{64})")
"""Mark and digest; in Parquet they are two strings of Thrift's compact protocol, the second of 64 = `@` bytes."""


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


def unsealed(data: bytes, remedy: str = REMEDY, *, older: bool = False) -> dict[str, Any]:
    """The object that `sealed` wrote; `CorruptData` for anything else.

    With `older`, an object without a digest is taken as it is: older versions wrote some files so.
    """
    try:
        document = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CorruptData(f"damaged, not JSON ({error}); {remedy}") from None
    if not isinstance(document, dict):
        raise CorruptData(f"damaged, not a JSON object; {remedy}")
    if SEAL not in document:
        if older:
            return document
        raise CorruptData(f"damaged, or of another version of mergeyard; {remedy}")
    if document.pop(SEAL) != hashlib.sha256(_encode(document).encode()).hexdigest():
        raise _changed(remedy)
    return document


def stamped(data: bytes) -> bytes:
    """The file with its digest in the place of the `BLANK` behind its last `MARK`."""
    start, end = _stamp(data) or (0, 0)
    assert data[start:end] == BLANK.encode(), "a file is stamped once"
    return data[:start] + hashlib.sha256(data).hexdigest().encode() + data[end:]


def stamped_text(text: str, comment: str) -> bytes:
    """A text in UTF-8 after a line with its digest, in the place of `{}` in `comment`."""
    return stamped(f"{comment.format(f'{MARK}: {BLANK}')}\n{text}".encode())


def is_sealed(data: bytes, name: str, remedy: str = REMEDY) -> bool:
    """Whether the file of this name carries its digest; older versions wrote some without.

    `CorruptData` for a wrong digest, for damaged JSON, and for a file that was cut.
    """
    if name.endswith(".json"):
        return len(unsealed(data, remedy, older=True)) < len(json.loads(data))
    place = _stamp(data)
    if name.endswith(".parquet"):
        cut = len(data) < 3 * len(PARQUET) or not data[:4] == data[-4:] == PARQUET
    else:
        cut = any(f"{comment}{MARK}".encode().startswith(data) for comment in ("# ", "<!-- "))
    if cut or (place is None and MARK.encode() in data):
        raise CorruptData(f"damaged, not a whole file; {remedy}")
    if place is None:
        return False
    start, end = place
    found = hashlib.sha256(memoryview(data)[:start])
    found.update(BLANK.encode())
    found.update(memoryview(data)[end:])
    if found.hexdigest().encode() != data[start:end]:
        raise _changed(remedy)
    return True


def _stamp(data: bytes) -> tuple[int, int] | None:
    """Where the digest lies: behind the last mark in Parquet, else behind the first; texts may hold another one."""
    found = list(_STAMP.finditer(data))
    return found[-1 if data[:4] == PARQUET else 0].span(1) if found else None


def _changed(remedy: str) -> CorruptData:
    return CorruptData(f"damaged, its digest is of something else; {remedy}")


def _plain(entry: Any) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}


_encode = json.JSONEncoder(separators=(",", ":"), sort_keys=True, default=_plain, allow_nan=False).encode
