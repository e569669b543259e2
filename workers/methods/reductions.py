"""Facts about a whole tensor that some methods need before they can merge its first element.

Every sum is taken in float64 by a fixed tree of element-wise additions, so that it does not depend on the processor's
vector width, on a GPU's block order or on how many tiles were in memory at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate, combinations_with_replacement
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.agreement import overlap_counts, variance_bits
from workers.methods.kernels.dtypes import ARITHMETIC, CODES
from workers.methods.kernels.masks import MOST_MASKS, Mask, Words
from workers.methods.kernels.memory import are_pairs
from workers.methods.kernels.random import random_below
from workers.methods.kernels.ranks import (
    EVERY,
    Bracket,
    Ends,
    Limit,
    above,
    below_by_rank,
    bracketed,
    magnitudes,
    magnitudes_bracketed,
)
from workers.methods.kernels.short_products import LEAST_UNIT, products_of_two
from workers.methods.kernels.unit_sums import Product, kept_sums
from workers.methods.kernels.unit_sums import unit_sums as sums_of_products
from workers.methods.tile import FACT_UNITS, TILE_ELEMENTS, Array, Reduction, Tile, as_tensor, together

if TYPE_CHECKING:
    from torch import Tensor

IntArray = NDArray[Any]

SAMPLED = 61
"""Of so many runs of `SAMPLED_RUN` scores one is in the sample of a tensor, so that few lines of memory are read.

