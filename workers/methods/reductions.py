"""Facts about a whole tensor that some methods need before they can merge its first element.

Every sum is taken in float64 by a fixed tree of element-wise additions, so that it does not depend on the processor's
vector width, on a GPU's block order or on how many tiles were in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from workers.methods.tile import TILE_ELEMENTS, Reduction, Tile

_HIGH_BITS = 15
"""|δ| as float32 bits is ordered like an integer; its upper half indexes the histogram, its lower 15 bits refine it."""


def unit_sums(values: Tensor) -> list[float]:
    """Σ values in float64 for each `TILE_ELEMENTS` unit, always added in the same order."""
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
        return unit_sums(tile.parent(self.a, torch.float64) * tile.parent(self.b, torch.float64))

    def combine(self, shares: Sequence[list[float]]) -> float:
        return math.fsum(chain.from_iterable(shares))


@dataclass(frozen=True, slots=True)
class L1(Reduction):
    """Σ |δᵢ| of one task vector."""

    model: str
    base: str
    dtype: torch.dtype

    def of(self, tile: Tile) -> list[float]:
        return unit_sums(tile.delta(self.model, self.base, self.dtype).abs())

    def combine(self, shares: Sequence[list[float]]) -> float:
        return math.fsum(chain.from_iterable(shares))


def magnitude_bits(tile: Tile, model: str, base: str) -> Tensor:
    """|δ| as int32 whose order is the order of magnitudes (float32, positive, so the sign bit is clear)."""
    return tile.remember(
        ("magnitude", model, base), lambda: tile.delta(model, base, torch.float32).abs().view(torch.int32)
    )


@dataclass(frozen=True, slots=True)
class MagnitudeHistogram(Reduction):
    """How many |δᵢ| share each value of their upper 16 bits: int64 [65536]. One serves every density."""

    model: str
    base: str

    def of(self, tile: Tile) -> Tensor:
        return torch.bincount(magnitude_bits(tile, self.model, self.base) >> _HIGH_BITS, minlength=1 << 16)

    def combine(self, shares: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(shares)).sum(dim=0)


@dataclass(frozen=True, slots=True)
class Cutoff(Reduction):
    """The k-th largest |δᵢ| exactly, k = max(1, ⌊density · elements⌋): (its float32 bits, equals kept)."""

    model: str
    base: str
    density: float

    def _bin(self, tile: Tile) -> tuple[int, int]:
        """The histogram bin that holds the k-th largest, and how many of that bin are kept."""
        histogram: Tensor = tile.known(MagnitudeHistogram(self.model, self.base))
        kept = max(1, int(self.density * int(histogram.sum())))
        from_largest = torch.cumsum(histogram.flip(0), dim=0)
        above = int(torch.searchsorted(from_largest, kept))
        return (1 << 16) - 1 - above, kept - (int(from_largest[above - 1]) if above else 0)

    def of(self, tile: Tile) -> tuple[int, int, Tensor]:
        bin_index, kept_here = self._bin(tile)
        bits = magnitude_bits(tile, self.model, self.base)
        low = bits[bits >> _HIGH_BITS == bin_index] & ((1 << _HIGH_BITS) - 1)
        return bin_index, kept_here, torch.bincount(low, minlength=1 << _HIGH_BITS)

    def combine(self, shares: Sequence[tuple[int, int, Tensor]]) -> tuple[int, int]:
        bin_index, kept_here, histogram = shares[0][0], shares[0][1], torch.zeros(1 << _HIGH_BITS, dtype=torch.int64)
        for _, _, share in shares:
            histogram += share.to(histogram.device)
        from_largest = torch.cumsum(histogram.flip(0), dim=0)
        above = int(torch.searchsorted(from_largest, kept_here))
        equal_kept = kept_here - (int(from_largest[above - 1]) if above else 0)
        return bin_index << _HIGH_BITS | ((1 << _HIGH_BITS) - 1 - above), equal_kept


@dataclass(frozen=True, slots=True)
class EqualBefore(Reduction):
    """Before each unit, how many earlier elements equal the cutoff: a stable order among equals needs it."""

    cutoff: Cutoff

    def of(self, tile: Tile) -> list[int]:
        threshold, _ = tile.known(self.cutoff)
        equal = magnitude_bits(tile, self.cutoff.model, self.cutoff.base) == threshold
        return [int(torch.count_nonzero(unit)) for unit in equal.split(TILE_ELEMENTS)]

    def combine(self, shares: Sequence[list[int]]) -> list[int]:
        return [0, *np.cumsum(list(chain.from_iterable(shares))).tolist()]


def largest(tile: Tile, model: str, base: str, density: float) -> Tensor:
    """Which elements are among the ⌊density · elements⌋ largest |δ| of the whole tensor; of equals, the first: bool."""

    def decide() -> Tensor:
        cutoff = Cutoff(model, base, density)
        threshold, quota = tile.known(cutoff)
        equal_before = tile.known(EqualBefore(cutoff))
        first, end = tile.units
        room = quota - equal_before[first]
        equal_here = equal_before[end] - equal_before[first]
        bits = magnitude_bits(tile, model, base)
        if room >= equal_here:
            return bits >= threshold
        if room <= 0:
            return bits > threshold
        equal = bits == threshold
        return (bits > threshold) | (equal & (torch.cumsum(equal, dim=0) <= room))

    return tile.remember(("largest", model, base, density), decide)


def drawn(tile: Tile, method: str, model: str, density: float) -> Tensor:
    """Which elements a coin of probability `density` keeps, element by element: bool."""

    def decide() -> Tensor:
        threshold = round(density * (1 << 32))
        kept = torch.from_numpy(tile.random_bits(method, model) < np.uint64(threshold))
        return kept.to(tile.raw[model].device)

    return tile.remember(("drawn", method, model, density), decide)


@dataclass(frozen=True, slots=True)
class L1Kept(Reduction):
    """Σ |δᵢ| over the elements that a density keeps: by magnitude, or by the coin of `method` when it is named."""

    model: str
    base: str
    density: float
    dtype: torch.dtype
    method: str | None = None

    def of(self, tile: Tile) -> list[float]:
        kept = (
            largest(tile, self.model, self.base, self.density)
            if self.method is None
            else drawn(tile, self.method, self.model, self.density)
        )
        return unit_sums(tile.delta(self.model, self.base, self.dtype).abs() * kept)

    def combine(self, shares: Sequence[list[float]]) -> float:
        return math.fsum(chain.from_iterable(shares))
