"""How much a change of an element matters, for `arcee_fusion`: facts about the rows of a tensor, and the cutoff."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.divergence import divergences, exponentials, row_divergences, softmaxes
from workers.methods.kernels.dtypes import CODES
from workers.methods.kernels.ranks import scaled_magnitudes
from workers.methods.reductions import SAMPLED, SAMPLED_RUN, Magnitude, Score, Threshold, threshold_of
from workers.methods.tile import TILE_ELEMENTS, Array, Inputs, Reduction, Tile, as_tensor, together, torch_named

if TYPE_CHECKING:
    from torch import Tensor

_SMOOTHING = 1e-8
"""Added to every probability, so that none is zero."""

_OfRows = tuple[int, NDArray[np.float64]]
"""The first row that a unit of a tensor touches, and a number for each row that it touches, or two."""


@dataclass(frozen=True, slots=True)
class Exponentials(Reduction):
    """For each row of a parent its greatest element m, and Σ exp(x − m), in float64: an array of two lines."""

    parent: str

    def of(self, tile: Tile) -> list[_OfRows]:
        return [
            (first, softmaxes(values, tile.row, column)) for first, column, (values,) in _units_of(tile, self.parent)
        ]

    def combine(self, shares: Sequence[_OfRows]) -> NDArray[np.float64]:
        rows = shares[-1][0] + shares[-1][1].shape[1]
        found = np.stack([np.full(rows, -np.inf), np.zeros(rows)])
        for first, (greatest, _) in shares:
            of_unit = found[0, first : first + greatest.size]
            np.maximum(of_unit, greatest, out=of_unit)
        with np.errstate(invalid="ignore"):
            for first, (greatest, sums) in shares:
                within = slice(first, first + greatest.size)
                found[1, within] += sums * exponentials(greatest - found[0, within])
        return found


@dataclass(frozen=True, slots=True)
class Divergences(Reduction):
    """KL(softmax(row of `model`) ‖ softmax(row of `base`)) of each row in float64, at least 0; a vector is one row."""

    model: str
    base: str

    def ask(self, tile: Tile) -> None:
        if tile.row > TILE_ELEMENTS:
            together(partial(tile.known, Exponentials(name)) for name in (self.model, self.base))

    def of(self, tile: Tile) -> list[_OfRows]:
        row, shares = tile.row, list[_OfRows]()
        for first, column, (model, base) in _units_of(tile, self.model, self.base):
            begin = min(-column % row, model.size)
            end = model.size - (model.size - begin) % row
            found = [row_divergences(model[begin:end], base[begin:end], row, _SMOOTHING)]
            if begin:
                found.insert(0, self._of_part(tile, first, column, model[:begin], base[:begin]))
            if end < model.size:
                found.append(self._of_part(tile, first + (column + end) // row, 0, model[end:], base[end:]))
            shares.append((first, np.concatenate(found)))
        return shares

    def _of_part(self, tile: Tile, number: int, column: int, model: Array, base: Array) -> NDArray[np.float64]:
        """The share of elements of one row, from a column on."""
        of_model, of_base = (_softmax_of_row(tile, name, number) for name in (self.model, self.base))
        return divergences(model, base, of_model, of_base, tile.row, column, _SMOOTHING)

    def combine(self, shares: Sequence[_OfRows]) -> NDArray[np.float64]:
        total = np.zeros(shares[-1][0] + shares[-1][1].size)
        for first, sums in shares:
            total[first : first + sums.size] += sums
        return np.maximum(total, 0)


def _softmax_of_row(tile: Tile, parent: str, number: int) -> NDArray[np.float64]:
    """The `Exponentials` of one row, of which a tile has a part."""
    fact, row = Exponentials(parent), tile.row
    if row > TILE_ELEMENTS:
        return tile.known(fact)[:, number : number + 1]
    start, end = number * row, (number + 1) * row
    elements = _on_host(tile.around[parent][start - tile.around_start : end - tile.around_start])
    cuts = [start, *range(start - start % TILE_ELEMENTS + TILE_ELEMENTS, end, TILE_ELEMENTS), end]
    parts = [(low - start, elements[low - start : high - start]) for low, high in itertools.pairwise(cuts)]
    return fact.combine([(0, softmaxes(part, row, column)) for column, part in parts])


def _units_of(tile: Tile, *names: str) -> Iterator[tuple[int, int, list[Array]]]:
    """For each unit of a tile: its first row, the column in which it begins, and the parents' elements on the host."""
    for place in range(0, tile.elements, TILE_ELEMENTS):
        first, column = divmod(tile.start + place, tile.row)
        yield first, column, [_on_host(tile.raw[name][place : place + TILE_ELEMENTS]) for name in names]