A prime: a sample of a matrix has elements of all columns."""

SAMPLED_RUN = 4

MARGINS = (5.0, 50.0, None)
"""Those of `Cutoff`, one after the other."""


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


def _total(shares: Iterable[float]) -> float:
    """Σ of the units, rounded once. Infinities of both signs, and sums too large for float64, give NaN."""
    try:
        return math.fsum(shares)
    except (ValueError, OverflowError):
        return math.nan


def host_arrays(tile: Tile, *names: str) -> list[Array] | None:
    """The elements of parents, if compiled loops can read them: in the memory of the host, in a dtype of theirs."""
    arrays = [
        np.ascontiguousarray(each)
        for name in names
        if isinstance(each := tile.raw[name], np.ndarray) and each.dtype in CODES
    ]
    return arrays if len(arrays) == len(names) else None


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
            of_two = len(self.models) == 2 and self.dtype == "float64" and are_pairs(arrays)
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
        matrix[upper] = [_total(of_pair) for of_pair in zip(*shares, strict=True)]
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
        return _total(shares)


def _units(elements: Array) -> list[Array]:
    return [elements[start : start + TILE_ELEMENTS] for start in range(0, len(elements), TILE_ELEMENTS)]


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
        return [int(np.count_nonzero(unit)) for unit in _units(self.score.on_host(tile))]

    def combine(self, shares: Sequence[int]) -> int:
        return sum(shares)


@dataclass(frozen=True, slots=True)
class Sample(Reduction):
    """One score of 61 as bits, sorted: the one sort of a tensor, which bounds the place of every rank."""

    units: ClassVar[int] = 2 * FACT_UNITS
    score: Score

    def ask(self, tile: Tile) -> None:
        self.score.ask(tile)

    def of(self, tile: Tile) -> list[IntArray]:
        return [self.score.sampled(tile, first_sampled(tile))]

    def combine(self, shares: Sequence[IntArray]) -> IntArray:
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

    def ends(self, sample: IntArray, elements: int) -> Ends:
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
    if not any(counts):  # without the scores
        bits = sum(1 << place for place, count in enumerate(counts) if count is None)
        return np.full(tile.elements, bits, np.uint16)
    found = [None if count is None else threshold_of(tile, score, count) for count in counts]
    return above(score.on_host(tile), [limit_of(tile, each) for each in found])


def among_on_host(tile: Tile, threshold: Threshold, score: Score) -> NDArray[np.bool_]:
    """Which elements of a tile a threshold on their scores keeps."""
    return above(score.on_host(tile), [limit_of(tile, threshold)]) != 0


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


def first_found(tile: Tile, questions: Iterable[Reduction]) -> Any:
    """The first answer that is not None, or `NotYetKnown`."""
    return next(answer for each in questions if (answer := tile.known(each)) is not None)


def share_of(tile: Tile, density: float) -> int:
    """How many elements of the whole tensor a density keeps: at least one."""
    return max(1, int(density * math.prod(tile.shape)))


@dataclass(frozen=True, slots=True)
class Coin:
    """Keeps an element with probability `density`, by the random bits of (method, model): see `Tile.random_bits`.

    With a `spread`, the probability of the smallest |δ| of a row is density − spread, that of the largest is
    density + spread, and it grows by equal steps between them; of equal ones the first counts as the smaller. A row of
    one element has the density.
    """

    method: str
    density: float
    spread: float = 0.0

    @property
    def limit(self) -> int:
        """An element is kept if its 32 random bits are below this, without a spread."""
        return round(self.density * (1 << 32))

    def by_rank(self, tile: Tile) -> bool:
        """Whether elements of a row have different probabilities."""
        return bool(self.spread) and tile.row > 1

    def limits(self, row: int) -> NDArray[np.uint32]:
        """By the rank in a row of so many elements: an element is kept if its random bits are below this."""
        steps = np.arange(row) / (row - 1)
        chances = self.density - self.spread + 2 * self.spread * steps
        return np.rint(chances * (1 << 32)).clip(0, (1 << 32) - 1).astype(np.uint32)


@dataclass(frozen=True, slots=True, eq=False)
class Drawn:
    """What some coins have decided for elements from the unit `first` on: each coin has a bit of a word.

    What one coin has decided is held as bytes, of eight elements each.
    """

    coins: Mapping[Coin, int]
    words: IntArray
    first: int

    def held(self) -> Drawn:
        """The same in as little memory as can be had fast."""
        return self if len(self.coins) > 1 else replace(self, words=np.packbits(self.words != 0))

    def part(self, first: int, end: int) -> Words:
        """The words of units `[first, end)`, of which the last may be cut short."""
        begin, stop = (TILE_ELEMENTS * (unit - self.first) for unit in (first, end))
        if self.words.dtype == np.uint16:
            return cast(Words, self.words[begin:stop])
        return np.unpackbits(cast("NDArray[np.uint8]", self.words[begin // 8 : stop // 8])).astype(np.uint16)


def _draw(tile: Tile, coins: Sequence[Coin], model: str, base: str) -> Drawn:
    """Lets at most 16 coins of one method decide, which all or none go by rank."""
    places = {coin: place for place, coin in enumerate(coins)}
    method = coins[0].method
    if coins[0].by_rank(tile):
        rows = _whole_rows(tile, model, base)
        sizes, numbers = Magnitude(model, base).on_host(rows), tile.random_bits(method, model)
        words = below_by_rank(
            sizes, tile.row, numbers, [coin.limits(tile.row) for coin in coins], tile.start - rows.start
        )
    else:
        limits = [coin.limit for coin in coins]
        words = random_below(tile.random_key(method, model), tile.start, tile.elements, limits)
    return Drawn(places, words, tile.units[0])


def _drawn_groups(tile: Tile, coins: Iterable[Coin]) -> Iterator[Sequence[Coin]]:
    """Coins that `_draw` lets decide together."""
    alike: dict[tuple[str, bool], list[Coin]] = {}
    for coin in dict.fromkeys(coins):
        alike.setdefault((coin.method, coin.by_rank(tile)), []).append(coin)
    for group in alike.values():
        for first in range(0, len(group), MOST_MASKS):
            yield group[first : first + MOST_MASKS]


def _whole_rows(tile: Tile, model: str, base: str) -> Tile:
    """The rows of which a tile has a part."""
    first, end = tile.start // tile.row * tile.row, -(-(tile.start + tile.elements) // tile.row) * tile.row
    inside = slice(first - tile.around_start, end - tile.around_start)
    assert inside.start >= 0 and inside.stop <= len(tile.around[model]), "read without the whole rows of a tile"
    return Tile(tile.tensor, first, {name: tile.around[name][inside] for name in (model, base)}, {})


@dataclass(frozen=True, slots=True)
class Selection:
    """The elements of a task vector that are kept: by a coin, or by |δ| the `most` largest (None: all) `but` so many.

    `but` counts the very largest, which are dropped; 0 ≤ but ≤ most.
    """

    most: int | None = None
    but: int = 0
    coin: Coin | None = None

    def among(self, tile: Tile, model: str, base: str) -> Threshold | None:
        """What keeps the `most` largest."""
        return None if self.most is None else threshold_of(tile, Magnitude(model, base), self.most)

    def beyond(self, tile: Tile, model: str, base: str) -> Threshold | None:
        """What drops the largest."""
        return threshold_of(tile, Magnitude(model, base), self.but) if self.but else None

    def mask(self, tile: Tile, model: str, base: str) -> Tensor:
        """1 where an element is kept, else 0."""
        if self.coin is not None:
            return drawn(tile, self.coin, model, base)
        score = Magnitude(model, base)
        if self.most is None:
            return 1 - largest(tile, score, self.but)
        most = largest(tile, score, self.most)
        return most - largest(tile, score, self.but) if self.but else most


def drawn(tile: Tile, coin: Coin, model: str, base: str) -> Tensor:
    """Which elements a coin keeps, element by element: 1 or 0 as uint8, where the model's elements are."""
    elements = tile.raw[model]
    if isinstance(elements, np.ndarray) or not runs_on(str(elements.device)):
        mask = drawn_on_host(tile, coin, model, base).array()
        return as_tensor(mask.view(np.uint8)).to(as_tensor(elements).device)

    def decide() -> Tensor:
        from workers.methods.gpu_kernels.random import drawn as drawn_there

        limits = _limits_by_rank(tile, coin, model, base) if coin.by_rank(tile) else coin.limit
        return drawn_there(tile.random_key(coin.method, model), tile.start, tile.elements, limits, elements.device)

    return tile.remember(("drawn", coin, model, base), decide)


