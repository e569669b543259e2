"""Magnitudes of task vectors as integers in the same order: those in a bracket, and their ranks in the rows."""

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


_DIGITS, _VALUES = 4, 256


@kernel("u32*", "i64", "i64", "u32*", "u64*", "u64*", "i64*")
def _row_ranks(
    bits: Pointer, rows: int, row: int, ranks: Pointer, one: Pointer, other: Pointer, counts: Pointer
) -> None:
    """Sorts each row by its bytes from the lowest to the highest, each time keeping the order of equals.

    A number to sort has the magnitude in its upper half and the place in the row in its lower. A byte that is the same
    in the whole row is skipped.
    """
    for first in range(0, rows * row, row):
        for value in range(_DIGITS * _VALUES):
            counts[value] = 0
        for i in range(row):
            number = bits[first + i]
            counts[number & np.uint32(0xFF)] += 1
            counts[_VALUES + ((number >> np.uint32(8)) & np.uint32(0xFF))] += 1
            counts[2 * _VALUES + ((number >> np.uint32(16)) & np.uint32(0xFF))] += 1
            counts[3 * _VALUES + (number >> np.uint32(24))] += 1
            one[i] = (np.uint64(number) << np.uint64(32)) | np.uint64(i)
        for digit in range(_DIGITS):
            shift = np.uint64(32 + 8 * digit)
            of_digit = digit * _VALUES
            if counts[of_digit + ((one[0] >> shift) & np.uint64(0xFF))] == row:
                continue
            before = 0
            for value in range(of_digit, of_digit + _VALUES):
                count = counts[value]
                counts[value] = before
                before += count
            for i in range(row):
                number = one[i]
                value = of_digit + ((number >> shift) & np.uint64(0xFF))
                other[counts[value]] = number
                counts[value] += 1
            one, other = other, one
        for i in range(row):
            ranks[first + (one[i] & np.uint64(0xFFFFFFFF))] = i


def row_ranks(bits: NDArray[np.int32], row: int) -> NDArray[np.uint32]:
    """For each element of whole rows: how many of its row are smaller, or equal and before it. None is negative."""
    assert bits.flags.c_contiguous and bits.itemsize == 4 and bits.size % row == 0
    ranks = np.empty(bits.size, np.uint32)
    one, other = np.empty((2, row), np.uint64)
    counts = np.empty(_DIGITS * _VALUES, np.int64)
    _row_ranks(
        *(address(bits), bits.size // row, row, address(ranks)), *(address(one), address(other), address(counts))
    )
    return ranks


@kernel("u32*", "u32*", "u32*", "i64", "u8*")
def _below(numbers: Pointer, ranks: Pointer, limits: Pointer, count: int, mask: Pointer) -> None:
    for i in range(count):
        mask[i] = numbers[i] < limits[ranks[i]]


def below_limits(
    numbers: NDArray[np.uint32], ranks: NDArray[np.uint32], limits: NDArray[np.uint32]
) -> NDArray[np.bool_]:
    """Which numbers are below the limit of their rank."""
    assert all(each.flags.c_contiguous and each.itemsize == 4 for each in (numbers, ranks, limits))
    assert numbers.size == ranks.size
    mask = np.empty(numbers.size, np.bool_)
    _below(address(numbers), address(ranks), address(limits), numbers.size, address(mask))
    return mask
