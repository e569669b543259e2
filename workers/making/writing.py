"""A safetensors file written tensor by tensor, each made when its turn comes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from typing_extensions import Buffer

from jobs.manifest import FileEntry, TensorEntry
from jobs.merge_tasks import DTYPE_BITS
from workers.checkpoints.safetensors import header_bytes
from workers.digests import TensorHash
from workers.storage import Store


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor of the output: name, dtype (safetensors name), shape, and the function that gives its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[Buffer]]

    @property
    def bytes(self) -> int:
        """Stored size."""
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def write_file(
    store: Store, key: str, tensors: Sequence[Made], progress: Callable[[int], None] | None = None
) -> tuple[FileEntry, dict[str, TensorEntry]]:
    """Writes a file that becomes visible when it is whole; returns its entries in a manifest.

    `progress` gets the bytes of each piece, which a second thread hashes while this one writes it. A tensor may give
    its pieces in the same memory. Raises the errors of the store and of the tensors' functions.
    """
    entries: dict[str, TensorEntry] = {}
    with ThreadPoolExecutor(1, "hash") as hasher, store.upload(key) as upload:
        upload.write(header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in tensors]))
        for tensor in tensors:
            hashed, written = TensorHash(), 0
            for piece in tensor.pieces():
                of_piece = hasher.submit(hashed.update, piece)
                upload.write(piece)
                of_piece.result()
                written += memoryview(piece).nbytes
                if progress is not None:
                    progress(memoryview(piece).nbytes)
            assert written == tensor.bytes, f"{tensor.name}: {written} bytes of {tensor.bytes}"
            entries[tensor.name] = TensorEntry(key, tensor.dtype, tensor.shape, hashed.digest())
        info = upload.commit()
    return FileEntry(info.size), entries
