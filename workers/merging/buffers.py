"""Memory for bytes that come and go: a fresh page costs more to map than to fill."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.memory import address

Bytes = NDArray[np.uint8]

PAGE = 4096
"""A multiple of `direct.BLOCK`."""


def memory(size: int, *, pinned: bool = False) -> Bytes:
    """`size` bytes with whatever is in them from the start of a page on, page-locked for a GPU."""
    if pinned:
        import torch

        return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy()
    whole = np.empty(size + PAGE, np.uint8)
    begin = -address(whole) % PAGE
    return whole[begin : begin + size]


def keep_freed_memory() -> None:
    """Asks glibc to serve tiles from its heap: by default it maps, zeroes and unmaps every half MiB anew."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mmap_threshold, trim_threshold = -3, -1
        mallopt(mmap_threshold, 32 << 20)
        mallopt(trim_threshold, 256 << 20)
