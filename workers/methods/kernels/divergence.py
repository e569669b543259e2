"""Softmaxes of the rows of a tensor, and their divergences, in float64.

`exp` and `log` are made of IEEE operations in a fixed order, so that every processor gives the same bits. Those of
numpy depend on the instructions of a processor. Both err by less than 2 units in the last place.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import CODES, widened
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines

_LEAST = -700.0
"""exp of less is taken as exp of this, 10⁻³⁰⁴."""

_INTEGER = 6755399441055744.0  # 1.5 · 2⁵²: the last bits of a number of this size are those of an integer
_INTEGER_BITS = 0x4338000000000000
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_HALF_ROOT_BITS = 0x3FE6A09E667F3BCD  # of √½


def _exp(x: np.float64) -> np.float64:
    """exp(x) of x ≤ 0: 2ᵏ · exp(r) with |r| ≤ ln(2)/2, by the terms of Taylor's series up to r¹³."""
    x = np.float64(_LEAST) if x < _LEAST else x
    moved = np.float64(x * _LOG2_E + _INTEGER)
    k = moved - _INTEGER
    r = (x - k * _LN2_HIGH) - k * _LN2_LOW
    total = r * (1 / 6227020800) + (1 / 479001600)
    total = total * r + (1 / 39916800)
    total = total * r + (1 / 3628800)
    total = total * r + (1 / 362880)
    total = total * r + (1 / 40320)
    total = total * r + (1 / 5040)
    total = total * r + (1 / 720)
    total = total * r + (1 / 120)
    total = total * r + (1 / 24)
    total = total * r + (1 / 6)
    total = total * r + 0.5
    total = total * r + 1.0
    total = total * r + 1.0
    power = np.int64((moved.view(np.int64) + np.int64(1023)) << np.int64(52))
    return total * power.view(np.float64)


def _log(x: np.float64) -> np.float64:
    """log(x) of a normal x > 0: k · ln 2 + log(1 + f) with 1 + f between √½ and √2, as in the fdlibm of Sun."""
    bits = np.float64(x).view(np.int64)
    k = np.int64((bits - np.int64(_HALF_ROOT_BITS)) >> np.int64(52))
    f = np.int64(bits - np.int64(k << np.int64(52))).view(np.float64) - 1.0
    power = np.int64(k + np.int64(_INTEGER_BITS)).view(np.float64) - _INTEGER
    s = f / (2.0 + f)
    z = s * s
    rest = z * 1.479819860511658591e-01 + 1.531383769920937332e-01
    rest = z * rest + 1.818357216161805012e-01
    rest = z * rest + 2.222219843214978396e-01
    rest = z * rest + 2.857142874366239149e-01
    rest = z * rest + 3.999999999940941908e-01
    rest = z * rest + 6.666666666666735130e-01
    half = 0.5 * f * f
    return power * _LN2_HIGH - ((half - (s * (half + z * rest) + power * _LN2_LOW)) - f)


def _sum(line: Pointer, count: int) -> np.float64:
    """Σ of so many numbers, which it overwrites: the second half is added to the first until one is left."""
    while count > 1:
        half = (count + 1) // 2
        for i in range(count - half):
            line[i] = line[i] + line[half + i]
        count = half
    return line[0]


@kernel("u16*", "u32*", "u64*", "i64", "i64", "i64", "i64", "f64**", "f64*", "f64*")
def _softmaxes(
    halves: Pointer, words: Pointer, longs: Pointer, code: int, count: int, column: int, row: int, lines: Pointer,
    greatest: Pointer, sums: Pointer,
) -> None:  # fmt: skip
    values, of_row = lines[0], lines[1]
    begin, place = 0, 0
    while begin < count:
        end = min(count, begin + row - column)
        width = min(BLOCK, end - begin)
        for i in range(width):
            of_row[i] = -np.inf
        for first in range(begin, end, BLOCK):
            size = min(BLOCK, end - first)
            widened(code, halves, words, longs, first, size, values)
            for i in range(size):
                of_row[i] = values[i] if values[i] > of_row[i] else of_row[i]
        top = of_row[0]
        for i in range(width):
            top = max(top, of_row[i])
        for i in range(width):
            of_row[i] = 0.0
        for first in range(begin, end, BLOCK):
            size = min(BLOCK, end - first)
            widened(code, halves, words, longs, first, size, values)
            for i in range(size):
                of_row[i] = of_row[i] + _exp(values[i] - top)
        greatest[place] = top
        sums[place] = _sum(of_row, width)
        begin, place, column = end, place + 1, 0


