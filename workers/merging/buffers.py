"""Reused memory: a fresh page costs more to map than to fill, and the buffers in use bound the memory of a task."""

from __future__ import annotations

import ctypes
import threading

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]


class BufferPool:
    """At most `count` byte arrays of one size, page-locked for a GPU; `acquire` waits for one to come back."""

    def __init__(self, size: int, count: int, *, pinned: bool = False) -> None:
        self.size = size
        self._pinned = pinned
        self._free: list[Bytes] = []
        self._unborn = max(1, count)
        self._change = threading.Condition()

    def acquire(self) -> Bytes:
        """`size` bytes with whatever is in it."""
        with self._change:
            while not self._free and not self._unborn:
                self._change.wait()
            if self._free:
                return self._free.pop()
            self._unborn -= 1
        return memory(self.size, pinned=self._pinned)

    def release(self, buffer: Bytes) -> None:
        """Lends it to the next who asks."""
        with self._change:
            self._free.append(buffer)
            self._change.notify()


def memory(size: int, *, pinned: bool = False) -> Bytes:
    """`size` bytes with whatever is in them, page-locked for a GPU."""
    if not pinned:
        return np.empty(size, np.uint8)
    import torch

    return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()


def keep_freed_memory() -> None:
    """Asks glibc to serve tiles from its heap: by default it maps, zeroes and unmaps every half MiB anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 256 << 20)
