"""Magnitudes of task vectors as integers in the same order, and how many lie above and inside a bracket."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import CODES, widened
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines


@kernel("u16**", "u32**", "u64**", "i64*", "i64", "f32**", "u32*")
def _magnitudes(
    halves: Pointer, words: Pointer, longs: Pointer, dtypes: Pointer, count: int, lines: Pointer, bits: Pointer
) -> None:
    a, b = lines[0], lines[1]
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        for parent in range(2):
            widened(dtypes[parent], halves[parent], words[parent], longs[parent], first, size, lines[parent])
        for i in range(size):
            bits[first + i] = np.float32(a[i] - b[i]).view(np.uint32) & np.uint32(0x7FFFFFFF)


def magnitudes(model: Array, base: Array) -> NDArray[np.int32]:
    """|model − base| in float32, as integers whose order is the order of magnitudes; a NaN is the greatest."""
    pair = [np.ascontiguousarray(model), np.ascontiguousarray(base)]
    assert pair[0].size == pair[1].size
    bits = np.empty(pair[0].size, np.int32)
    lines, _memory = aligned_lines(2, 4 * BLOCK)
    dtypes = np.array([CODES[each.dtype] for each in pair], np.int64)
    raw = addresses(pair)
    at = address(raw)
    _magnitudes(at, at, at, address(dtypes), bits.size, address(lines), address(bits))
    return bits


@kernel("u32*", "i64", "u32", "u32", "u32*", "i64*")
def _bracketed(bits: Pointer, count: int, low: int, high: int, inside: Pointer, totals: Pointer) -> None:
    """Every number is stored; one that is outside is overwritten by the next, so that no branch has to be guessed."""
    above = 0
    for i in range(count):
        above += bits[i] > high
    width = np.uint32(high - low)
    found = 0
    for i in range(count):
        number = bits[i]
        inside[found] = number
        found += np.uint32(number - low) <= width
    totals[0] = above
    totals[1] = found


def bracketed(bits: NDArray[np.int32], low: int, high: int) -> tuple[int, NDArray[np.int32]]:
    """How many of these numbers, none negative, are above `high`; and those from `low` to `high`, in their order."""
    assert bits.flags.c_contiguous and bits.itemsize == 4
    inside = np.empty(bits.size + 1, np.int32)
    totals = np.empty(2, np.int64)
    _bracketed(address(bits), bits.size, low, high, address(inside), address(totals))
    return int(totals[0]), inside[: totals[1]]
