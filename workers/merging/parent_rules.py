"""The rules of tensors whose parent stores them in another form: with a LoRA adapter, or in another dtype.

An adapter's arithmetic is in float64, with one rounding at the end. The product of its matrices does not depend on the
order of the sums, so that every machine gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from jobs.merge_tasks import Derived, LowRank, Scaled, Strided
from workers.checkpoints.dtypes import numpy_dtype
from workers.merging.tiles import Elements
from workers.methods.kernels.low_rank import TERMS, add_low_rank

BLOCK_ELEMENTS = 1 << 20
"""Elements that are computed at a time: their float64 copies stay small."""

_BITS = 22
"""Of an integer in a product: 512 products of two of them have a sum below 2⁵³, which float64 holds exactly."""

_TERMS = 512

_Matrix = NDArray[np.float64]


def low_rank(rule: LowRank, derived: Derived, inputs: Sequence[Elements]) -> Elements:
    """The tensor with the adapter's update."""
    dtype = numpy_dtype(derived.dtype)
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        if len(inputs) == 2:
            bias, change = (part.astype(np.float64) for part in inputs)
            return (bias + rule.scale * change).astype(dtype)
        flat, a, b, *magnitude = inputs
        if not magnitude and (adapt := row_adapter(rule, derived, a, b)):
            return adapt(0, flat)
        weight, output = flat.reshape(derived.shape), np.empty(derived.shape, dtype)
        left, right = _factors(rule, a, b)
        fine = derived.dtype in ("F32", "F64")
        rows = max(1, BLOCK_ELEMENTS // max(1, weight.shape[1]))
        if magnitude and rule.transposed:
            rows = len(weight)  # the norms are those of whole columns
        for start in range(0, len(weight), rows):
            block = slice(start, start + rows)
            total = product(left[block], right, fine=fine)
            total *= rule.scale
            total += weight[block]
            if magnitude:
                wanted = magnitude[0].astype(np.float64)
                total *= (
                    (wanted / _norms(total.T)) if rule.transposed else (wanted[block] / _norms(total))[:, np.newaxis]
                )
            output[block] = total
    return output.reshape(-1)


def row_adapter(
    rule: LowRank, derived: Derived, a: Elements, b: Elements
) -> Callable[[int, Elements], Elements] | None:
    """From the number of a row of W and the elements from there to the end of a row to the same of the result.

    None where `low_rank` has no compiled loop: in another dtype than bfloat16, and for NaN and infinity in an adapter.
    """
    left, right = _factors(rule, a, b)
    if derived.dtype != "BF16" or rule.rank > _TERMS or not (np.isfinite(left).all() and np.isfinite(right).all()):
        return None
    rank = -(-rule.rank // TERMS) * TERMS
    ones, others = np.zeros((len(left), rank)), np.zeros((rank, right.shape[1]))
    others[: rule.rank] = _rounded(right)
    rows = max(1, BLOCK_ELEMENTS // rank)
    for start in range(0, len(left), rows):
        ones[start : start + rows, : rule.rank] = _rounded(left[start : start + rows].T).T

    def adapt(row: int, elements: Elements) -> Elements:
        weights = elements.reshape(-1, derived.shape[1])
        output = np.empty_like(weights)
        add_low_rank(weights, ones[row : row + len(weights)], others, rule.scale, output)
        return output.reshape(-1)

    return adapt


def _factors(rule: LowRank, a: Elements, b: Elements) -> tuple[_Matrix, _Matrix]:
    """Matrices of (rows of W, rank) and (rank, columns of W)."""
    left, right = b.astype(np.float64).reshape(-1, rule.rank), a.astype(np.float64).reshape(rule.rank, -1)
    return (right.T, left.T) if rule.transposed else (left, right)


def product(left: _Matrix, right: _Matrix, *, fine: bool) -> _Matrix:
    """left @ right, of which every machine gives the same bits.

    Each row of `left` and column of `right` is rounded to integers of `_BITS` bits and a power of two; with `fine` the
    rest of it is one too. Sums of such products are exact in float64, in whatever order a BLAS adds them (Ozaki,
    Ogita, Oishi and Rump 2012, "Error-free transformations of matrix multiplication").
    """
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        return left @ right
    total = np.zeros((left.shape[0], right.shape[1]))
    for start in range(0, left.shape[1], _TERMS):
        terms = slice(start, start + _TERMS)
        (ones, small), (others, small_others) = (_split(part) for part in (left[:, terms].T, right[terms]))
        if fine:
            total += small.T @ others
            total += ones.T @ small_others
        total += ones.T @ others
    return total


def _split(columns: _Matrix) -> tuple[_Matrix, _Matrix]:
    """Two parts of each column, both integers of `_BITS` bits times a power of two."""
    first = _rounded(columns)
    return first, _rounded(columns - first)


def _rounded(columns: _Matrix) -> _Matrix:
    _, exponents = np.frexp(np.abs(columns).max(axis=0, initial=0.0))
    unit = np.ldexp(1.0, np.maximum(exponents, -900) - _BITS)
    return np.rint(columns / unit) * unit


def _norms(rows: _Matrix) -> _Matrix:
    """The Euclidean norms of the rows, added in the order of the columns."""
    return np.sqrt(np.add.reduce(np.square(rows.T, order="C"), axis=0))


def scaled(rule: Scaled, derived: Derived, inputs: Sequence[Elements]) -> Elements:
    """The tensor in its dtype."""
    dtype = numpy_dtype(derived.dtype)
    if len(inputs) == 1:
        return inputs[0].astype(dtype)
    rows, columns = derived.shape[-2:]
    values = inputs[0].reshape(-1, rows, columns)
    output = np.empty(values.shape, dtype)
    grids = np.broadcast_to(inputs[1].astype(np.float32).reshape(rule.grid), (len(values), *rule.grid[1:]))
    step = max(1, BLOCK_ELEMENTS // columns)
    with np.errstate(over="ignore", invalid="ignore"):
        for plane, grid, target in zip(values, grids, output, strict=True):
            for start in range(0, rows, step):
                stop = min(start + step, rows)
                factors = grid[np.arange(start, stop) // rule.block[0]]
                factors = np.repeat(factors, rule.block[1], axis=1)[:, :columns] if factors.shape[1] > 1 else factors
                target[start:stop] = plane[start:stop].astype(np.float32) * factors
    return output.reshape(-1)


def strided(rule: Strided, derived: Derived, inputs: Sequence[Elements]) -> Elements:
    """The elements in C order."""
    elements = inputs[0]
    steps = [stride * elements.itemsize for stride in rule.strides]
    return np.lib.stride_tricks.as_strided(elements, derived.shape, steps, writeable=False).flatten()
