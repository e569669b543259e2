"""Facts about a whole tensor that some methods need before they can merge its first element: sums and counts.

Every sum is taken in float64 by a fixed tree of element-wise additions, so that it does not depend on the processor's
vector width, on a GPU's block order or on how many tiles were in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.agreement import overlap_counts
from workers.methods.kernels.dtypes import ARITHMETIC
from workers.methods.kernels.memory import addresses, are_pairs
from workers.methods.kernels.short_products import LEAST_UNIT, products_of_two
from workers.methods.kernels.unit_sums import Product
from workers.methods.kernels.unit_sums import unit_sums as sums_of_products
from workers.methods.tile import TILE_ELEMENTS, Array, Reduction, Tile, host_arrays, units_of

if TYPE_CHECKING:
    from torch import Tensor


def unit_sums(values: Tensor) -> list[float]:
    """Σ values in float64 for each `TILE_ELEMENTS` unit, always added in the same order."""
    import torch

    units = -(-values.numel() // TILE_ELEMENTS)
    folded = torch.zeros(units * TILE_ELEMENTS, dtype=torch.float64, device=values.device)
    folded[: values.numel()] = values
    folded = folded.view(units, -1)
    while folded.shape[1] > 1:
        half = folded.shape[1] // 2
        folded = folded[:, :half] + folded[:, half:]
    return folded[:, 0].tolist()


def total(shares: Iterable[float]) -> float:
    """Σ of the units, rounded once. Infinities of both signs, and sums too large for float64, give NaN."""
    try:
        return math.fsum(shares)
    except (ValueError, OverflowError):
        return math.nan


@dataclass(frozen=True, slots=True)
class Gram(Reduction):
    """Σ aᵢ·bᵢ in float64 for all pairs of models, or of their task vectors with a base: a symmetric matrix.

    Models and task vectors are taken in `dtype`, "float32" or "float64". Products of two float32 numbers are exact.
    """

    models: tuple[str, ...]
    base: str | None
    dtype: str

    def of(self, tile: Tile) -> list[NDArray[np.float64]]:
        pairs = [*combinations_with_replacement(range(len(self.models)), 2)]
        names = self.models if self.base is None else (*self.models, self.base)
        if arrays := host_arrays(tile, *names):
            of_two = len(self.models) == 2 and self.dtype == "float64" and are_pairs(arrays, addresses(arrays))
            if of_two and TILE_ELEMENTS >= LEAST_UNIT:  # tests have smaller units
                return [*products_of_two(*arrays, unit=TILE_ELEMENTS)]
            lines = [place if self.base is None else (place, len(self.models)) for place in range(len(self.models))]
            products = [Product(lines[a], lines[b]) for a, b in pairs]
            return [*sums_of_products(arrays, products, unit=TILE_ELEMENTS, dtype=self.dtype)]
        vectors = [
            (tile.parent(model, self.dtype) if self.base is None else tile.delta(model, self.base, self.dtype)).double()
            for model in self.models
        ]
        return [*np.array([unit_sums(vectors[a] * vectors[b]) for a, b in pairs]).T]

    def combine(self, shares: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
        matrix = np.empty((len(self.models), len(self.models)))
        upper = np.triu_indices(len(self.models))
        matrix[upper] = [total(of_pair) for of_pair in zip(*shares, strict=True)]
        matrix.T[upper] = matrix[upper]
        return matrix


@dataclass(frozen=True, slots=True)
class GramOfLines(Reduction):
    """`Gram` in float64 for each vector of the last axis ("rows") or of the first ("columns"): models × models × lines.

    Additions join the elements of a line within a unit by a fixed tree, then the units in their order.
    """

    models: tuple[str, ...]
    base: str | None
    along: Literal["rows", "columns"]

    def of(self, tile: Tile) -> list[tuple[int, NDArray[np.float64]]]:
        vectors: list[Any]
        names = self.models if self.base is None else (*self.models, self.base)
        if arrays := host_arrays(tile, *names):
            wide = [each.astype(np.float64) for each in arrays]
            vectors = wide if self.base is None else [each - wide[-1] for each in wide[:-1]]
        else:
            vectors = [
                tile.parent(model, "float64") if self.base is None else tile.delta(model, self.base, "float64")
                for model in self.models
            ]
        pairs = [*combinations_with_replacement(vectors, 2)]
        width = tile.row if self.along == "rows" else math.prod(tile.shape[1:])
        shares: list[tuple[int, NDArray[np.float64]]] = []
        for first in range(0, tile.elements, TILE_ELEMENTS):
            unit = slice(first, first + TILE_ELEMENTS)
            sums = [_line_sums(a[unit] * b[unit], (tile.start + first) % width, width, self.along) for a, b in pairs]
            shares.append(((tile.start + first) // width if self.along == "rows" else 0, np.array(sums)))
        return shares

    def combine(self, shares: Sequence[tuple[int, NDArray[np.float64]]]) -> NDArray[np.float64]:
        lines = max(first + sums.shape[1] for first, sums in shares)
        totals = np.zeros((shares[0][1].shape[0], lines))
        for first, sums in shares:
            totals[:, first : first + sums.shape[1]] += sums
        matrix = np.empty((len(self.models), len(self.models), lines))
        upper = np.triu_indices(len(self.models))
        matrix[upper] = totals
        matrix.swapaxes(0, 1)[upper] = totals
        return matrix


def _line_sums(values: Any, column: int, width: int, along: Literal["rows", "columns"]) -> Array:
    """Σ for each row, or each column, of elements that begin in a column of a matrix `width` wide; zeros fill it."""
    rows = -(-(column + len(values)) // width)
    on_host = isinstance(values, np.ndarray)
    matrix = np.zeros(rows * width) if on_host else values.new_zeros(rows * width)
    matrix[column : column + len(values)] = values
    lines = matrix.reshape(rows, width)
    lines = lines.T if along == "rows" else lines
    while (left := len(lines)) > 1:
        half = (left + 1) // 2
        lines[: left - half] += lines[half:]
        lines = lines[:half]
    return lines[0] if on_host else lines[0].cpu().numpy()


@dataclass(frozen=True, slots=True)
class L1(Reduction):
    """Σ |δᵢ| of one task vector."""

    model: str
    base: str
    dtype: str

    def of(self, tile: Tile) -> list[float]:
        if (arrays := host_arrays(tile, self.model, self.base)) and self.dtype in ARITHMETIC:
            products = [Product((0, 1))]
            return sums_of_products(arrays, products, unit=TILE_ELEMENTS, dtype=self.dtype)[:, 0].tolist()
        return unit_sums(tile.delta(self.model, self.base, self.dtype).abs())

    def combine(self, shares: Sequence[float]) -> float:
        return total(shares)


def overlap(
    tile: Tile, models: tuple[str, ...], base: str, epsilon: float, dtype: str
) -> tuple[Sequence[Tensor], Tensor]:
    """For each model 1 where |δᵢ| > epsilon, else 0, and for how many models that holds; in the arithmetic dtype."""
    import torch

    def compute() -> tuple[Sequence[Tensor], Tensor]:
        deltas = [tile.delta(model, base, dtype) for model in models]
        active = [torch.gt(delta.abs(), epsilon, out=torch.empty_like(delta)) for delta in deltas]
        return active, sum(active[1:], active[0])

    return tile.remember(("overlap", models, base, epsilon, dtype), compute)


@dataclass(frozen=True, slots=True)
class Overlaps(Reduction):
    """For each model, how many elements have |δᵢ| > epsilon in it and in another model, and in it alone."""

    models: tuple[str, ...]
    base: str
    epsilon: float
    dtype: str

    def of(self, tile: Tile) -> list[list[tuple[int, int]]]:
        if (arrays := host_arrays(tile, *self.models, self.base)) and self.dtype in ARITHMETIC:
            units = zip(*(units_of(each) for each in arrays), strict=True)
            return [overlap_counts(unit, self.epsilon, self.dtype) for unit in units]
        active, count = overlap(tile, self.models, self.base, self.epsilon, self.dtype)
        return [
            [
                (int((changed & (of > 1)).count_nonzero()), int((changed & (of == 1)).count_nonzero()))
                for changed in unit
            ]
            for *unit, of in zip(
                *(changed.bool().split(TILE_ELEMENTS) for changed in active), count.split(TILE_ELEMENTS), strict=True
            )
        ]

    def combine(self, shares: Sequence[Sequence[tuple[int, int]]]) -> list[tuple[int, int]]:
        return [
            (sum(shared for shared, _ in units), sum(alone for _, alone in units))
            for units in zip(*shares, strict=True)
        ]
