"""Which elements of a task vector a method keeps, and the norms of what is kept, for all settings of a grid at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from workers.methods.coins import Coin, draw, draw_together, drawn, drawn_groups, keep_drawn
from workers.methods.kernels.dtypes import ARITHMETIC
from workers.methods.kernels.masks import MOST_MASKS, Mask
from workers.methods.kernels.unit_sums import kept_sums
from workers.methods.ranking import Magnitude, Threshold, Variance, largest, largest_on_host, threshold_of
from workers.methods.reductions import total, unit_sums
from workers.methods.tile import TILE_ELEMENTS, Array, Reduction, Tile, host_arrays, together

if TYPE_CHECKING:
    from torch import Tensor


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


@dataclass(frozen=True, slots=True)
class L1Kept(Reduction):
    """Σ |δᵢ| over the elements of one task vector that are kept."""

    model: str
    base: str
    kept: Selection
    dtype: str

    @property
    def alike(self) -> tuple[object, ...]:
        """Sums that have this in common are found in one look."""
        return self.model, self.base, self.dtype

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
        for coins in drawn_groups(tile, (each.kept.coin for each in group if each.kept.coin is not None)):
            decided = draw(tile, coins, model, base)
            keep_drawn(tile, decided, model, base)
            masks |= {Selection(coin=coin): Mask(decided.words, place) for coin, place in decided.coins.items()}
        if by_rank := [*dict.fromkeys(each.kept for each in group if each.kept.coin is None)]:
            most, but = [each.most for each in by_rank], [each.but for each in by_rank]
            score = Magnitude(model, base)
            words = largest_on_host(tile, score, most) & ~largest_on_host(tile, score, but)
            masks |= {kept: Mask(words, place) for place, kept in enumerate(by_rank)}
        return [masks[each.kept] for each in group]

    def combine(self, shares: Sequence[float]) -> float:
        return total(shares)


@dataclass(frozen=True, slots=True)
class SquaresSelected(Reduction):
    """Σ δᵢ² of one task vector, in float64, over the `count` elements of the largest variance; None: over all."""

    model: str
    base: str
    score: Variance
    count: int | None
    dtype: str

    @property
    def alike(self) -> tuple[object, ...]:
        """See `L1Kept.alike`."""
        return self.model, self.base, self.score, self.dtype

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
        return total(shares)


_KeptSum = TypeVar("_KeptSum", L1Kept, SquaresSelected)

SUMMED_TOGETHER = MOST_MASKS
"""Sums of one task vector that are found in one look."""


def _group_of(tile: Tile, question: _KeptSum) -> tuple[Sequence[_KeptSum], int]:
    """The sums of the same task vector that are found with this one, of a grid's settings, and its place among them."""
    kind = type(question)

    def groups() -> dict[_KeptSum, tuple[Sequence[_KeptSum], int]]:
        alike: dict[tuple[object, ...], list[_KeptSum]] = {}
        for each in tile.asked:
            if isinstance(each, kind):
                alike.setdefault(each.alike, []).append(each)
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
