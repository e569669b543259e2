"""Facts about a whole tensor that some methods need before they can merge its first element.

Every sum is taken in float64 by a fixed tree of element-wise additions, so that it does not depend on the processor's
vector width, on a GPU's block order or on how many tiles were in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from workers.methods.tile import TILE_ELEMENTS, Reduction, Tile, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

IntArray = NDArray[Any]

_SAMPLED = 61
_MARGINS = (5.0, 50.0, None)


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


@dataclass(frozen=True, slots=True)
class Dot(Reduction):
    """Σ aᵢ·bᵢ in float64; the products of two float32 numbers are exact there."""

    a: str
    b: str

    def of(self, tile: Tile) -> list[float]:
        return unit_sums(tile.parent(self.a, "float64") * tile.parent(self.b, "float64"))

    def combine(self, shares: Sequence[float]) -> float:
        return math.fsum(shares)


@dataclass(frozen=True, slots=True)
class L1(Reduction):
    """Σ |δᵢ| of one task vector."""

    model: str
    base: str
    dtype: str

    def of(self, tile: Tile) -> list[float]:
        return unit_sums(tile.delta(self.model, self.base, self.dtype).abs())

    def combine(self, shares: Sequence[float]) -> float:
        return math.fsum(shares)


def magnitude_bits(tile: Tile, model: str, base: str) -> Tensor:
    """|δ| as int32 whose order is the order of magnitudes (float32, positive, so the sign bit is clear)."""
    import torch

    return tile.remember(("magnitude", model, base), lambda: tile.delta(model, base, "float32").abs().view(torch.int32))


@dataclass(frozen=True, slots=True)
class MagnitudeSample(Reduction):
    """Every 61st |δᵢ| as bits, sorted: the one sort of a tensor, which tells every density where to look.

    61 is prime, so that a sample of a matrix does not come from the same few columns.
    """

    model: str
    base: str

    def of(self, tile: Tile) -> list[Tensor]:
        import torch

        first = -tile.start % _SAMPLED
        model, base = (as_tensor(tile.raw[name][first::_SAMPLED]).to(torch.float32) for name in (self.model, self.base))
        return [(model - base).abs().view(torch.int32)]

    def combine(self, shares: Sequence[Tensor]) -> IntArray:
        import torch

        return np.sort(torch.cat(list(shares)).cpu().numpy())


@dataclass(frozen=True, slots=True)
class Threshold:
    """The elements of a tensor that a density keeps: all |δ| above `bits`, and the first `equals` of those equal to it.

    `equal_before[u]` counts the equal ones in the units before unit u.
    """

    bits: int
    equals: int
    equal_before: Sequence[int]


@dataclass(frozen=True, slots=True)
class Cutoff(Reduction):
    """The k-th largest |δᵢ| exactly, k = max(1, ⌊density · elements⌋): a `Threshold`, or None if it was not found.

    Only what lies between two quantiles of the sample, `margin` standard errors around the wanted one, is looked at
    closely. That this misses is possible and noticed; then a greater margin is asked for, and None means everything.
    """

    model: str
    base: str
    density: float
    margin: float | None

    def ask(self, tile: Tile) -> None:
        tile.known(MagnitudeSample(self.model, self.base))

    def of(self, tile: Tile) -> list[tuple[int, int, IntArray, IntArray]]:
        low, high = self._bracket(tile.known(MagnitudeSample(self.model, self.base)))
        shares: list[tuple[int, int, IntArray, IntArray]] = []
        for unit in magnitude_bits(tile, self.model, self.base).split(TILE_ELEMENTS):
            bits = unit.cpu().numpy()  # NumPy counts and selects several times faster than torch does
            inside = bits[(bits - low).view(np.uint32) <= high - low]
            values, counts = np.unique(inside, return_counts=True)
            shares.append((bits.size, int(np.count_nonzero(bits > high)), values, counts))
        return shares

    def _bracket(self, sample: IntArray) -> tuple[int, int]:
        lowest, highest = 0, int(np.iinfo(np.int32).max)
        if self.margin is None or not sample.size:
            return lowest, highest
        rank = self.density * sample.size
        slack = self.margin * math.sqrt(rank * (1 - self.density)) + 2
        below, above = math.ceil(sample.size - rank + slack), math.floor(sample.size - rank - slack)
        return (
            int(sample[above]) if above >= 0 else lowest,
            int(sample[below]) if below < sample.size else highest,
        )

    def combine(self, shares: Sequence[tuple[int, int, IntArray, IntArray]]) -> Threshold | None:
        elements = sum(count for count, _, _, _ in shares)
        wanted = max(1, int(self.density * elements)) - sum(above for _, above, _, _ in shares)
        values, place = np.unique(np.concatenate([values for _, _, values, _ in shares]), return_inverse=True)
        totals = np.zeros(values.size, dtype=np.int64)
        np.add.at(totals, place, np.concatenate([counts for _, _, _, counts in shares]))
        from_largest = np.cumsum(totals[::-1])
        index = int(np.searchsorted(from_largest, wanted))
        if wanted < 1 or index == values.size:
            return None
        bits = int(values[::-1][index])
        equal = [int(counts[values == bits].sum()) for _, _, values, counts in shares]
        greater = int(from_largest[index - 1]) if index else 0
        return Threshold(bits, wanted - greater, [0, *np.cumsum(equal).tolist()])


def largest(tile: Tile, model: str, base: str, density: float) -> Tensor:
    """1 for the ⌊density · elements⌋ largest |δ| of the whole tensor (of equals, the first), 0 for the rest."""

    import torch

    def decide() -> Tensor:
        threshold = threshold_of(tile, model, base, density)
        first, end = tile.units
        room = threshold.equals - threshold.equal_before[first]
        equal_here = threshold.equal_before[end] - threshold.equal_before[first]
        bits = magnitude_bits(tile, model, base)
        if room >= equal_here or room <= 0:
            mask = torch.empty(bits.shape, dtype=torch.float32, device=bits.device)
            return torch.ge(bits, threshold.bits + (room <= 0), out=mask)
        equal = bits == threshold.bits
        return ((bits > threshold.bits) | (equal & (torch.cumsum(equal, dim=0) <= room))).to(torch.float32)

    return tile.remember(("largest", model, base, density), decide)


def threshold_of(tile: Tile, model: str, base: str, density: float) -> Threshold:
    """Which elements of |δ| a density keeps, or `NotYetKnown`."""
    for margin in _MARGINS:
        threshold: Threshold | None = tile.known(Cutoff(model, base, density, margin))
        if threshold is not None:
            return threshold
    raise AssertionError("the whole range holds every rank")


def drawn(tile: Tile, method: str, model: str, density: float) -> Tensor:
    """Which elements a coin of probability `density` keeps, element by element: 1 or 0."""

    import torch

    def decide() -> Tensor:
        threshold = round(density * (1 << 32))
        kept = torch.from_numpy(tile.random_bits(method, model) < np.uint64(threshold))
        return kept.to(as_tensor(tile.raw[model]).device, torch.float32)

    return tile.remember(("drawn", method, model, density), decide)


@dataclass(frozen=True, slots=True)
class L1Kept(Reduction):
    """Σ |δᵢ| over the elements that a density keeps: by magnitude, or by the coin of `method` when it is named."""

    model: str
    base: str
    density: float
    dtype: str
    method: str | None = None

    def ask(self, tile: Tile) -> None:
        if self.method is None:
            threshold_of(tile, self.model, self.base, self.density)

    def of(self, tile: Tile) -> list[float]:
        kept = (
            largest(tile, self.model, self.base, self.density)
            if self.method is None
            else drawn(tile, self.method, self.model, self.density)
        )
        return unit_sums(tile.delta(self.model, self.base, self.dtype).abs() * kept)

    def combine(self, shares: Sequence[float]) -> float:
        return math.fsum(shares)
