"""bfloat16 weights plus the scaled product of two thin matrices, whose sums are exact in float64 in any order."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import of_bfloat16, to_bfloat16
from workers.methods.kernels.memory import address, aligned_lines

_COLUMNS = 256
"""Columns at a time: so many of 16 rows of `right` stay in a core's fastest cache."""

TERMS = 4
"""The rank is a multiple of it; zeros fill it up."""


def add_low_rank(
    weights: NDArray[Any], left: NDArray[np.float64], right: NDArray[np.float64], scale: float, into: NDArray[Any]
) -> None:
    """Writes weights + scale · (left @ right), rounded to float32 and then to bfloat16, as numpy's casts are.

    `weights` and `into` are bfloat16 of (rows, columns), `left` of (rows, rank) and `right` of (rank, columns), all in
    C order. Every sum of products must be exact in float64.
    """
    rows, columns = weights.shape
    lines, memory = aligned_lines(2, 8 * _COLUMNS)
    where = (address(array) for array in (weights, left, right))
    _low_rank_sums(*where, scale, left.shape[1], rows, columns, address(into), int(lines[0]), int(lines[1]))
    del memory  # kept until here


@kernel("u16*", "f64*", "f64*", "f64", "i64", "i64", "i64", "u16*", "f64*", "f64*")
def _low_rank_sums(
    weights: Pointer,
    left: Pointer,
    right: Pointer,
    scale: float,
    rank: int,
    rows: int,
    columns: int,
    into: Pointer,
    one: Pointer,
    two: Pointer,
) -> None:
    """Two rows at a time, the last one twice if their number is odd; `rank` is a multiple of `TERMS`."""
    for start in range(0, columns, _COLUMNS):
        size = min(_COLUMNS, columns - start)
        for row in range(0, rows, 2):
            other = min(row + 1, rows - 1)
            for i in range(size):
                one[i] = 0.0
                two[i] = 0.0
            for term in range(0, rank, TERMS):
                at = term * columns + start
                _add_terms(left, row * rank + term, other * rank + term, right, at, columns, size, one, two)
            _round(weights, row * columns + start, one, scale, size, into)
            _round(weights, other * columns + start, two, scale, size, into)


def _add_terms(
    left: Pointer, row: int, other: int, right: Pointer, at: int, columns: int, size: int, one: Pointer, two: Pointer
) -> None:
    a, b, c, d = left[row], left[row + 1], left[row + 2], left[row + 3]
    e, f, g, h = left[other], left[other + 1], left[other + 2], left[other + 3]
    for i in range(size):
        w, x = right[at + i], right[at + columns + i]
        y, z = right[at + 2 * columns + i], right[at + 3 * columns + i]
        one[i] = one[i] + ((a * w + b * x) + (c * y + d * z))
        two[i] = two[i] + ((e * w + f * x) + (g * y + h * z))


def _round(weights: Pointer, at: int, line: Pointer, scale: float, size: int, into: Pointer) -> None:
    """A NaN keeps its sign and loses the rest, as in numpy's casts."""
    for i in range(size):
        half = weights[at + i]
        value = np.float32(line[i] * scale + np.float64(of_bfloat16(half)))
        nan = np.uint16(np.uint32(half & np.uint16(0x8000)) | np.uint32(0x7FC0))
        into[at + i] = to_bfloat16(value) if value == value else nan
