"""How much a change of an element matters, for `arcee_fusion`: facts about the rows of a tensor, and the cutoff."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.methods.reductions import Magnitude, Score, Threshold, threshold_of
from workers.methods.tile import TILE_ELEMENTS, Inputs, Reduction, Tile, as_tensor, torch_named

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
        shares: list[_OfRows] = []
        for first, cuts, (values,) in _units_of(tile, self.parent):
            greatest = np.maximum.reduceat(values, cuts)
            with np.errstate(invalid="ignore"):  # a NaN or infinity in a parent gives NaN
                sums = np.add.reduceat(np.exp(values - _spread(greatest, cuts, values.size)), cuts)
            shares.append((first, np.stack([greatest, sums])))
        return shares

    def combine(self, shares: Sequence[_OfRows]) -> NDArray[np.float64]:
        rows = shares[-1][0] + shares[-1][1].shape[1]
        found = np.stack([np.full(rows, -np.inf), np.zeros(rows)])
        for first, (greatest, _) in shares:
            of_unit = found[0, first : first + greatest.size]
            np.maximum(of_unit, greatest, out=of_unit)
        with np.errstate(invalid="ignore"):
            for first, (greatest, sums) in shares:
                within = slice(first, first + greatest.size)
                found[1, within] += sums * np.exp(greatest - found[0, within])
        return found


@dataclass(frozen=True, slots=True)
class Divergences(Reduction):
    """KL(softmax(row of `model`) ‖ softmax(row of `base`)) of each row in float64, at least 0; a vector is one row."""

    model: str
    base: str

    def ask(self, tile: Tile) -> None:
        tile.known(Exponentials(self.model))
        tile.known(Exponentials(self.base))

    def of(self, tile: Tile) -> list[_OfRows]:
        shares: list[_OfRows] = []
        for first, cuts, parents in _units_of(tile, self.model, self.base):
            with np.errstate(all="ignore"):
                p, q = (
                    np.exp(values - _spread(greatest, cuts, values.size)) / _spread(sums, cuts, values.size)
                    + _SMOOTHING
                    for values, (greatest, sums) in zip(
                        parents,
                        (
                            tile.known(Exponentials(name))[:, first : first + cuts.size]
                            for name in (self.model, self.base)
                        ),
                        strict=True,
                    )
                )
                shares.append((first, np.add.reduceat(p * np.log(p / q), cuts)))
        return shares

    def combine(self, shares: Sequence[_OfRows]) -> NDArray[np.float64]:
        total = np.zeros(shares[-1][0] + shares[-1][1].size)
        for first, sums in shares:
            total[first : first + sums.size] += sums
        return np.maximum(total, 0)


def _units_of(tile: Tile, *names: str) -> Iterator[tuple[int, NDArray[np.int64], list[NDArray[np.float64]]]]:
    """For each unit of a tile: its first row, where each of its rows begins in it, and the parents' elements."""
    for place in range(0, tile.elements, TILE_ELEMENTS):
        parts: list[Any] = [tile.raw[name][place : place + TILE_ELEMENTS] for name in names]
        values = [
            (part if isinstance(part, np.ndarray) else part.double().cpu().numpy()).astype(np.float64) for part in parts
        ]
        start, row = tile.start + place, tile.row
        cuts = np.arange(start // row * row, start + values[0].size, row) - start
        yield start // row, np.maximum(cuts, 0), values


def _spread(of_rows: NDArray[np.float64], cuts: NDArray[np.int64], elements: int) -> NDArray[np.float64]:
    """For each element of a unit the number of its row."""
    return of_rows.repeat(np.diff(cuts, append=elements))


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
            sizes = Magnitude(self.model, self.base).on_host(tile).view(np.float32)
            row = tile.row
            first, stop = tile.start // row, -(-(tile.start + tile.elements) // row)
            of_rows = tile.known(Divergences(self.model, self.base))[first:stop].repeat(row)
            divergences = of_rows[tile.start - first * row :][: tile.elements]
            with np.errstate(over="ignore", invalid="ignore"):
                return np.abs((sizes * divergences).astype(np.float32)).view(np.int32)

        return tile.remember(("on host", self), compute)


def cutoff(tile: Tile, score: Score) -> Threshold:
    """Keeps the scores that reach median + 1.5 · (upper − lower quartile): exact, at ranks ⌊q·(n − 1)⌋ of n."""
    elements = math.prod(tile.shape)
    lower, median, upper = (
        float(np.int32(threshold_of(tile, score, elements - fourths * (elements - 1) // 4).bits).view(np.float32))
        for fourths in (1, 2, 3)
    )
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