def runs_on(device: str) -> bool:
    """Whether the loops of `gpu_kernels` run on a device."""
    from workers.methods.gpu_kernels.launch import runs_on  # imports Triton, where it is installed

    return runs_on(device)


def _limits_by_rank(tile: Tile, coin: Coin, model: str, base: str) -> Tensor:
    """`Coin.limits` of the ranks of all elements, as int32, where the model's elements are."""
    import torch

    rows = _whole_rows(tile, model, base)
    sizes = Magnitude(model, base).bits(rows).view(-1, tile.row)
    of_ranks = torch.from_numpy(coin.limits(tile.row).view(np.int32)).to(sizes.device)
    limits = torch.empty_like(sizes)
    at_once = max(1, _SORTED_ON_GPU // tile.row)
    for some, into in zip(sizes.split(at_once), limits.split(at_once), strict=True):
        into.scatter_(1, some.sort(dim=1, stable=True).indices, of_ranks.expand(some.shape))
    return limits.view(-1)[tile.start - rows.start :][: tile.elements]


_SORTED_ON_GPU = 1 << 24
"""Elements that are sorted at a time: their places take 128 MiB."""


def draw_together(tile: Tile, coins: Iterable[Coin], model: str, base: str) -> None:
    """Decides for several coins, which `drawn_on_host` finds then: they share random bits, and ranks of rows."""
    open_: list[Coin] = []
    for coin in dict.fromkeys(coins):
        if (before := _drawn_before(tile, coin, model, base)) is not None:
            tile.remember((coin, model, base), lambda before=before: before)
        else:
            open_.append(coin)
    for group in _drawn_groups(tile, open_):
        decided = _draw(tile, group, model, base)
        for coin, place in decided.coins.items():
            tile.remember((coin, model, base), lambda words=decided.words, place=place: Mask(words, place))


def drawn_on_host(tile: Tile, coin: Coin, model: str, base: str) -> Mask:
    """The same as `drawn` in the memory of the host."""

    def decide() -> Mask:
        if (before := _drawn_before(tile, coin, model, base)) is not None:
            return before
        return Mask(_draw(tile, [coin], model, base).words)

    return tile.remember((coin, model, base), decide)


DRAWN = Reduction()
"""The fact that holds what coins have decided for another fact, where the pass over the tensor follows soon."""

MOST_DRAWN = 128 << 20
"""Bytes of such decisions that are held."""


@dataclass(slots=True)
class DrawnBefore:
    """`DRAWN`: what was decided of each unit of each tensor, by (coin, model, base, tensor, unit)."""

    bytes: int = 0
    held: dict[tuple[Coin, str, str, str, int], Drawn] = field(
        default_factory=dict["tuple[Coin, str, str, str, int]", Drawn]
    )


def _keep_drawn(tile: Tile, decided: Drawn, model: str, base: str) -> None:
    before: DrawnBefore | None = tile.facts.get(DRAWN)
    if before is None or before.bytes >= MOST_DRAWN:
        return
    kept = decided.held()
    before.bytes += kept.words.nbytes
    for unit in range(*tile.units):
        for coin in kept.coins:
            before.held[coin, model, base, tile.tensor, unit] = kept


def _drawn_before(tile: Tile, coin: Coin, model: str, base: str) -> Mask | None:
    """What a coin has decided for all elements of a tile, if that is held."""
    before: DrawnBefore | None = tile.facts.get(DRAWN)
    if before is None:
        return None
    runs: list[tuple[Drawn, int, int]] = []
    """What has decided for units `[first, end)`."""
    for unit in range(*tile.units):
        decided = before.held.get((coin, model, base, tile.tensor, unit))
        if decided is None:
            return None
        if runs and runs[-1][0] is decided:
            runs[-1] = decided, runs[-1][1], unit + 1
        else:
            runs.append((decided, unit, unit + 1))
    place = runs[0][0].coins[coin]
    if any(decided.coins[coin] != place for decided, _, _ in runs):
        return None

    def words() -> Words:
        parts = [decided.part(first, end) for decided, first, end in runs]
        return (parts[0] if len(parts) == 1 else np.concatenate(parts))[: tile.elements]

    return Mask(tile.remember(("words", *runs), words), place)


@dataclass(frozen=True, slots=True)
class L1Kept(Reduction):
    """Σ |δᵢ| over the elements of one task vector that are kept."""

    model: str
    base: str
    kept: Selection
    dtype: str

    def ask(self, tile: Tile) -> None:
        together(partial(limit, tile, self.model, self.base) for limit in (self.kept.among, self.kept.beyond))

    def of(self, tile: Tile) -> list[float]:
        if (arrays := host_arrays(tile, self.model, self.base)) and self.dtype in ARITHMETIC:
            return _sums_together(tile, self, arrays, self.masks_on_host)
        if isinstance(tile.raw[self.model], np.ndarray):
            coins = (each.kept.coin for each in _group_of(tile, self)[0])
            draw_together(tile, (coin for coin in coins if coin is not None), self.model, self.base)
        mask = self.kept.mask(tile, self.model, self.base)
        return unit_sums(tile.delta(self.model, self.base, self.dtype).abs() * mask)

    def masks_on_host(self, tile: Tile, group: Sequence[L1Kept]) -> list[Mask]:
        """Which elements count for each of a group."""
        model, base = self.model, self.base
        masks: dict[Selection, Mask] = {}
        for coins in _drawn_groups(tile, (each.kept.coin for each in group if each.kept.coin is not None)):
            decided = _draw(tile, coins, model, base)
            _keep_drawn(tile, decided, model, base)
            masks |= {Selection(coin=coin): Mask(decided.words, place) for coin, place in decided.coins.items()}
        if by_rank := [*dict.fromkeys(each.kept for each in group if each.kept.coin is None)]:
            most, but = [each.most for each in by_rank], [each.but for each in by_rank]
            score = Magnitude(model, base)
            words = largest_on_host(tile, score, most) & ~largest_on_host(tile, score, but)
            masks |= {kept: Mask(words, place) for place, kept in enumerate(by_rank)}
        return [masks[each.kept] for each in group]

    def combine(self, shares: Sequence[float]) -> float:
        return _total(shares)


@dataclass(frozen=True, slots=True)
class SquaresSelected(Reduction):
    """Σ δᵢ² of one task vector, in float64, over the `count` elements of the largest variance; None: over all."""

    model: str
    base: str
    score: Variance
    count: int | None
    dtype: str

    def ask(self, tile: Tile) -> None:
        if self.count is not None:
            threshold_of(tile, self.score, self.count)

    def of(self, tile: Tile) -> list[float]:
        if (arrays := host_arrays(tile, self.model, self.base)) and self.dtype in ARITHMETIC:
            return _sums_together(tile, self, arrays, self.masks_on_host)
        squares = tile.delta(self.model, self.base, self.dtype).double().square()
        if self.count is not None:
            squares = squares * largest(tile, self.score, self.count)
        return unit_sums(squares)

    def masks_on_host(self, tile: Tile, group: Sequence[SquaresSelected]) -> list[Mask]:
        """Which elements count for each of a group."""
        counts = [each.count for each in group]
        words = tile.remember(  # the models share them
            ("largest on host", self.score, *counts), lambda: largest_on_host(tile, self.score, counts)
        )
        return [Mask(words, place) for place in range(len(group))]

    def combine(self, shares: Sequence[float]) -> float:
        return _total(shares)


_KeptSum = TypeVar("_KeptSum", L1Kept, SquaresSelected)

SUMMED_TOGETHER = MOST_MASKS
"""Sums of one task vector that are found in one look."""


def _group_of(tile: Tile, question: _KeptSum) -> tuple[Sequence[_KeptSum], int]:
    """The sums of the same task vector that are found with this one, of a grid's settings, and its place among them."""
    kind = type(question)

    def groups() -> dict[_KeptSum, tuple[Sequence[_KeptSum], int]]:
        alike: dict[tuple[Any, ...], list[_KeptSum]] = {}
        for each in tile.asked:
            if isinstance(each, kind):
                alike.setdefault((each.model, each.base, each.dtype, getattr(each, "score", None)), []).append(each)
        cut = [
            of_vector[first : first + SUMMED_TOGETHER]
            for of_vector in alike.values()
            for first in range(0, len(of_vector), SUMMED_TOGETHER)
        ]
        return {each: (group, place) for group in cut for place, each in enumerate(group)}

    return tile.remember(("groups", kind), groups).get(question, ([question], 0))


def _sums_together(
    tile: Tile,
    question: _KeptSum,
    arrays: Sequence[Array],
    masks_of: Callable[[Tile, Sequence[_KeptSum]], Sequence[Mask]],
) -> list[float]:
    """The shares of a question, found with those of the questions beside it."""
    group, place = _group_of(tile, question)

    def found() -> NDArray[np.float64]:
        (model, base), masks = arrays, masks_of(tile, group)
        squares = isinstance(question, SquaresSelected)
        return kept_sums(model, base, masks, squares=squares, unit=TILE_ELEMENTS, dtype=question.dtype)

    return tile.remember(("kept sums", group[0]), found)[:, place].tolist()


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
            units = zip(*(_units(each) for each in arrays), strict=True)
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
