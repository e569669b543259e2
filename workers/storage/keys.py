"""The form of a key: the same rules for every store, so that a run can move from a folder to a bucket."""

from __future__ import annotations

import re

from jobs.errors import BadInput, CorruptData

LONGEST_KEY_BYTES = 1024  # S3's limit

FORBIDDEN = re.compile(r"[\\\x00-\x1f\x7f]")
STRAY_PART = re.compile(r"(?:\A|/)\.{0,2}(?:/|\Z)")


def check_key(key: str) -> str:
    """The key itself; `BadInput` if empty, or with a stray `/`, a part `.` or `..`, a backslash, control characters."""
    _check_characters(key)
    if STRAY_PART.search(key):
        raise BadInput(
            f"object key {key!r} is not allowed: no leading, trailing or doubled '/', and neither '.' nor '..'"
        )
    return key


def check_prefix(prefix: str) -> str:
    """The prefix itself, which may be empty and may end in `/` or in the middle of a name; else as `check_key`."""
    if prefix:
        _check_characters(prefix)
        parts = prefix.split("/")
        if any(part in ("", ".", "..") for part in parts[:-1]) or parts[-1] == "..":
            raise BadInput(
                f"object prefix {prefix!r} is not allowed: no leading or doubled '/', and neither '.' nor '..'"
            )
    return prefix


def length_within(place: str, size: int, start: int, length: int | None) -> int:
    """How many bytes a read of an object of `size` bytes has to return; `CorruptData` when it reaches past the end."""
    wanted = size - start if length is None else length
    if start < 0 or wanted < 0 or start + wanted > size:
        raise CorruptData(f"{place} has {size} bytes, but bytes {start} to {start + max(wanted, 0)} were asked for")
    return wanted


def _check_characters(key: str) -> None:
    if FORBIDDEN.search(key):
        raise BadInput(f"object key {key!r} is not allowed: no backslash and no control characters")
    if len(key.encode()) > LONGEST_KEY_BYTES:
        raise BadInput(f"object key {key[:60]!r}… is longer than {LONGEST_KEY_BYTES} bytes")
