"""Files of `torch.save` (`pytorch_model.bin`): the place of every tensor, read and checked without its bytes.

Such a file is a zip archive: `NAME/data.pkl` describes the tensors, and `NAME/data/KEY` has the bytes of one storage,
uncompressed (torch/serialization.py).
"""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, cast

from jobs.errors import BadInput, CorruptData
from jobs.merge_tasks import DTYPE_BITS
from workers.checkpoints.pickles import StoredTensor, stored_tensors
from workers.checkpoints.safetensors import MOST_DIMENSIONS, TensorHeader, check_name, check_no_pointer
from workers.storage import ObjectInfo, Store

LARGEST_PICKLE = 16_000_000
"""Fifty thousand tensors in one file. As Python objects a pickle can be 60 times as large."""

_FIRST_READ = 64 << 10
"""Bytes of either end of a file that are read at once: nearly every file has its descriptions there."""

_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of a file that torch before 1.6 wrote: its magic number, pickled."""

_LOCAL_HEADER = 30
_ANEW = "write it anew with `torch.save(torch.load(FILE, map_location='cpu', weights_only=True), FILE)`"


def read_torch_file(store: Store, info: ObjectInfo) -> list[TensorHeader]:
    """The checked tensors of one file, in its order.

    `BadInput` for a file of an old format, with compressed entries or with other things than tensors; `CorruptData` for
    one that contradicts itself.
    """
    where = f"{store.pinned_url}/{info.key}"
    file = _Ends(store, info)
    check_no_pointer(file.first, store, info)
    if file.first.startswith(_LEGACY):
        raise BadInput(f"{where}: in the format of torch before 1.6; {_ANEW}")
    try:
        with zipfile.ZipFile(cast(Any, file)) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
            for name, entry in entries.items():
                if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
                    raise BadInput(f"{where}: {name[:80]!a} in it is compressed or encrypted; {_ANEW}")
            root = next((name.removesuffix("data.pkl") for name in entries if name.endswith("/data.pkl")), None)
            if root is None or entries[f"{root}data.pkl"].file_size > LARGEST_PICKLE:
                raise CorruptData(f"{where}: no data.pkl of at most {LARGEST_PICKLE} bytes in it; fetch it again")
            order = entries.get(f"{root}byteorder")
            if order is not None and (order.file_size > 16 or archive.read(order) != b"little"):
                raise BadInput(f"{where}: its bytes are in the order of a big-endian machine; {_ANEW}")
            tensors = stored_tensors(archive.read(f"{root}data.pkl"), where)
    # zipfile raises the last three for damaged headers, for unknown compressions and for ends that lie beyond the file
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise CorruptData(f"{where}: no whole file of torch.save ({error}); fetch it again") from None
    keys = dict.fromkeys(tensor.storage.key for tensor in tensors.values())
    for key in keys:
        if f"{root}data/{key}" not in entries:
            raise CorruptData(f"{where}: the storage {key[:80]!a} is not in it; fetch it again")
    places = _places(store, info, {key: entries[f"{root}data/{key}"] for key in keys}, where)
    return [_header(name, tensor, *places[tensor.storage.key], where) for name, tensor in tensors.items()]


@dataclass
class _Ends:
    """An object of a store as `zipfile` reads a file; both ends of it are read at once."""

    store: Store
    info: ObjectInfo
    position: int = 0

    def __post_init__(self) -> None:
        length = min(self.info.size, _FIRST_READ)
        self.first = bytes(self.store.read(self.info.key, length=length, etag=self.info.etag))
        start = max(length, self.info.size - _FIRST_READ)
        self._last_start, self._last = start, self._bytes(start, self.info.size - start)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = 0) -> int:
        self.position = max(0, offset + (0, self.position, self.info.size)[whence])
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.info.size - self.position)
        size = left if size < 0 else min(size, left)
        start, end = self.position, self.position + size
        if end <= len(self.first):
            found = self.first[start:end]
        elif start >= self._last_start:
            found = self._last[start - self._last_start : end - self._last_start]
        else:
            found = self._bytes(start, size)
        self.position = end
        return found

    def _bytes(self, start: int, size: int) -> bytes:
        if size > LARGEST_PICKLE:
            raise ValueError(f"a part of {size} bytes that describes the others")
        return bytes(self.store.read(self.info.key, start=start, length=size, etag=self.info.etag)) if size else b""


def _places(
    store: Store, info: ObjectInfo, entries: Mapping[str, zipfile.ZipInfo], where: str
) -> dict[str, tuple[int, int]]:
    """The bytes [start, end) of each storage. An entry begins with a header of its own, of a length that it states."""

    def place(entry: zipfile.ZipInfo) -> tuple[int, int]:
        header = b""
        if entry.header_offset + _LOCAL_HEADER <= info.size:
            header = bytes(store.read(info.key, start=entry.header_offset, length=_LOCAL_HEADER, etag=info.etag))
        if not header.startswith(b"PK\x03\x04"):
            raise CorruptData(f"{where}: {entry.filename[:80]!a} is not where its directory has it; fetch it again")
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        start = entry.header_offset + _LOCAL_HEADER + lengths
        if start + entry.file_size > info.size:
            raise CorruptData(f"{where}: {entry.filename[:80]!a} ends after the file; fetch it again")
        return start, start + entry.file_size

    with ThreadPoolExecutor(max_workers=16) as pool:
        return dict(zip(entries, pool.map(place, entries.values()), strict=True))


def _header(name: str, tensor: StoredTensor, start: int, end: int, where: str) -> TensorHeader:
    """The bytes of one tensor in its storage, which lies at [start, end)."""
    check_name(name, where)
    width = DTYPE_BITS[tensor.dtype] // 8
    span = 0 if 0 in tensor.shape else 1 + sum(_spans(tensor))
    first = start + tensor.offset * width
    if len(tensor.shape) > MOST_DIMENSIONS or first + span * width > end:
        raise CorruptData(f"{where}: tensor {name} of {tensor.dtype} {list(tensor.shape)[:40]} leaves its storage")
    strides = None if _is_contiguous(tensor) else tensor.strides
    return TensorHeader(name, tensor.dtype, tensor.shape, first, first + span * width, strides)


def _spans(tensor: StoredTensor) -> Iterable[int]:
    return ((extent - 1) * stride for extent, stride in zip(tensor.shape, tensor.strides, strict=True))


def _is_contiguous(tensor: StoredTensor) -> bool:
    """Whether the elements lie one after the other, in C order."""
    expected = 1
    for extent, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if extent != 1 and stride != expected and math.prod(tensor.shape):
            return False
        expected *= extent
    return True
