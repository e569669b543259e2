"""Passes over arrays in the memory of the host: all points of a tile at once, by compiled loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from workers.methods.kernels.weighted_sum import Sum, WeightedSums
from workers.methods.passes import WeightedSum
from workers.methods.tile import Array, Tile


def run(
    passes: Sequence[WeightedSum], tile: Tile, outputs: Sequence[Array], arithmetic: str
) -> tuple[set[str], list[bool]]:
    """Writes each pass's elements to its output, rounded once from the arithmetic dtype; outputs share one dtype.

    Returns the parents that have an element that is NaN or infinite, and for each output whether it has one.
    """
    places: dict[str, int] = {}
    sums = [_sum(each, places) for each in passes]
    parents = [cast(Array, tile.raw[name]) for name in places]
    broken, overflowed = WeightedSums(len(parents), sums, arithmetic).run(
        parents, outputs, start=tile.start, row=tile.row
    )
    return {name for name, place in places.items() if broken[place]}, overflowed.tolist()


def _sum(each: WeightedSum, places: dict[str, int]) -> Sum:
    terms = tuple(
        (places.setdefault(model, len(places)), coefficient)
        for model, coefficient in zip(each.models, each.coefficients, strict=True)
    )
    return Sum(terms, None if each.base is None else places.setdefault(each.base, len(places)), each.along)
