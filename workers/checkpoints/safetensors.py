"""The header of a safetensors file, read and checked without its tensors."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from jobs.errors import CorruptData
from jobs.foreign_json import is_text, load_json
from jobs.merge_tasks import DTYPE_BITS
from workers.storage import ObjectInfo, Store

LARGEST_HEADER = 25_000_000
"""The limit of huggingface_hub. As Python objects a header can be 25 times as large."""

POINTER_SIZES = range(120, 200)
"""Bytes of a Git LFS pointer: three lines, of which the last has a number."""

MOST_DIMENSIONS = 64
LONGEST_NAME = 1000
_FIRST_READ = 128 << 10  # holds the whole header of nearly every shard, so that most cost one request
_ONE_LARGE_HEADER = threading.Lock()  # a file that only looks like a header may become 600 MB of lists: one at a time


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor of a file; `start` and `end` count from the first byte of the file.

    `strides` count elements. They are None for elements one after the other in C order, as safetensors has them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    strides: tuple[int, ...] | None = None


def read_json(store: Store, info: ObjectInfo, most_bytes: int) -> dict[str, Any]:
    """The JSON object of the version `info` names; `CorruptData` when it is not one, or larger than that."""
    if info.size > most_bytes:
        raise CorruptData(
            f"{store.url}/{info.key}: has {info.size} bytes, at most {most_bytes} are read; is it the right file?"
        )
    text = bytes(store.read(info.key, etag=info.etag))
    check_no_pointer(text, store, info)
    return _parse_json(text, f"{store.url}/{info.key}")


def check_no_pointer(content: bytes, store: Store, info: ObjectInfo) -> None:
    """`CorruptData` for the text that Git LFS leaves in place of a file (https://git-lfs.com/spec)."""
    if content.startswith(b"version https://git-lfs.github.com/spec/"):
        raise CorruptData(
            f"{store.url}/{info.key}: a Git LFS pointer, not the file itself; run `git lfs pull` in its repository,"
            " or give the hf:// URL"
        )


def read_header(store: Store, info: ObjectInfo) -> list[TensorHeader]:
    """The checked header of one safetensors file, in file order."""
    where = f"{store.pinned_url}/{info.key}"
    first = bytes(store.read(info.key, length=min(info.size, _FIRST_READ), etag=info.etag))
    check_no_pointer(first, store, info)
    if len(first) < 8:
        raise CorruptData(f"{where}: {info.size} bytes is too short for a safetensors file; fetch it again")
    length = int.from_bytes(first[:8], "little")
    if length > LARGEST_HEADER or 8 + length > info.size:
        raise CorruptData(
            f"{where}: its header claims {length} bytes of a file of {info.size};"
            " it is truncated or no safetensors file, fetch it again"
        )
    if 8 + length <= len(first):
        return parse_header(first[8 : 8 + length], data_start=8 + length, file_size=info.size, where=where)
    with _ONE_LARGE_HEADER:
        first += bytes(store.read(info.key, start=len(first), length=8 + length - len(first), etag=info.etag))
        return parse_header(first[8:], data_start=8 + length, file_size=info.size, where=where)


def read_metadata(store: Store, info: ObjectInfo) -> dict[str, str]:
    """The words that stand beside the tensors in the header of a file whose header `read_header` has checked."""
    length = int.from_bytes(bytes(store.read(info.key, length=8, etag=info.etag)), "little")
    header = _parse_json(bytes(store.read(info.key, start=8, length=length, etag=info.etag)), info.key)
    return header.get("__metadata__", {})


def parse_header(text: bytes, *, data_start: int, file_size: int, where: str) -> list[TensorHeader]:
    """Checks and reads a header's JSON: known dtypes, sizes that match shapes, data without gap, overlap or rest."""
    if not text.startswith(b"{"):
        raise CorruptData(f"{where}: the header does not begin with '{{'")
    header = _parse_json(text, where)
    _check_metadata(header.get("__metadata__", {}), where)
    entries = [
        _entry(name, value, data_start=data_start, where=where)
        for name, value in header.items()
        if name != "__metadata__"
    ]
    entries.sort(key=lambda entry: (entry.start, entry.end))
    position = data_start
    for entry in entries:
        if entry.start != position:
            kind = "overlaps the one before it" if entry.start < position else "leaves a gap before it"
            raise CorruptData(f"{where}: tensor {entry.name} {kind}")
        position = entry.end
    if position != file_size:
        raise CorruptData(
            f"{where}: the tensors end at byte {position}, the file at {file_size}; it is truncated or has a tail"
        )
    return entries


def _check_metadata(metadata: Any, where: str) -> None:
    match metadata:
        case dict() if all(is_text(key) and is_text(value) for key, value in metadata.items()):
            return
        case _:
            raise CorruptData(f"{where}: __metadata__ must map words to words")


def _entry(name: str, value: Any, *, data_start: int, where: str) -> TensorHeader:
    check_name(name, where)
    match value:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [start, end], **rest} if not rest:
            pass
        case _:
            raise CorruptData(f"{where}: tensor {name} has no plain dtype, shape and data_offsets")
    if dtype not in DTYPE_BITS:
        raise CorruptData(f"{where}: tensor {name} has the unknown dtype {dtype[:80]!a}")
    if len(shape) > MOST_DIMENSIONS or not all(_is_count(extent) for extent in shape):
        raise CorruptData(f"{where}: tensor {name} has the impossible shape {str(shape[:40])[:80]}")
    if not (_is_count(start) and _is_count(end) and start <= end):
        raise CorruptData(f"{where}: tensor {name} has impossible data_offsets")
    if (end - start) * 8 != math.prod(shape) * DTYPE_BITS[dtype]:
        raise CorruptData(f"{where}: tensor {name} of {dtype} {shape} cannot lie in bytes {start} to {end}")
    return TensorHeader(name, dtype, tuple(shape), data_start + start, data_start + end)


def check_name(name: str, where: str) -> None:
    if not name.isprintable() or len(name) > LONGEST_NAME:
        raise CorruptData(f"{where}: the tensor name {name[:80]!a} holds characters that no name has")


def _is_count(value: object) -> bool:
    """Whether JSON gave a whole number of bytes or elements; `true` is a number to Python, and none here."""
    return type(value) is int and 0 <= value < 1 << 63


def _parse_json(text: bytes, where: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ValueError("a key stands twice")
        return found

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a JSON number")

    try:
        value = load_json(text, object_pairs_hook=unique, parse_constant=refuse)
    except ValueError as error:
        raise CorruptData(f"{where}: not readable as JSON ({error})") from None
    if not isinstance(value, dict):
        raise CorruptData(f"{where}: a JSON object was expected")
    return value


def header_bytes(
    tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str] = MappingProxyType({})
) -> bytes:
    """The first bytes of a safetensors file that holds these (name, dtype, shape) one after the other.

    Padded with blanks to a multiple of 8, so that every tensor is aligned when wider dtypes come first.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    position = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + size]}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
