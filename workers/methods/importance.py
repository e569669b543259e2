"""How much a change of an element matters, for `arcee_fusion`: facts about the rows of a tensor, and the cutoff."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.divergence import divergences
from workers.methods.kernels.dtypes import CODES
from workers.methods.kernels.ranks import Bracket, Ends, RowFactors, magnitudes, magnitudes_bracketed
from workers.methods.ranking import MARGINS, SAMPLED, SAMPLED_RUN, Cutoff, Magnitude, Score, Threshold, first_sampled
from workers.methods.tile import TILE_ELEMENTS, Array, Inputs, Reduction, Tile, as_tensor, first_found, torch_named

if TYPE_CHECKING:
    from torch import Tensor

_SMOOTHING = 1e-8
"""Added to every probability, so that none is zero."""


@dataclass(frozen=True, slots=True, eq=False)
class OfRows:
    """KL(softmax(row of the model) ‖ softmax(row of the base)) of each row, and a sorted sample of the importances."""

    divergences: NDArray[np.float64]
    sample: NDArray[np.int32]


_Share = tuple[NDArray[np.float64], NDArray[np.int32], NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Divergences(Reduction):
    """`OfRows` of a tensor; a vector is one row. The sample has the places of `ranking.Sample`."""

    model: str
    base: str

    def of(self, tile: Tile) -> list[_Share]:
        """The divergences of the rows that begin in a tile, and |δ| of the sampled elements with their rows."""
        row, names = tile.row, (self.model, self.base)
        start, stop = (-(-place // row) * row for place in (tile.start, tile.start + tile.elements))
        inside = slice(start - tile.around_start, stop - tile.around_start)
        model, base = (_on_host(tile.around[name][inside]) for name in names)
        assert model.size == stop - start, "read without the whole rows of a tile"
        found = divergences(model, base, row, start=start, unit=TILE_ELEMENTS, smoothing=_SMOOTHING)
        first = first_sampled(tile)
        sizes = Magnitude(*names).sampled(tile, first)
        runs = first + SAMPLED * np.arange(sizes.size // SAMPLED_RUN)
        places = tile.start + SAMPLED_RUN * runs[:, None] + np.arange(SAMPLED_RUN)
        return [(found, sizes, places.reshape(-1) // row)]

    def combine(self, shares: Sequence[_Share]) -> OfRows:
        found, sizes, rows = (np.concatenate(each) for each in zip(*shares, strict=True))
        found = np.maximum(found, 0)
        with np.errstate(over="ignore", invalid="ignore"):
            importances = (sizes.view(np.float32) * found[rows]).astype(np.float32)
        return OfRows(found, np.sort(np.abs(importances).view(np.int32)))


def _on_host(elements: Any) -> Array:
    """Elements in a dtype of the compiled loops."""
    if not isinstance(elements, np.ndarray):
        return elements.double().cpu().numpy()
    return elements if elements.dtype in CODES else elements.astype(np.float64)


@dataclass(frozen=True, slots=True)
class Importance(Score):
    """|δ| in float32 times the divergence of its row, rounded to float32."""

    model: str
    base: str

    def on_host(self, tile: Tile) -> NDArray[np.int32]:
        model, base = self._on_host(tile)
        return magnitudes(model, base, self.factors(tile))

    def bracketed(self, tile: Tile, ends: Sequence[Ends]) -> list[Bracket]:
        model, base = self._on_host(tile)
        return magnitudes_bracketed(model, base, ends, unit=TILE_ELEMENTS, factors=self.factors(tile))

    def factors(self, tile: Tile) -> RowFactors:
        """The divergences of the rows of a tile."""
        first, column = divmod(tile.start, tile.row)
        end = -(-(tile.start + tile.elements) // tile.row)
        return RowFactors(tile.known(Divergences(self.model, self.base)).divergences[first:end], tile.row, column)

    def _on_host(self, tile: Tile) -> list[Array]:
        return [_on_host(tile.raw[name]) for name in (self.model, self.base)]


@dataclass(frozen=True, slots=True)
class Quartiles(Reduction):
    """The bits of the importances at ranks ⌊q·(n − 1)⌋ of n, q = 1/4, 1/2, 3/4: exact, or None as of `Cutoff`."""

    score: Importance
    elements: int
    margin: float | None

    def ask(self, tile: Tile) -> None:
        self.score.factors(tile)

    def of(self, tile: Tile) -> list[tuple[Bracket, ...]]:
        sample = tile.known(Divergences(self.score.model, self.score.base)).sample
        ends = [each.ends(sample, self.elements) for each in self._cutoffs()]
        return [tuple(self.score.bracketed(tile, ends))]

    def combine(self, shares: Sequence[tuple[Bracket, ...]]) -> tuple[int, ...] | None:
        found = [each.combine(of_one) for each, of_one in zip(self._cutoffs(), zip(*shares, strict=True), strict=True)]
        return tuple(each.bits for each in found if each is not None) if None not in found else None

    def _cutoffs(self) -> list[Cutoff]:
        ranks = (self.elements - fourths * (self.elements - 1) // 4 for fourths in (1, 2, 3))
        return [Cutoff(self.score, rank, self.margin) for rank in ranks]


def cutoff(tile: Tile, score: Importance) -> Threshold:
    """Keeps the scores that reach median + 1.5 · (upper − lower quartile)."""
    elements = math.prod(tile.shape)
    found = first_found(tile, (Quartiles(score, elements, margin) for margin in MARGINS))
    lower, median, upper = (float(np.int32(bits).view(np.float32)) for bits in found)
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
