"""Products of matrices, and symmetric systems of equations, with the same bits on every processor.

Every sum runs in one order, whatever the rows that are computed together: over the terms in groups of four from the
first on, the rest one by one. BLAS has another order for each kind of processor and each number of threads.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.memory import address, aligned_lines

Matrix = NDArray[Any]

_COLUMNS = 256
"""Columns at a time: four rows of the sum and four of `right` stay in a core's fastest cache."""

_BLOCK = 64
"""Rows of a system that are solved by single steps: the others are joined to them by products."""


def add_product(left: Matrix, right: Matrix, into: Matrix) -> None:
    """into += left @ right, all float32 or all float64; the last axis of each lies in C order."""
    rows, columns = into.shape
    lines, memory = aligned_lines(4, _COLUMNS * into.itemsize)
    _PRODUCTS[into.dtype.name](
        *(number for each in (left, right, into) for number in (address(each), _stride(each))),
        *(rows, left.shape[1], columns, address(lines)),
    )
    del memory  # kept until here


def solved(matrix: NDArray[np.float64], right: NDArray[np.float64]) -> NDArray[np.float64]:
    """The solution X of matrix @ X = right, for a symmetric positive definite matrix, by Cholesky's factors in float64.

    A matrix that is not positive definite gives NaN.
    """
    upper, x = matrix.copy(), right.copy()
    size = len(upper)
    for first in range(0, size, _BLOCK):  # upper.T @ upper = matrix; upper.T @ y = right
        block = slice(first, min(first + _BLOCK, size))
        left = np.ascontiguousarray(-upper[:first, block].T)
        add_product(left, upper[:first, first:], upper[block, first:])
        _factor(address(upper[block, first:]), size, block.stop - first, size - first)
        add_product(left, x[:first], x[block])
        _substitute(address(upper[block, first:]), size, address(x[block]), x.shape[1], block.stop - first, 0)
    for first in range((size - 1) // _BLOCK * _BLOCK, -1, -_BLOCK):  # upper @ x = y
        block = slice(first, min(first + _BLOCK, size))
        add_product(-upper[block, block.stop :], x[block.stop :], x[block])
        _substitute(address(upper[block, first:]), size, address(x[block]), x.shape[1], block.stop - first, 1)
    return x


def _stride(matrix: Matrix) -> int:
    """Elements from one row to the next."""
    assert matrix.size <= 1 or matrix.shape[1] == 1 or matrix.strides[1] == matrix.itemsize, (
        "the elements of a row are neighbours"
    )
    return matrix.strides[0] // matrix.itemsize


def _add_product(
    left: Pointer,
    left_stride: int,
    right: Pointer,
    right_stride: int,
    into: Pointer,
    into_stride: int,
    rows: int,
    terms: int,
    columns: int,
    lines: Pointer,
) -> None:
    """Four rows at a time; the last one stands in for those that are missing, and is written again as it is."""
    one, two, three, four = lines[0], lines[1], lines[2], lines[3]
    for start in range(0, columns, _COLUMNS):
        size = min(_COLUMNS, columns - start)
        for row in range(0, rows, 4):
            a, b = row, min(row + 1, rows - 1)
            c, d = min(row + 2, rows - 1), min(row + 3, rows - 1)
            for i in range(size):
                one[i] = into[a * into_stride + start + i]
                two[i] = into[b * into_stride + start + i]
                three[i] = into[c * into_stride + start + i]
                four[i] = into[d * into_stride + start + i]
            whole = terms // 4 * 4
            for term in range(0, whole, 4):
                at = term * right_stride + start
                _add_four(
                    left, a * left_stride + term, b * left_stride + term, c * left_stride + term,
                    d * left_stride + term, right, at, right_stride, size, one, two, three, four,
                )  # fmt: skip
            for term in range(whole, terms):
                at = term * right_stride + start
                w, x = left[a * left_stride + term], left[b * left_stride + term]
                y, z = left[c * left_stride + term], left[d * left_stride + term]
                for i in range(size):
                    one[i] = one[i] + w * right[at + i]
                    two[i] = two[i] + x * right[at + i]
                    three[i] = three[i] + y * right[at + i]
                    four[i] = four[i] + z * right[at + i]
            for i in range(size):
                into[a * into_stride + start + i] = one[i]
                into[b * into_stride + start + i] = two[i]
                into[c * into_stride + start + i] = three[i]
                into[d * into_stride + start + i] = four[i]


def _add_four(
    left: Pointer,
    row: int,
    second: int,
    third: int,
    fourth: int,
    right: Pointer,
    at: int,
    stride: int,
    size: int,
    one: Pointer,
    two: Pointer,
    three: Pointer,
    four: Pointer,
) -> None:
    a, b, c, d = left[row], left[row + 1], left[row + 2], left[row + 3]
    e, f, g, h = left[second], left[second + 1], left[second + 2], left[second + 3]
    k, m, n, o = left[third], left[third + 1], left[third + 2], left[third + 3]
    p, q, r, s = left[fourth], left[fourth + 1], left[fourth + 2], left[fourth + 3]
    for i in range(size):
        w, x = right[at + i], right[at + stride + i]
        y, z = right[at + 2 * stride + i], right[at + 3 * stride + i]
        one[i] = one[i] + ((a * w + b * x) + (c * y + d * z))
        two[i] = two[i] + ((e * w + f * x) + (g * y + h * z))
        three[i] = three[i] + ((k * w + m * x) + (n * y + o * z))
        four[i] = four[i] + ((p * w + q * x) + (r * y + s * z))


_PRODUCTS = {
    name: kernel(
        *(f"{short}*", "i64", f"{short}*", "i64", f"{short}*", "i64", "i64", "i64", "i64", f"{short}**"),
    )(_add_product)
    for name, short in (("float32", "f32"), ("float64", "f64"))
}


@kernel("f64*", "i64", "i64", "i64")
def _factor(upper: Pointer, stride: int, rows: int, columns: int) -> None:
    """The rows of Cholesky's upper factor, from those of the matrix less the products of the rows above."""
    for k in range(rows):
        pivot = np.sqrt(upper[k * stride + k])
        for i in range(k, columns):
            upper[k * stride + i] = upper[k * stride + i] / pivot
        for row in range(k + 1, rows):
            factor = upper[k * stride + row]
            for i in range(row, columns):
                upper[row * stride + i] = upper[row * stride + i] - factor * upper[k * stride + i]


@kernel("f64*", "i64", "f64*", "i64", "i64", "i64")
def _substitute(upper: Pointer, stride: int, x: Pointer, columns: int, rows: int, backward: int) -> None:
    """Solves for the rows of x with a triangle of the factor: forward with its transpose, backward with itself."""
    for step in range(rows):
        k = rows - 1 - step if backward else step
        pivot = upper[k * stride + k]
        for i in range(columns):
            x[k * columns + i] = x[k * columns + i] / pivot
        begin, end = (0, k) if backward else (k + 1, rows)
        for row in range(begin, end):
            factor = upper[row * stride + k] if backward else upper[k * stride + row]
            for i in range(columns):
                x[row * columns + i] = x[row * columns + i] - factor * x[k * columns + i]
