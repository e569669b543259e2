"""The elements of a tensor by rank: how large each is, and which are the k largest of the whole tensor.

A cutoff is found exactly by two looks: one at a sample, and one at what lies between two quantiles of the sample.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.agreement import variance_bits
from workers.methods.kernels.masks import Words
from workers.methods.kernels.ranks import (
    EVERY,
    NONE,
    Bracket,
    Ends,
    Limit,
    above,
    bracketed,
    magnitudes,
    magnitudes_bracketed,
)
from workers.methods.tile import FACT_UNITS, TILE_ELEMENTS, Reduction, Tile, first_found, host_arrays, units_of

if TYPE_CHECKING:
    from torch import Tensor

SAMPLED = 61
"""Of so many runs of `SAMPLED_RUN` scores one is in the sample of a tensor, so that few lines of memory are read.

A prime: a sample of a matrix has elements of all columns."""

SAMPLED_RUN = 4

MARGINS = (5.0, 50.0, None)
"""Those of `Cutoff`, one after the other."""


class Score:
    """A float32 number, not negative, for each element: the elements of a tensor are ranked by it.

    Subclasses are frozen dataclasses.
    """

    def ask(self, tile: Tile) -> None:
        """Asks `tile.known` for the facts that must be known before this score."""

    def bits(self, tile: Tile) -> Tensor:
        """The scores as int32, whose order is the order of the scores: the sign bit is clear. A NaN is the greatest."""
        raise NotImplementedError

    def on_host(self, tile: Tile) -> NDArray[np.int32]:
        """The same in the memory of the host."""
        return self.bits(tile).cpu().numpy()

    def sampled(self, tile: Tile, first: int) -> NDArray[np.int32]:
        """Every `SAMPLED`-th run of scores, from run `first` of a tile on, in the memory of the host."""
        raise NotImplementedError

    def bracketed(self, tile: Tile, ends: Sequence[Ends]) -> list[Bracket]:
        """Where the scores of each unit lie, for several brackets."""
        if any(not isinstance(elements, np.ndarray) for elements in tile.raw.values()):
            return [_bracketed_there(self.bits(tile), *each) for each in ends]
        return bracketed(self.on_host(tile), ends, unit=TILE_ELEMENTS)


def thinned(tile: Tile, first: int, *names: str) -> Tile:
    """Every `SAMPLED`-th run of elements of these parents, from run `first` of a tile on."""

    def part(elements: Any) -> Any:
        whole = elements[: len(elements) // SAMPLED_RUN * SAMPLED_RUN]
        if not isinstance(elements, np.ndarray):
            return whole.view(-1, SAMPLED_RUN)[first::SAMPLED].reshape(-1)
        runs = whole.view(f"V{SAMPLED_RUN * elements.itemsize}")
        return runs[first::SAMPLED].copy().view(elements.dtype)

    return Tile(tile.tensor, tile.start, {name: part(tile.raw[name]) for name in names}, {})


def _bracketed_there(bits: Tensor, low: int, high: int) -> Bracket:
    """`bracketed` where the scores are: only counts, and the scores between, come to the host."""
    import torch

    counts: list[list[int]] = []
    between: list[NDArray[np.int32]] = [np.empty(0, np.int32)]
    whole = bits.numel() // TILE_ELEMENTS * TILE_ELEMENTS
    for part, unit in ((bits[:whole], TILE_ELEMENTS), (bits[whole:], bits.numel() - whole)):
        if not part.numel():
            continue
        units = part.view(-1, unit)
        inside = (units > low) & (units < high)
        kinds = units > high, units == high, (units == low) & (low != high), inside
        counts += torch.stack([each.sum(dim=1) for each in kinds], dim=1).tolist()
        between.append(units[inside].cpu().numpy())
    return Bracket(low, high, np.array(counts, np.int64).reshape(-1, 4), np.concatenate(between))


@dataclass(frozen=True, slots=True)
class Magnitude(Score):
    """|δ| of one task vector."""

    model: str
    base: str

    def sampled(self, tile: Tile, first: int) -> NDArray[np.int32]:
        return self.on_host(thinned(tile, first, self.model, self.base))

    def bits(self, tile: Tile) -> Tensor:
        import torch

        return tile.remember(self, lambda: tile.delta(self.model, self.base, "float32").abs().view(torch.int32))

    def on_host(self, tile: Tile) -> NDArray[np.int32]:
        if arrays := host_arrays(tile, self.model, self.base):
            model, base = arrays
            return tile.remember(("on host", self), lambda: magnitudes(model, base))
        return self.bits(tile).cpu().numpy()

    def bracketed(self, tile: Tile, ends: Sequence[Ends]) -> list[Bracket]:
        if arrays := host_arrays(tile, self.model, self.base):
            model, base = arrays
            return magnitudes_bracketed(model, base, ends, unit=TILE_ELEMENTS)
        return Score.bracketed(self, tile, ends)


@dataclass(frozen=True, slots=True)
class Variance(Score):
    """n times the variance of δ over n models, in float32: Σ (δᵢ − m)² with m = Σ δᵢ · (1/n), from left to right.

    With a `dtype`, it is torch's variance in that dtype, which mergekit takes.
    """

    models: tuple[str, ...]
    base: str
    dtype: str | None = None

    def sampled(self, tile: Tile, first: int) -> NDArray[np.int32]:
        return self.on_host(thinned(tile, first, *self.models, self.base))

    def bits(self, tile: Tile) -> Tensor:
        import torch

        def compute() -> Tensor:
            if self.dtype is not None:
                stacked = torch.stack([tile.delta(model, self.base, self.dtype) for model in self.models])
                return stacked.var(dim=0, unbiased=False).float().abs().view(torch.int32)
            deltas = [tile.delta(model, self.base, "float32") for model in self.models]
            mean = sum(deltas[1:], deltas[0]) * (1 / len(deltas))
            squares = [(delta - mean).square_() for delta in deltas]
            return sum(squares[1:], squares[0]).abs().view(torch.int32)  # without abs, a NaN may have a sign

        return tile.remember(self, compute)

    def on_host(self, tile: Tile) -> NDArray[np.int32]:
        if self.dtype is None and (arrays := host_arrays(tile, *self.models, self.base)):
            return tile.remember(("on host", self), lambda: variance_bits(arrays))
        return self.bits(tile).cpu().numpy()


@dataclass(frozen=True, slots=True)
class Nonzero(Reduction):
    """How many scores are not zero."""

    score: Score

    def of(self, tile: Tile) -> list[int]:
        return [int(np.count_nonzero(unit)) for unit in units_of(self.score.on_host(tile))]

    def combine(self, shares: Sequence[int]) -> int:
        return sum(shares)


@dataclass(frozen=True, slots=True)
class Sample(Reduction):
    """One score of 61 as bits, sorted: the one sort of a tensor, which bounds the place of every rank."""

    units: ClassVar[int] = 2 * FACT_UNITS
    score: Score

    def ask(self, tile: Tile) -> None:
        self.score.ask(tile)

    def of(self, tile: Tile) -> list[NDArray[Any]]:
        return [self.score.sampled(tile, first_sampled(tile))]

    def combine(self, shares: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.sort(np.concatenate(shares))


def first_sampled(tile: Tile) -> int:
    """The first run of a tile that is in the sample."""
    return -(tile.start // SAMPLED_RUN) % SAMPLED


@dataclass(frozen=True, slots=True)
class Threshold:
    """The k greatest scores of a tensor: all above `bits`, and the first `equals` of those equal to it.

    `equal_before[u]` counts the equal ones in the units before unit u.
    """

    bits: int
    equals: int
    equal_before: Sequence[int]


@dataclass(frozen=True, slots=True)
class Cutoff(Reduction):
    """The `count`-th greatest score exactly, 1 ≤ count ≤ elements: a `Threshold`, or None if it was not found.

    Only what lies between two quantiles of the sample, `margin` standard errors around the wanted one, is looked at
    closely. That this misses is possible and noticed; then a greater margin is asked for, and None means everything.
    """

    units: ClassVar[int] = 2 * FACT_UNITS
    score: Score
    count: int
    margin: float | None

    def ask(self, tile: Tile) -> None:
        tile.known(Sample(self.score))

    def of(self, tile: Tile) -> list[Bracket]:
        group = tile.remember("cutoffs of a score", partial(self._groups, tile.asked)).get(self, [self])

        def found() -> dict[Cutoff, Bracket]:
            sample, elements = tile.known(Sample(self.score)), math.prod(tile.shape)
            ends = [each.ends(sample, elements) for each in group]
            return dict(zip(group, self.score.bracketed(tile, ends), strict=True))

        return [tile.remember(("brackets", group[0]), found)[self]]

    @staticmethod
    def _groups(asked: Iterable[Reduction]) -> dict[Cutoff, list[Cutoff]]:
        """Each with those of the same score, of all settings of a grid: they are found in one look."""
        alike: dict[Score, list[Cutoff]] = {}
        for each in asked:
            if isinstance(each, Cutoff):
                alike.setdefault(each.score, []).append(each)
        return {each: group for group in alike.values() for each in group}

    def ends(self, sample: NDArray[Any], elements: int) -> Ends:
        """The scores between which the one of this rank lies among so many elements."""
        lowest, highest = 0, int(np.iinfo(np.int32).max)
        if self.margin is None or not sample.size:
            return lowest, highest
        density = self.count / elements
        rank = density * sample.size
        slack = self.margin * math.sqrt(rank * (1 - density)) + 2
        below, above = math.ceil(sample.size - rank + slack), math.floor(sample.size - rank - slack)
        return (
            int(sample[above]) if above >= 0 else lowest,
            int(sample[below]) if below < sample.size else highest,
        )

    def combine(self, shares: Sequence[Bracket]) -> Threshold | None:
        larger, at_high, at_low, inside = np.concatenate([each.counts for each in shares]).T
        wanted = self.count - int(larger.sum())
        if wanted < 1:
            return None
        if wanted <= (highest := int(at_high.sum())):
            return _threshold(shares[0].high, wanted, at_high)
        wanted -= highest
        between = np.concatenate([each.between for each in shares])
        if wanted <= between.size:
            bits = int(np.partition(between, -wanted)[-wanted])
            units = np.searchsorted(np.cumsum(inside), np.flatnonzero(between == bits), side="right")
            equal = np.bincount(units, minlength=inside.size)
            return _threshold(bits, wanted - int(np.count_nonzero(between > bits)), equal)
        wanted -= between.size
        return _threshold(shares[0].low, wanted, at_low) if wanted <= at_low.sum() else None


def _threshold(bits: int, equals: int, equal: NDArray[np.int64]) -> Threshold:
    """From the number of equal ones in each unit."""
    return Threshold(bits, equals, [0, *accumulate(equal.tolist())])


def largest(tile: Tile, score: Score, count: int) -> Tensor:
    """1 for the `count` greatest scores of the whole tensor (of equals, the first), 0 for the rest."""
    import torch

    def decide() -> Tensor:
        threshold = threshold_of(tile, score, count)
        first, end = tile.units
        room = threshold.equals - threshold.equal_before[first]
        equal_here = threshold.equal_before[end] - threshold.equal_before[first]
        bits = score.bits(tile)
        if room >= equal_here or room <= 0:
            mask = torch.empty(bits.shape, dtype=torch.float32, device=bits.device)
            return torch.gt(bits, threshold.bits - (room > 0), out=mask)
        equal = bits == threshold.bits
        return ((bits > threshold.bits) | (equal & (torch.cumsum(equal, dim=0) <= room))).to(torch.float32)

    return tile.remember(("largest", score, count), decide)


def largest_on_host(tile: Tile, score: Score, counts: Sequence[int | None]) -> Words:
    """The same on the host for at most 16 counts, each with a bit; None: all scores."""
    return selected(tile, score, [None if count is None else threshold_of(tile, score, count) for count in counts])


def selected(tile: Tile, score: Score, thresholds: Sequence[Threshold | None]) -> Words:
    """For each score a word: bit s says whether threshold s keeps it. There are at most 16; None keeps all."""
    limits = [limit_of(tile, each) for each in thresholds]
    if all(each in (Limit(EVERY), Limit(NONE)) for each in limits):  # without the scores
        bits = sum(1 << place for place, each in enumerate(limits) if each.bits == EVERY)
        return np.full(tile.elements, bits, np.uint16)
    return above(score.on_host(tile), limits)


def among_on_host(tile: Tile, threshold: Threshold, score: Score) -> NDArray[np.bool_]:
    """Which elements of a tile a threshold on their scores keeps."""
    return selected(tile, score, [threshold]) != 0


def limit_of(tile: Tile, threshold: Threshold | None) -> Limit:
    """A threshold as it holds for a tile: some of the elements equal to it may have been counted before. None: all."""
    if threshold is None:
        return Limit(EVERY)
    first, end = tile.units
    room = threshold.equals - threshold.equal_before[first]
    if room <= 0:
        return Limit(threshold.bits)
    if room >= threshold.equal_before[end] - threshold.equal_before[first]:
        return Limit(threshold.bits - 1)
    return Limit(threshold.bits, room)


def threshold_of(tile: Tile, score: Score, count: int) -> Threshold:
    """Which elements the `count` greatest scores keep (0: none), or `NotYetKnown`."""
    if count <= 0:
        units = -(-math.prod(tile.shape) // TILE_ELEMENTS)
        return Threshold(int(np.iinfo(np.int32).max), 0, [0] * (units + 1))
    return first_found(tile, (Cutoff(score, count, margin) for margin in MARGINS))


def share_of(tile: Tile, density: float) -> int:
    """How many elements of the whole tensor a density keeps: at least one."""
    return max(1, int(density * math.prod(tile.shape)))
