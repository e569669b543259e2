"""Safetensors files written tensor by tensor, each made when its turn comes."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, ThreadPoolExecutor, wait
from dataclasses import dataclass

from typing_extensions import Buffer

from jobs.manifest import FileEntry, TensorEntry
from jobs.merge_tasks import DTYPE_BITS
from workers.checkpoints.safetensors import header_bytes
from workers.digests import TensorHash
from workers.storage import Store

FILES_AT_ONCE = 4


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


def write_files(
    store: Store, files: Mapping[str, Sequence[Made]], progress: Callable[[int], None]
) -> tuple[dict[str, FileEntry], dict[str, TensorEntry]]:
    """As `write_file`, for the tensors of each file by its key; several files at once, most of it is the kernel's work.

    An error ends the other files too: those that are not whole yet do not become visible.
    """
    stopped = threading.Event()

    def unless_stopped(amount: int) -> None:
        if stopped.is_set():
            raise CancelledError
        progress(amount)

    with ThreadPoolExecutor(min(FILES_AT_ONCE, os.cpu_count() or 1), "write") as pool:
        begun = [pool.submit(write_file, store, key, tensors, unless_stopped) for key, tensors in files.items()]
        try:
            for ended in wait(begun, return_when=FIRST_EXCEPTION).done:
                ended.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    entries: dict[str, TensorEntry] = {}
    for one in begun:
        entries |= one.result()[1]
    return {key: one.result()[0] for key, one in zip(files, begun, strict=True)}, entries


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