def _on_host(elements: Any) -> Array:
    """Elements in a dtype of the compiled loops."""
    if not isinstance(elements, np.ndarray):
        return elements.double().cpu().numpy()
    return elements if elements.dtype in CODES else elements.astype(np.float64)


@dataclass(frozen=True, slots=True)
class Importance(Score):
    """|δ| in float32 times the `Divergences` of its row, rounded to float32."""

    model: str
    base: str

    def ask(self, tile: Tile) -> None:
        tile.known(Divergences(self.model, self.base))

    def bits(self, tile: Tile) -> Tensor:
        import torch

        return torch.from_numpy(self.on_host(tile)).to(as_tensor(tile.raw[self.model]).device)

    def on_host(self, tile: Tile) -> NDArray[np.int32]:
        def compute() -> NDArray[np.int32]:
            model, base = (_on_host(tile.raw[name]) for name in (self.model, self.base))
            first, column = divmod(tile.start, tile.row)
            of_rows = tile.known(Divergences(self.model, self.base))
            rows = of_rows[first : first - (-(column + tile.elements) // tile.row)]
            return scaled_magnitudes(model, base, rows, tile.row, column)

        return tile.remember(("on host", self), compute)

    def sampled(self, tile: Tile, first: int) -> NDArray[np.int32]:
        sizes = Magnitude(self.model, self.base).sampled(tile, first).view(np.float32)
        runs = first + SAMPLED * np.arange(sizes.size // SAMPLED_RUN)
        rows = (tile.start + SAMPLED_RUN * runs[:, None] + np.arange(SAMPLED_RUN)).reshape(-1) // tile.row
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = (sizes * tile.known(Divergences(self.model, self.base))[rows]).astype(np.float32)
        return np.abs(scaled).view(np.int32)


def cutoff(tile: Tile, score: Score) -> Threshold:
    """Keeps the scores that reach median + 1.5 · (upper − lower quartile): exact, at ranks ⌊q·(n − 1)⌋ of n."""
    elements = math.prod(tile.shape)
    counts = [elements - fourths * (elements - 1) // 4 for fourths in (1, 2, 3)]
    ranked = together(partial(threshold_of, tile, score, count) for count in counts)
    lower, median, upper = (float(np.int32(each.bits).view(np.float32)) for each in ranked)
    limit = median + 1.5 * (upper - lower)
    least = np.float32(limit)
    if float(least) < limit:
        least = np.nextafter(least, np.float32(np.inf))
    bits = int(np.iinfo(np.int32).max) if math.isnan(limit) else int(least.view(np.int32)) - 1
    return Threshold(bits, 0, [0] * (-(-elements // TILE_ELEMENTS) + 1))


@dataclass(frozen=True, slots=True)
class RoundedQuartiles(Reduction):
    """The quartiles of the importances as mergekit computes them in `dtype`; keeps a float32 for each element."""

    model: str
    base: str
    dtype: str

    def of(self, tile: Tile) -> list[NDArray[np.float32]]:
        return [_rounded_importances(tile, self.model, self.base, self.dtype).float().cpu().numpy()]

    def combine(self, shares: Sequence[NDArray[np.float32]]) -> tuple[float, float, float]:
        ranked = np.sort(np.concatenate(shares))
        lower, median, upper = (float(ranked[fourths * (ranked.size - 1) // 4]) for fourths in (1, 2, 3))
        return lower, median, upper


def kept_by_mergekit(inputs: Inputs) -> Tensor:
    """1 in float32 where the importance reaches the cutoff, both in the document's dtype, else 0."""
    import torch

    model, base = inputs.models[0], inputs.base_model
    quartiles = inputs.tile.known(RoundedQuartiles(model, base, inputs.dtype))
    lower, median, upper = torch.tensor(quartiles, dtype=torch_named(inputs.dtype))
    importances = _rounded_importances(inputs.tile, model, base, inputs.dtype)
    return (importances >= (median + 1.5 * (upper - lower)).to(importances.device)).float()


def _rounded_importances(tile: Tile, model: str, base: str, dtype: str) -> Tensor:
    """|δ| · KL, every step rounded to `dtype`."""
    import torch

    row = tile.row
    first, stop = tile.start // row * row, -(-(tile.start + tile.elements) // row) * row
    inside = slice(first - tile.around_start, stop - tile.around_start)
    assert inside.start >= 0 and inside.stop <= len(tile.around[model]), "read without the whole rows of a tile"
    other, origin = (
        as_tensor(tile.around[name][inside]).to(torch_named(dtype)).view(-1, row) for name in (model, base)
    )
    p, q = (torch.softmax(values, dim=-1) + _SMOOTHING for values in (other, origin))
    importances = (other - origin).abs() * torch.sum(p * torch.log(p / q), dim=-1, keepdim=True)
    return importances.flatten()[tile.start - first :][: tile.elements]
