"""a · a, a · b and b · b of two vectors of bfloat16 by the tree of `unit_sums`, in float64, without lines of parents.

A word of memory has two elements. A row of sums has those of the first elements of words, then those of the second; the
tree joins both halves last. So every sum has the bits of `unit_sums`, in 0.6 of its time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import higher, lower
from workers.methods.kernels.memory import Array, address, aligned_lines

WIDTH = 256
"""Elements of a row: the lines and sums of four rows stay in a core's first cache. A constant, for the compiler."""

_HALF = WIDTH // 2
_LINES = 3 * WIDTH
"""Where in its memory a kernel has the four rows of `a`, and behind them those of `b`; first are the three sums."""

LEAST_UNIT = 8 * WIDTH
"""Elements of a unit at least: it begins with eight rows that are joined."""


@kernel("u32*", "u32*", "u32*", "i64", "i64", "i64", "f64*", "f64*", "f64*")
def short_products(
    a: Pointer,
    b: Pointer,
    base: Pointer,
    has_base: int,
    elements: int,
    unit: int,
    lines: Pointer,
    sums: Pointer,
    results: Pointer,
) -> None:
    """For each unit the three sums. `sums` has a row for each open sum of each product."""
    groups = unit // WIDTH // 4
    bits = 0
    while 1 << bits < groups:
        bits += 1
    for first in range(0, elements, unit):
        size = min(unit, elements - first)
        largest = max(_fetched(a, first, size), _fetched(b, first, size))
        if has_base:
            largest = max(largest, _fetched(base, first, size))
        results[first // unit * 3] = largest  # the reading has a result, so that the compiler keeps it
        for group in range(groups):
            row = reversed_bits(group, bits)
            for part in range(4):
                start = first + (row + (2 * (part % 2) + part // 2) * groups) * WIDTH
                count = max(0, min(WIDTH, elements - start)) // 2
                at = _LINES + part * WIDTH
                if has_base:
                    _differences(a, b, base, start // 2, count, lines, at)
                else:
                    _numbers(a, b, start // 2, count, lines, at)
            if group % 2 == 0:
                _products(lines)
                continue
            _more_products(lines)
            carries = ones_below(group // 2)
            for product in range(3):
                _carry(lines, product * WIDTH, sums, product * bits * WIDTH, carries)
        for product in range(3):
            results[first // unit * 3 + product] = _folded(sums, (product * bits + bits - 1) * WIDTH)


def _fetched(words: Pointer, start: int, count: int) -> np.uint32:
    """Reads a unit in its order, which brings it into a cache at the speed of memory."""
    largest = np.uint32(0)
    for i in range(start // 2, (start + count) // 2):
        largest = max(largest, words[i])
    return largest


def reversed_bits(number: int, bits: int) -> int:
    """The number whose lowest `bits` bits are in the opposite order."""
    result = 0
    for bit in range(bits):
        result |= ((number >> bit) & 1) << (bits - 1 - bit)
    return result


def ones_below(number: int) -> int:
    """How many of the lowest bits are 1 before the first 0: so many open sums are joined."""
    ones = 0
    while (number >> ones) & 1:
        ones += 1
    return ones


def _differences(a: Pointer, b: Pointer, base: Pointer, start: int, count: int, lines: Pointer, at: int) -> None:
    """A row of a − base and of b − base, from words, with zeros behind them."""
    if count < _HALF:
        _cleared(lines, at)
    for i in range(count):
        x, y, z = a[start + i], b[start + i], base[start + i]
        low, high = np.float64(lower(z)), np.float64(higher(z))
        lines[at + i] = np.float64(lower(x)) - low
        lines[at + _HALF + i] = np.float64(higher(x)) - high
        lines[at + 4 * WIDTH + i] = np.float64(lower(y)) - low
        lines[at + 4 * WIDTH + _HALF + i] = np.float64(higher(y)) - high


def _numbers(a: Pointer, b: Pointer, start: int, count: int, lines: Pointer, at: int) -> None:
    """A row of a and of b, from words, with zeros behind them."""
    if count < _HALF:
        _cleared(lines, at)
    for i in range(count):
        x, y = a[start + i], b[start + i]
        lines[at + i] = lower(x)
        lines[at + _HALF + i] = higher(x)
        lines[at + 4 * WIDTH + i] = lower(y)
        lines[at + 4 * WIDTH + _HALF + i] = higher(y)


def _cleared(lines: Pointer, at: int) -> None:
    for i in range(WIDTH):
        lines[at + i] = 0.0
        lines[at + 4 * WIDTH + i] = 0.0


def _products(lines: Pointer) -> None:
    """The three products of four rows of each, added by the first two steps of the tree."""
    for i in range(WIDTH):
        a, b, c, d = lines[3 * WIDTH + i], lines[4 * WIDTH + i], lines[5 * WIDTH + i], lines[6 * WIDTH + i]
        e, f, g, h = lines[7 * WIDTH + i], lines[8 * WIDTH + i], lines[9 * WIDTH + i], lines[10 * WIDTH + i]
        lines[i] = (a * a + b * b) + (c * c + d * d)
        lines[WIDTH + i] = (a * e + b * f) + (c * g + d * h)
        lines[2 * WIDTH + i] = (e * e + f * f) + (g * g + h * h)


def _more_products(lines: Pointer) -> None:
    """The same of the next four rows, added to those before."""
    for i in range(WIDTH):
        a, b, c, d = lines[3 * WIDTH + i], lines[4 * WIDTH + i], lines[5 * WIDTH + i], lines[6 * WIDTH + i]
        e, f, g, h = lines[7 * WIDTH + i], lines[8 * WIDTH + i], lines[9 * WIDTH + i], lines[10 * WIDTH + i]
        lines[i] += (a * a + b * b) + (c * c + d * d)
        lines[WIDTH + i] += (a * e + b * f) + (c * g + d * h)
        lines[2 * WIDTH + i] += (e * e + f * f) + (g * g + h * h)


def _carry(lines: Pointer, at: int, sums: Pointer, opened: int, carries: int) -> None:
    """Joins a row of sums with so many open ones, the youngest first, and opens the result."""
    for level in range(carries):
        for i in range(WIDTH):
            lines[at + i] += sums[opened + level * WIDTH + i]
    for i in range(WIDTH):
        sums[opened + carries * WIDTH + i] = lines[at + i]


def _folded(sums: Pointer, at: int) -> np.float64:
    """The sum of a row: both halves by halves, then one with the other."""
    half = _HALF // 2
    while half:
        for i in range(half):
            sums[at + i] += sums[at + half + i]
            sums[at + _HALF + i] += sums[at + _HALF + half + i]
        half //= 2
    return sums[at] + sums[at + _HALF]


def products_of_two(a: Array, b: Array, base: Array | None = None, *, unit: int) -> NDArray[np.float64]:
    """a · a, a · b and b · b (second axis) of each unit (first axis); a − base and b − base where there is a base.

    All are pairs of bfloat16 and of one size, and a unit has at least `LEAST_UNIT`. The arithmetic is float64.
    """
    assert unit >= LEAST_UNIT and unit & (unit - 1) == 0
    assert all(each is None or (each.size == a.size and each.flags.c_contiguous) for each in (a, b, base))
    levels = (unit // LEAST_UNIT).bit_length()
    lines, _memory = aligned_lines(1, 8 * 11 * WIDTH)
    sums, _more_memory = aligned_lines(1, 8 * 3 * levels * WIDTH)
    results = np.empty((-(-a.size // unit), 3))
    short_products(
        *(address(a), address(b), address(a if base is None else base), base is not None, a.size, unit),
        *(int(lines[0]), int(sums[0]), address(results)),
    )
    return results
