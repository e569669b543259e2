"""Divergences of the softmaxes of the rows of two tensors, in float64.

`exp` and `log` are made of IEEE operations in a fixed order, so that every processor gives the same bits. Those of
numpy depend on the instructions of a processor. Both err by less than 2 units in the last place.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import BF16, CODES, F16, largest_half, widened
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines

_LEAST = -700.0
"""exp of less is taken as exp of this, 10⁻³⁰⁴."""

_NEAR = -0.34, 0.34
"""exp of a number between these needs no power of 2."""

_SMALL = 256.0
"""Exponentials of numbers up to this size, and their sums, are normal numbers."""

_SMALL_BFLOAT16, _SMALL_FLOAT16 = 0x4380, 0x5C00  # the bits of 256

_ALIKE = 1 / 16
"""Up to this share of their sum, two numbers' difference gives the logarithm of their ratio by a short series."""

_INTEGER = 6755399441055744.0  # 1.5 · 2⁵²: the last bits of a number of this size are those of an integer
_INTEGER_BITS = 0x4338000000000000
_LOG2_E = 1.4426950408889634
_LN2_HIGH, _LN2_LOW = 6.93147180369123816490e-01, 1.90821492927058770002e-10
_HALF_ROOT_BITS = 0x3FE6A09E667F3BCD  # of √½


def _exp(x: np.float64) -> np.float64:
    """exp(x) of x < 700: 2ᵏ · exp(r) with |r| ≤ ln(2)/2."""
    x = np.float64(_LEAST) if x < _LEAST else x
    moved = np.float64(x * _LOG2_E + _INTEGER)
    k = moved - _INTEGER
    power = np.int64((moved.view(np.int64) + np.int64(1023)) << np.int64(52))
    return _exp_near((x - k * _LN2_HIGH) - k * _LN2_LOW) * power.view(np.float64)


def _exp_near(r: np.float64) -> np.float64:
    """exp(r) by the terms of Taylor's series up to r¹³."""
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
    return total * r + 1.0


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


def _alike(p: np.float64, q: np.float64) -> np.bool_:
    return abs(p - q) <= (p + q) * _ALIKE


def _log_of_ratio(p: np.float64, q: np.float64) -> np.float64:
    """log(p/q) = 2 · artanh(s), s = (p − q)/(p + q), of two numbers that are nearly alike: its series up to s¹³."""
    s = (p - q) / (p + q)
    z = s * s
    rest = z * (2 / 13) + (2 / 11)
    rest = z * rest + (2 / 9)
    rest = z * rest + (2 / 7)
    rest = z * rest + (2 / 5)
    rest = z * rest + (2 / 3)
    return s * (z * rest + 2.0)


def _sum(line: Pointer, count: int) -> np.float64:
    """Σ of so many numbers, which it overwrites: the second half is added to the first until one is left."""
    while count > 1:
        half = (count + 1) // 2
        for i in range(count - half):
            line[i] = line[i] + line[half + i]
        count = half
    return line[0]


def _greatest(line: Pointer, count: int) -> np.float64:
    """The greatest of so many numbers, which it overwrites."""
    while count > 1:
        half = (count + 1) // 2
        for i in range(count - half):
            line[i] = line[half + i] if line[half + i] > line[i] else line[i]
        count = half
    return line[0]


def _greatest_of(values: Pointer, count: int, lanes: Pointer) -> np.float64:
    """The greatest of so many numbers that is not NaN, or −∞."""
    width = min(BLOCK, count)
    for i in range(width):
        lanes[i] = -np.inf
    for first in range(0, count, BLOCK):
        for i in range(min(BLOCK, count - first)):
            lanes[i] = values[first + i] if values[first + i] > lanes[i] else lanes[i]
    return _greatest(lanes, width)


def _origin(
    code: int, halves: Pointer, words: Pointer, longs: Pointer, start: int, count: int, line: Pointer, lanes: Pointer
) -> np.float64:
    """The greatest of so many elements, or 0 where all are small: exponentials are taken of them less their origin."""
    if code <= F16 and largest_half(halves, start, count) <= (_SMALL_BFLOAT16 if code == BF16 else _SMALL_FLOAT16):
        return np.float64(0.0)
    widened(code, halves, words, longs, start, count, line)
    far = np.int64(0)
    for i in range(count):
        far += np.int64(not abs(line[i]) <= _SMALL)  # as NaN is
    return _greatest_of(line, count, lanes) if far else np.float64(0.0)


def _exponentials(
    code: int, halves: Pointer, words: Pointer, longs: Pointer, start: int, count: int, origin: np.float64,
    table: Pointer, line: Pointer,
) -> None:  # fmt: skip
    """Writes exp(x − origin) of so many elements to a line. The table has it of all halves, for origin 0."""
    if origin == 0.0 and code <= F16:
        for i in range(count):
            line[i] = table[halves[start + i]]
        return
    widened(code, halves, words, longs, start, count, line)
    for first in range(0, count, BLOCK):
        end = min(first + BLOCK, count)
        far = np.int64(0)
        for i in range(first, end):
            far += np.int64(not (line[i] - origin >= _NEAR[0] and line[i] - origin <= _NEAR[1]))
        if far:
            for i in range(first, end):
                line[i] = _exp(line[i] - origin)
        else:
            for i in range(first, end):
                line[i] = _exp_near(line[i] - origin)


