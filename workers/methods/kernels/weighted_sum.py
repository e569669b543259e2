"""Weighted sums of parents or of task vectors for all points at once: every parent's element is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import CODES, any_nonfinite, rounded, widened
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines, are_pairs
from workers.methods.kernels.relaxation import RELAXES, REPEATS, Relaxation, Relaxations, relaxed
from workers.methods.kernels.short_sum import short_sums

SCALAR, OF_ROW, OF_COLUMN = range(3)
_KINDS = {"tensor": SCALAR, "rows": OF_ROW, "columns": OF_COLUMN}


def _weighted_sums(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    parents: int,
    pairs: Pointer,
    deltas: int,
    points: int,
    bases: Pointer,
    ends: Pointer,
    terms: Pointer,
    coefficients: Pointer,
    modes: Pointer,
    factors: Pointer,
    width: int,
    stride: int,
    block: int,
    row: int,
    start: int,
    count: int,
    out_halves: Pointer,
    out_words: Pointer,
    out_longs: Pointer,
    out_dtype: int,
    broken_parents: Pointer,
    broken_points: Pointer,
    lines: Pointer,
    total: Pointer,
    relaxed_total: Pointer,
    spread: Pointer,
) -> None:
    """For each block: every parent as a line of numbers, then every delta, then every point's sum, rounded once.

    `pairs` holds (line, line of the base) of each delta, and `terms` (line, kind of coefficients, index of the first,
    their number) of each term of all points; point p has those up to `ends[p]`, and adds line `bases[p]` at last unless
    that is −1. A point that `REPEATS` has the sum of the one before; one that `RELAXES` has an entry in `factors`.
    """
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        for parent in range(parents):
            code, half, word, long = dtypes[parent], halves[parent], words[parent], longs[parent]
            widened(code, half, word, long, first, size, lines[parent])
        for delta in range(deltas):
            _subtract(lines[pairs[2 * delta]], lines[pairs[2 * delta + 1]], lines[parents + delta], size)
        term = 0
        broken = False
        for point in range(points):
            opening = True
            if modes[point] & REPEATS:
                term = ends[point]
            while term < ends[point]:
                line, kind, index = lines[terms[4 * term]], terms[4 * term + 1], terms[4 * term + 2]
                if kind == SCALAR:
                    _add_scaled(opening, line, coefficients[index], total, size)
                else:
                    length = row if kind == OF_ROW else terms[4 * term + 3]
                    _spread(kind, coefficients, index, length, start + first, size, spread)
                    _add_product(opening, line, spread, total, size)
                opening = False
                term += 1
            if bases[point] >= 0 and not modes[point] & REPEATS:
                _add(lines[bases[point]], total, size)
            half, word, long = out_halves[point], out_words[point], out_longs[point]
            if modes[point] & RELAXES:
                base, own = lines[bases[point]], factors[point]
                relaxed(base, total, own, width, stride, block, start + first, size, relaxed_total)
                found = rounded(out_dtype, relaxed_total, size, half, word, long, first)
            else:
                found = rounded(out_dtype, total, size, half, word, long, first)
            if found:
                broken_points[point] = 1
                broken = True
        if broken:  # an element of a parent that is NaN or infinite makes the sums so in which it takes part
            for parent in range(parents):
                if any_nonfinite(dtypes[parent], halves[parent], words[parent], longs[parent], first, size):
                    broken_parents[parent] = 1


def _subtract(a: Pointer, b: Pointer, into: Pointer, count: int) -> None:
    for i in range(count):
        into[i] = a[i] - b[i]


def _add(a: Pointer, total: Pointer, count: int) -> None:
    for i in range(count):
        total[i] = a[i] + total[i]


def _add_scaled(opening: bool, line: Pointer, factor: float, total: Pointer, count: int) -> None:
    if opening:
        for i in range(count):
            total[i] = line[i] * factor
    else:
        for i in range(count):
            total[i] = total[i] + line[i] * factor


def _add_product(opening: bool, line: Pointer, factors: Pointer, total: Pointer, count: int) -> None:
    if opening:
        for i in range(count):
            total[i] = line[i] * factors[i]
    else:
        for i in range(count):
            total[i] = total[i] + line[i] * factors[i]


def _spread(kind: int, coefficients: Pointer, index: int, row: int, start: int, count: int, factors: Pointer) -> None:
    """The coefficient of each element from `start` of the tensor on, given one for each row or each column."""
    at = 0
    while at < count:
        column = (start + at) % row
        stretch = min(row - column, count - at)
        if kind == OF_ROW:
            factor = coefficients[index + (start + at) // row]
            for i in range(stretch):
                factors[at + i] = factor
        else:
            for i in range(stretch):
                factors[at + i] = coefficients[index + column + i]
        at += stretch


_TENSORS = ("u16**", "u32**", "u64**")
_KERNELS = {
    name: kernel(
        *(*_TENSORS, "i64*", "i64", "i64*", "i64"),
        *("i64", "i64*", "i64*", "i64*", f"{short}*"),
        *("i64*", f"{short}**", "i64", "i64", "i64", "i64", "i64", "i64"),
        *(*_TENSORS, "i64", "u8*", "u8*", f"{short}**", f"{short}*", f"{short}*", f"{short}*"),
    )(_weighted_sums)
    for name, short in (("float32", "f32"), ("float64", "f64"))
}


@dataclass(frozen=True, slots=True)
class Sum:
    """One point: Σ cᵢ·xᵢ over (parent, coefficient), or base + Σ cᵢ·(xᵢ − base) with a base.

    Parents are places in a list. A coefficient is a number, or an array with one number for each row or each column.
    With `repeats`, the sum before its relaxation is that of the point before.
    """

    terms: tuple[tuple[int, float | Array], ...]
    base: int | None = None
    along: Literal["tensor", "rows", "columns"] = "tensor"
    relaxation: Relaxation | None = None
    repeats: bool = False


def _is_short(each: Sum) -> bool:
    """Whether `short_sums` has a loop for it."""
    numbers = each.relaxation is None and all(np.ndim(coefficient) == 0 for _, coefficient in each.terms)
    return numbers and (len(each.terms) == 2 or (len(each.terms) == 1 and each.base is not None))


class WeightedSums:
    """The sums of all points over the same parents, in float32 or float64 arithmetic, from left to right."""

    def __init__(self, parents: int, sums: Sequence[Sum], arithmetic: str) -> None:
        pairs: dict[tuple[int, int], int] = {}
        terms: list[tuple[int, int, int, int]] = []
        numbers: list[Array] = [np.zeros(0)]
        ends: list[int] = []
        index = 0
        for each in sums:
            for parent, coefficient in each.terms:
                line = parent
                if each.base is not None:
                    line = parents + pairs.setdefault((parent, each.base), len(pairs))
                of_term = np.atleast_1d(np.asarray(coefficient, np.float64))
                terms.append((line, SCALAR if of_term.size == 1 else _KINDS[each.along], index, of_term.size))
                numbers.append(of_term)
                index += of_term.size
            ends.append(len(terms))
        self._arithmetic = np.dtype(arithmetic)
        self._kernel = _KERNELS[arithmetic]
        self._parents, self._lines = parents, parents + len(pairs)
        self._pairs = np.array([*pairs], np.int64)
        self._bases = np.array([-1 if each.base is None else each.base for each in sums], np.int64)
        self._ends, self._terms = np.array(ends, np.int64), np.array(terms, np.int64)
        self._numbers = np.concatenate(numbers).astype(self._arithmetic)
        self._short = arithmetic == "float32" and all(_is_short(each) for each in sums)
        self._relaxations = Relaxations([(each.relaxation, each.repeats) for each in sums], self._arithmetic)
        self._models = np.array([parent for each in sums for parent, _ in each.terms], np.int64)
        self._of_pairs, self._of_bases = address(self._pairs), address(self._bases)
        self._of_ends, self._of_terms = address(self._ends), address(self._terms)
        self._of_numbers, self._of_models = address(self._numbers), address(self._models)

    def run(
        self, parents: Sequence[Array], outputs: Sequence[Array], *, start: int = 0, row: int = 1
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Writes every point's elements, each rounded once: `outputs` are of one dtype and as long as each parent.

        No output overlaps a parent. The elements begin at `start` of a tensor whose rows have `row` elements. Returns
        for each parent, and for each output, whether any element is NaN or infinite.
        """
        elements = len(parents[0])
        assert len(parents) == self._parents and len(outputs) == len(self._bases)
        assert all(each.size == elements and each.flags.c_contiguous for each in (*parents, *outputs))
        broken = np.zeros(len(parents), np.bool_), np.zeros(len(outputs), np.bool_)
        arrays = *parents, *outputs
        places = addresses(arrays)
        raw_at = address(places)
        out_at = raw_at + len(parents) * places.itemsize
        if self._short and are_pairs(arrays, places):
            short_sums(
                *(raw_at, len(outputs), self._of_bases, self._of_ends, self._of_models),
                *(self._of_numbers, elements // 2, out_at, address(broken[1])),
            )
            if not broken[1].any():
                return broken
            broken[1][:] = False
        lines, _memory = aligned_lines(self._lines + 3, BLOCK * self._arithmetic.itemsize)
        dtypes = np.array([CODES[each.dtype] for each in parents], np.int64)
        self._kernel(
            *(raw_at, raw_at, raw_at, address(dtypes), self._parents),
            *(self._of_pairs, len(self._pairs), len(self._bases), self._of_bases),
            *(self._of_ends, self._of_terms, self._of_numbers),
            *(*self._relaxations.arguments, row, start, elements),
            *(out_at, out_at, out_at, CODES[outputs[0].dtype]),
            *(address(broken[0]), address(broken[1]), address(lines)),
            *(int(lines[-3]), int(lines[-2]), int(lines[-1])),
        )
        return broken
