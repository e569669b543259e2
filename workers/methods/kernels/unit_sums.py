"""Sums of products and of magnitudes over units of a tensor, in float64, by one fixed tree of additions.

The tree adds the second half of a unit to its first, element by element, until one number is left. The kernel takes the
rows of that first half in an order in which few sums are open at a time: a row joins its partner as soon as both are
there, as carries do in a binary counter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import BF16, CODES, any_nonfinite, of_bfloat16, widened
from workers.methods.kernels.masks import Mask
from workers.methods.kernels.memory import Array, address, addresses, aligned_lines
from workers.methods.kernels.short_products import ones_below, reversed_bits

WIDTH = 512
"""Elements of a row at most: the open sums of one product stay in a core's second cache."""

LINES = {"float32": "f32**", "float64": "f64**"}

Operand = int | tuple[int, int]
"""A parent, or (a parent, the base that is subtracted from it), as places in a list."""


@dataclass(frozen=True, slots=True)
class Product:
    """a · b, or |a| without b."""

    a: Operand
    b: Operand | None = None


def _unit_sums(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    parents: int,
    needed: Pointer,
    pairs: Pointer,
    deltas: int,
    products: Pointer,
    count: int,
    elements: int,
    unit: int,
    width: int,
    lines: Pointer,
    sums: Pointer,
    results: Pointer,
) -> None:
    """For each unit and each product (a line, another or −1): the sum.

    A unit is a matrix of rows of `width` elements. The first two additions of the tree join four rows; these are in
    memory together, as four parts of each parent's and each delta's line. `sums` has a row for what joins now, and one
    for each open sum, for each product. A parent that is not `needed` has no line: its deltas are those of bfloat16.
    """
    groups = unit // width // 4
    bits = 0
    while 1 << bits < groups:
        bits += 1
    for first in range(0, elements, unit):
        for parent in range(parents):
            if _seen(dtypes[parent], halves[parent], words[parent], longs[parent], first, min(unit, elements - first)):
                results[first // unit * count] = np.nan
        for group in range(groups):
            row = reversed_bits(group, bits)
            for part in range(4):
                start = first + (row + (2 * (part % 2) + part // 2) * groups) * width
                size = max(0, min(width, elements - start))
                for parent in range(parents):
                    if needed[parent]:
                        line, half, word, long = lines[4 * parent + part], halves[parent], words[parent], longs[parent]
                        _padded(dtypes[parent], half, word, long, start, size, line, width)
                for delta in range(deltas):
                    a, b, line = pairs[2 * delta], pairs[2 * delta + 1], lines[4 * (parents + delta) + part]
                    if needed[a] and needed[b]:
                        _subtracted(lines[4 * a + part], lines[4 * b + part], line, width)
                    else:
                        _differences(halves[a], halves[b], start, size, line, width)
            carries = ones_below(group)
            for product in range(count):
                a, b = 4 * products[2 * product], 4 * products[2 * product + 1]
                joining = product * (bits + 2) * width
                leaf = joining if carries else joining + width
                if b < 0:
                    _magnitudes(lines[a], lines[a + 1], lines[a + 2], lines[a + 3], sums, leaf, width)
                elif a == b:
                    _squares(lines[a], lines[a + 1], lines[a + 2], lines[a + 3], sums, leaf, width)
                else:
                    c, d = lines[b], lines[b + 1]
                    e, f = lines[b + 2], lines[b + 3]
                    _products(lines[a], lines[a + 1], lines[a + 2], lines[a + 3], c, d, e, f, sums, leaf, width)
                _join(sums, joining, carries, width)
        for product in range(count):
            results[first // unit * count + product] = _folded(sums, (product * (bits + 2) + bits + 1) * width, width)


def _kept_sums(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    squares: int,
    masks: Pointer,
    bits_of: Pointer,
    count: int,
    elements: int,
    unit: int,
    width: int,
    lines: Pointer,
    sizes: Pointer,
    sums: Pointer,
    results: Pointer,
) -> None:
    """For each unit and each mask: the sum of |model − base|, or of its square, times the mask.

    The tree and the order are those of `_unit_sums`. The words of masks go up to the end of the last unit.
    """
    groups = unit // width // 4
    bits = 0
    while 1 << bits < groups:
        bits += 1
    for first in range(0, elements, unit):
        for parent in range(2):
            if _seen(dtypes[parent], halves[parent], words[parent], longs[parent], first, min(unit, elements - first)):
                results[first // unit * count] = np.nan
        for group in range(groups):
            row = reversed_bits(group, bits)
            for part in range(4):
                start = first + (row + (2 * (part % 2) + part // 2) * groups) * width
                size = max(0, min(width, elements - start))
                for parent in range(2):
                    line, half, word, long = lines[4 * parent + part], halves[parent], words[parent], longs[parent]
                    _padded(dtypes[parent], half, word, long, start, size, line, width)
                _subtracted(lines[part], lines[4 + part], lines[part], width)
                _sizes(lines[part], sizes[part], squares, width)
            carries = ones_below(group)
            start = first + row * width
            for place in range(count):
                joining = place * (bits + 2) * width
                leaf = joining if carries else joining + width
                _kept(
                    sizes[0], sizes[1], sizes[2], sizes[3],
                    masks[place], bits_of[place],
                    start, start + 2 * groups * width, start + groups * width, start + 3 * groups * width,
                    sums, leaf, width,
                )  # fmt: skip
                _join(sums, joining, carries, width)
        for place in range(count):
            results[first // unit * count + place] = _folded(sums, (place * (bits + 2) + bits + 1) * width, width)


def _seen(code: int, halves: Pointer, words: Pointer, longs: Pointer, start: int, count: int) -> np.bool_:
    """Reads a unit in its order, which brings it into a cache at the speed of memory: is any number not finite?"""
    return any_nonfinite(code, halves, words, longs, start, count)


def _padded(
    code: int, halves: Pointer, words: Pointer, longs: Pointer, start: int, count: int, line: Pointer, width: int
) -> None:
    """A row of a parent in the line's dtype, with zeros behind its elements."""
    widened(code, halves, words, longs, start, count, line)
    for i in range(count, width):
        line[i] = 0.0


def _differences(model: Pointer, base: Pointer, start: int, count: int, line: Pointer, width: int) -> None:
    """A row of differences of bfloat16 numbers in the line's dtype, without lines of both, with zeros behind them."""
    for i in range(count):
        line[i] = of_bfloat16(model[start + i])
        line[i] -= of_bfloat16(base[start + i])
    for i in range(count, width):
        line[i] = 0.0


def _join(sums: Pointer, joining: int, carries: int, width: int) -> None:
    """Adds so many open sums, the youngest first, to the one that joins."""
    for level in range(1, carries):
        _add(sums, joining + level * width, joining, width)
    if carries:
        _added(sums, joining + carries * width, joining, joining + (carries + 1) * width, width)


def _folded(sums: Pointer, at: int, width: int) -> np.float64:
    """The sum of a row, by halves."""
    half = width // 2
    while half:
        for i in range(half):
            sums[at + i] = sums[at + i] + sums[at + half + i]
        half //= 2
    return sums[at]


def _subtracted(a: Pointer, b: Pointer, into: Pointer, count: int) -> None:
    for i in range(count):
        into[i] = a[i] - b[i]


def _products(
    a: Pointer, b: Pointer, c: Pointer, d: Pointer, e: Pointer, f: Pointer, g: Pointer, h: Pointer,
    sums: Pointer, at: int, count: int,
) -> None:  # fmt: skip
    for i in range(count):
        sums[at + i] = (np.float64(a[i]) * np.float64(e[i]) + np.float64(b[i]) * np.float64(f[i])) + (
            np.float64(c[i]) * np.float64(g[i]) + np.float64(d[i]) * np.float64(h[i])
        )


def _squares(a: Pointer, b: Pointer, c: Pointer, d: Pointer, sums: Pointer, at: int, count: int) -> None:
    for i in range(count):
        w, x, y, z = np.float64(a[i]), np.float64(b[i]), np.float64(c[i]), np.float64(d[i])
        sums[at + i] = (w * w + x * x) + (y * y + z * z)


def _sizes(line: Pointer, into: Pointer, squares: int, count: int) -> None:
    if squares:
        for i in range(count):
            into[i] = np.float64(line[i]) * np.float64(line[i])
    else:
        for i in range(count):
            into[i] = np.float64(abs(line[i]))


def _kept(
    a: Pointer, b: Pointer, c: Pointer, d: Pointer, words: Pointer, bit: np.uint16,
    of_a: int, of_b: int, of_c: int, of_d: int, sums: Pointer, at: int, count: int,
) -> None:  # fmt: skip
    for i in range(count):
        sums[at + i] = (
            a[i] * np.float64((words[of_a + i] & bit) != 0) + b[i] * np.float64((words[of_b + i] & bit) != 0)
        ) + (c[i] * np.float64((words[of_c + i] & bit) != 0) + d[i] * np.float64((words[of_d + i] & bit) != 0))


def _magnitudes(a: Pointer, b: Pointer, c: Pointer, d: Pointer, sums: Pointer, at: int, count: int) -> None:
    for i in range(count):
        sums[at + i] = (np.float64(abs(a[i])) + np.float64(abs(b[i]))) + (np.float64(abs(c[i])) + np.float64(abs(d[i])))


def _add(sums: Pointer, a: int, to: int, count: int) -> None:
    """In place: of one loop for both, the compiler would not use vectors where two of three rows are the same."""
    for i in range(count):
        sums[to + i] += sums[a + i]


def _added(sums: Pointer, a: int, b: int, into: int, count: int) -> None:
    for i in range(count):
        sums[into + i] = sums[a + i] + sums[b + i]


_UNIT_SUMS = {
    name: kernel(
        *("u16**", "u32**", "u64**", "i64*", "i64", "u8*", "i64*", "i64", "i64*", "i64"),
        *("i64", "i64", "i64", line, "f64*", "f64*"),
    )(_unit_sums)
    for name, line in LINES.items()
}
_KEPT_SUMS = {
    name: kernel(
        *("u16**", "u32**", "u64**", "i64*", "i64", "u16**", "u16*", "i64"),
        *("i64", "i64", "i64", line, "f64**", "f64*", "f64*"),
    )(_kept_sums)
    for name, line in LINES.items()
}
"""By the dtype of parents and of differences."""


def unit_sums(parents: Sequence[Array], products: Sequence[Product], *, unit: int, dtype: str) -> NDArray[np.float64]:
    """The sums of each unit (first axis) of the products (second axis).

    `unit` is a power of two, at least 4; zeros fill the last unit. Parents and differences are numbers of `dtype`,
    "float32" or "float64"; the products and the sums are float64.
    """
    places: dict[tuple[int, int], int] = {}

    def line(operand: Operand) -> int:
        return operand if isinstance(operand, int) else len(parents) + places.setdefault(operand, len(places))

    of_products = np.array([(line(each.a), -1 if each.b is None else line(each.b)) for each in products], np.int64)
    pairs = np.array([*places], np.int64)
    elements, width = parents[0].size, min(WIDTH, unit // 4)
    assert all(each.size == elements and each.flags.c_contiguous for each in parents)
    levels = (unit // width // 4).bit_length() + 1
    lines, _memory = aligned_lines(4 * (len(parents) + len(places)), np.dtype(dtype).itemsize * width)
    sums, _more_memory = aligned_lines(1, 8 * width * levels * len(products))
    results = np.empty((-(-elements // unit), len(products)))
    dtypes = np.array([CODES[each.dtype] for each in parents], np.int64)
    short = all(dtypes[list(pair)].tolist() == [BF16, BF16] for pair in places)
    alone = {each for product in products for each in (product.a, product.b) if isinstance(each, int)}
    needed = np.array([not (places and short) or place in alone for place in range(len(parents))], np.bool_)
    raw = addresses(parents)
    at = address(raw)
    _UNIT_SUMS[dtype](
        *(at, at, at, address(dtypes), len(parents), address(needed), address(pairs), len(places)),
        *(address(of_products), len(products), elements, unit, width, address(lines), int(sums[0]), address(results)),
    )
    return results


def kept_sums(
    model: Array, base: Array, masks: Sequence[Mask], *, squares: bool, unit: int, dtype: str
) -> NDArray[np.float64]:
    """For each unit (first axis) and each mask (second axis) Σ |model − base| · mask, or Σ (model − base)² · mask.

    `unit`, `dtype` and the order of the additions are those of `unit_sums`: a number that is not finite spoils the sum
    of its unit, kept or not.
    """
    pair = model, base
    elements, width = model.size, min(WIDTH, unit // 4)
    assert all(each.size == elements and each.flags.c_contiguous for each in (*pair, *(mask.words for mask in masks)))
    assert all(mask.words.dtype == np.uint16 for mask in masks)
    whole = {id(mask.words): mask.words for mask in masks}
    if elements % unit:
        whole = {key: np.pad(each, (0, -elements % unit)) for key, each in whole.items()}
    levels = (unit // width // 4).bit_length() + 1
    lines, _memory = aligned_lines(8, np.dtype(dtype).itemsize * width)
    sizes, _memory_of_sizes = aligned_lines(4, 8 * width)
    sums, _more_memory = aligned_lines(1, 8 * width * levels * len(masks))
    results = np.empty((-(-elements // unit), len(masks)))
    dtypes = np.array([CODES[each.dtype] for each in pair], np.int64)
    raw, of_masks = addresses(pair), addresses([whole[id(mask.words)] for mask in masks])
    bits = np.array([1 << mask.bit for mask in masks], np.uint16)
    at = address(raw)
    _KEPT_SUMS[dtype](
        *(at, at, at, address(dtypes), squares, address(of_masks), address(bits), len(masks)),
        *(elements, unit, width, address(lines), address(sizes), int(sums[0]), address(results)),
    )
    return results