def softmaxes(elements: Array, row: int, column: int) -> NDArray[np.float64]:
    """Two lines with a number for each row: its greatest element m, and Σ exp(x − m).

    The elements begin in a `column` of their first row; an incomplete row is taken as far as it is there. A NaN or +∞
    makes the sum of its row NaN.
    """
    values = np.ascontiguousarray(elements)
    found = np.empty((2, -(-(column + values.size) // row)))
    lines, _memory = aligned_lines(2, 8 * BLOCK)
    at = address(values)
    _softmaxes(
        *(at, at, at, CODES[values.dtype], values.size, column, row),
        *(address(lines), address(found[0]), address(found[1])),
    )
    return found


@kernel("f64*", "i64")
def _exponentials(values: Pointer, count: int) -> None:
    for i in range(count):
        values[i] = _exp(values[i])


def exponentials(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """exp of numbers ≤ 0, and at least exp(−700)."""
    found = np.array(values, np.float64, order="C")
    _exponentials(address(found), found.size)
    return found


@kernel(
    *("u16**", "u32**", "u64**", "i64*", "i64", "i64", "i64"),
    *("f64*", "f64*", "f64*", "f64*", "f64", "f64**", "f64*"),
)
def _divergences(
    halves: Pointer, words: Pointer, longs: Pointer, dtypes: Pointer, count: int, column: int, row: int,
    tops: Pointer, shares: Pointer, base_tops: Pointer, base_shares: Pointer, smoothing: float, lines: Pointer,
    sums: Pointer,
) -> None:  # fmt: skip
    p, q, of_row = lines[0], lines[1], lines[2]
    begin, place = 0, 0
    while begin < count:
        end = min(count, begin + row - column)
        width = min(BLOCK, end - begin)
        for i in range(width):
            of_row[i] = 0.0
        for first in range(begin, end, BLOCK):
            size = min(BLOCK, end - first)
            for parent in range(2):
                code, line = dtypes[parent], lines[parent]
                widened(code, halves[parent], words[parent], longs[parent], first, size, line)
            top, share = tops[place], shares[place]
            for i in range(size):
                p[i] = _exp(p[i] - top) * share + smoothing
            top, share = base_tops[place], base_shares[place]
            for i in range(size):
                q[i] = _exp(q[i] - top) * share + smoothing
            for i in range(size):
                ratio = p[i] / q[i]
                of_row[i] = of_row[i] + p[i] * (_log(ratio) + (ratio - ratio))  # `_log` loses a NaN
        sums[place] = _sum(of_row, width)
        begin, place, column = end, place + 1, 0


def divergences(
    model: Array,
    base: Array,
    of_model: NDArray[np.float64],
    of_base: NDArray[np.float64],
    row: int,
    column: int,
    smoothing: float,
) -> NDArray[np.float64]:
    """For each row Σ p · log(p/q), p and q being the softmaxes of model and base, each raised by `smoothing` > 0.

    `of_model` and `of_base` are the `softmaxes` of the whole rows; the elements begin in a `column` of the first.
    """
    pair = [np.ascontiguousarray(each) for each in (model, base)]
    rows = -(-(column + pair[0].size) // row)
    assert pair[0].size == pair[1].size and of_model.shape == of_base.shape == (2, rows)
    found = np.empty(rows)
    tops = [np.ascontiguousarray(each[0]) for each in (of_model, of_base)]
    shares = [1 / each[1] for each in (of_model, of_base)]
    lines, _memory = aligned_lines(3, 8 * BLOCK)
    raw, dtypes = addresses(pair), np.array([CODES[each.dtype] for each in pair], np.int64)
    _divergences(
        *(*3 * (address(raw),), address(dtypes), pair[0].size, column, row),
        *(address(tops[0]), address(shares[0]), address(tops[1]), address(shares[1]), smoothing),
        *(address(lines), address(found)),
    )
    return found


@kernel("u16**", "u32**", "u64**", "i64*", "i64", "i64", "f64", "f64**", "f64*")
def _row_divergences(
    halves: Pointer, words: Pointer, longs: Pointer, dtypes: Pointer, rows: int, row: int, smoothing: float,
    lines: Pointer, sums: Pointer,
) -> None:  # fmt: skip
    p, q, of_row = lines[0], lines[1], lines[2]
    width = min(BLOCK, row)
    for place in range(rows):
        for parent in range(2):
            line = lines[parent]
            widened(dtypes[parent], halves[parent], words[parent], longs[parent], place * row, row, line)
            for i in range(width):
                of_row[i] = -np.inf
            for first in range(0, row, BLOCK):
                for i in range(min(BLOCK, row - first)):
                    of_row[i] = line[first + i] if line[first + i] > of_row[i] else of_row[i]
            top = of_row[0]
            for i in range(width):
                top = max(top, of_row[i])
            for i in range(width):
                of_row[i] = 0.0
            for first in range(0, row, BLOCK):
                for i in range(min(BLOCK, row - first)):
                    line[first + i] = _exp(line[first + i] - top)
                    of_row[i] = of_row[i] + line[first + i]
            share = 1 / _sum(of_row, width)
            for i in range(row):
                line[i] = line[i] * share + smoothing
        for i in range(width):
            of_row[i] = 0.0
        for first in range(0, row, BLOCK):
            for i in range(min(BLOCK, row - first)):
                ratio = p[first + i] / q[first + i]
                of_row[i] = of_row[i] + p[first + i] * (_log(ratio) + (ratio - ratio))
        sums[place] = _sum(of_row, width)


def row_divergences(model: Array, base: Array, row: int, smoothing: float) -> NDArray[np.float64]:
    """The `divergences` of whole rows, in fewer steps to the same bits: an exponential is computed once."""
    pair = [np.ascontiguousarray(each) for each in (model, base)]
    assert pair[0].size == pair[1].size and pair[0].size % row == 0
    found = np.empty(pair[0].size // row)
    lines, _memory = aligned_lines(3, 8 * max(BLOCK, row))
    raw, dtypes = addresses(pair), np.array([CODES[each.dtype] for each in pair], np.int64)
    _row_divergences(
        *(*3 * (address(raw),), address(dtypes), found.size, row, smoothing, address(lines), address(found))
    )
    return found