def _sum_of(values: Pointer, count: int, lanes: Pointer) -> np.float64:
    """Σ of so many numbers, which stay."""
    width = min(BLOCK, count)
    for i in range(width):
        lanes[i] = 0.0
    for first in range(0, count, BLOCK):
        for i in range(min(BLOCK, count - first)):
            lanes[i] = lanes[i] + values[first + i]
    return _sum(lanes, width)


def _sum_of_terms(
    p: Pointer, q: Pointer, count: int, of_p: np.float64, of_q: np.float64, smoothing: float, lanes: Pointer
) -> np.float64:
    """Σ p · log(p/q), p and q being so many exponentials times `of_p` and `of_q`, raised by `smoothing`."""
    width = min(BLOCK, count)
    for i in range(width):
        lanes[i] = 0.0
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        far = np.int64(0)
        for i in range(size):
            one, other = p[first + i] * of_p + smoothing, q[first + i] * of_q + smoothing
            far += np.int64(not _alike(one, other))
            p[first + i], q[first + i] = one, other
        if far:
            for i in range(size):
                one, other = p[first + i], q[first + i]
                ratio = one / other
                log = _log_of_ratio(one, other) if _alike(one, other) else _log(ratio)
                lanes[i] = lanes[i] + one * (log + (ratio - ratio))  # `_log` loses a NaN
        else:
            for i in range(size):
                lanes[i] = lanes[i] + p[first + i] * _log_of_ratio(p[first + i], q[first + i])
    return _sum(lanes, width)


@kernel("u16**", "u32**", "u64**", "i64*", "i64", "i64", "i64", "i64", "f64", "f64**", "f64**", "f64*", "f64*")
def _divergences(
    halves: Pointer, words: Pointer, longs: Pointer, dtypes: Pointer, rows: int, row: int, start: int, unit: int,
    smoothing: float, tables: Pointer, lines: Pointer, of_parts: Pointer, sums: Pointer,
) -> None:  # fmt: skip
    """A row that lies in several units has so many parts, and its sums are those of its parts.

    A part of a parent is a line of exponentials. `of_parts` has the origin and the sum of the exponentials for each
    part, then both of each parent's row.
    """
    lanes = lines[2]
    for place in range(rows):
        begin = place * row
        until = unit - (start + begin) % unit  # the end of the first part
        for parent in range(2):
            code, half, word, long = dtypes[parent], halves[parent], words[parent], longs[parent]
            line, table, at, part, end = lines[parent], tables[parent], 4, 0, min(row, until)
            top = -np.inf
            while part < row:
                origin = _origin(code, half, word, long, begin + part, end - part, line, lanes)
                _exponentials(code, half, word, long, begin + part, end - part, origin, table, line)
                of_parts[at], of_parts[at + 1] = origin, _sum_of(line, end - part, lanes)
                top = max(top, origin)
                at, part, end = at + 2, end, min(row, end + unit)
            total = 0.0
            for each in range(4, at, 2):
                total += of_parts[each + 1] * _exp(of_parts[each] - top)
            of_parts[2 * parent], of_parts[2 * parent + 1] = top, 1 / total
        total = 0.0
        part, end = 0, min(row, until)
        while part < row:
            if end - part < row:
                for parent in range(2):
                    code, half, word, long = dtypes[parent], halves[parent], words[parent], longs[parent]
                    origin, table, line = of_parts[2 * parent], tables[parent], lines[parent]
                    _exponentials(code, half, word, long, begin + part, end - part, origin, table, line)
            total += _sum_of_terms(lines[0], lines[1], end - part, of_parts[1], of_parts[3], smoothing, lanes)
            part, end = end, min(row, end + unit)
        sums[place] = total


@kernel("i64", "u16*", "f64*")
def _exponentials_of_halves(code: int, halves: Pointer, table: Pointer) -> None:
    widened(code, halves, halves, halves, 0, 1 << 16, table)
    for i in range(1 << 16):
        table[i] = _exp(table[i]) if table[i] <= _SMALL else np.nan  # greater ones have another origin


@cache
def _table(code: int) -> NDArray[np.float64]:
    """exp of every number up to `_SMALL` of a dtype of two bytes, by its bits."""
    table, halves = np.empty(1 << 16), np.arange(1 << 16, dtype=np.uint16)
    _exponentials_of_halves(code, address(halves), address(table))
    return table


def divergences(model: Array, base: Array, row: int, *, start: int, unit: int, smoothing: float) -> NDArray[np.float64]:
    """For each row Σ p · log(p/q), p and q being the softmaxes of model and base, each raised by `smoothing` > 0.

    The elements are whole rows, and begin at `start` of their tensor. Sums of a row run from one multiple of `unit` to
    the next. A NaN or +∞ makes the divergence of its row NaN.
    """
    pair = [np.ascontiguousarray(each) for each in (model, base)]
    assert pair[0].size == pair[1].size and pair[0].size % row == 0
    found = np.empty(pair[0].size // row)
    of_parts = np.empty(4 + 2 * (row // unit + 2))
    lines, _memory = aligned_lines(3, 8 * max(BLOCK, min(row, unit)))
    codes = [CODES[each.dtype] for each in pair]
    dtypes, tables = np.array(codes, np.int64), [_table(code) if code <= F16 else np.empty(0) for code in codes]
    raw, of_tables = addresses(pair), addresses(tables)
    _divergences(
        *(*3 * (address(raw),), address(dtypes), found.size, row, start, unit, smoothing),
        *(address(of_tables), address(lines), address(of_parts), address(found)),
    )
    return found
