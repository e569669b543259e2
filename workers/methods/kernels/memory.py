"""Addresses of arrays for kernels, and the small buffers that they work in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 512
"""Elements at a time: a few parents and a sum of so many stay in a core's fastest cache.

Of longer stretches of each parent, a processor also fetches too few ahead.
"""

_CACHE_LINE = 64


def address(array: Array) -> int:
    """Where an array begins. Keep the array for as long as the address is used."""
    return array.__array_interface__["data"][0]


def addresses(arrays: Sequence[Array]) -> NDArray[np.uint64]:
    """Where each array begins."""
    return np.array([address(each) for each in arrays], np.uint64)


def are_pairs(arrays: Sequence[Array], places: NDArray[np.uint64]) -> bool:
    """Whether each array consists of words that have two bfloat16 numbers; `places` are their addresses.

    In a file, a tensor of an odd size may put all later ones between words: they take the general loops.
    """
    halves = all(each.dtype == ml_dtypes.bfloat16 and each.size % 2 == 0 for each in arrays)
    return halves and not (places % 4).any()


def aligned_lines(count: int, size: int) -> tuple[NDArray[np.uint64], Array]:
    """The addresses of `count` buffers of `size` bytes, each at the start of a cache line, and their memory."""
    size = -(-size // _CACHE_LINE) * _CACHE_LINE
    memory = np.empty(count * size + _CACHE_LINE, np.uint8)
    begin = -(-address(memory) // _CACHE_LINE) * _CACHE_LINE
    return np.arange(begin, begin + count * size, size, dtype=np.uint64), memory
