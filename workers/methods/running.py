"""Passes over arrays in the memory of the host: all points of a tile at once, by compiled loops."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from workers.methods.coins import Coin, draw_together, drawn_on_host
from workers.methods.kernels.agreement import run_overlap, run_selected, run_tall
from workers.methods.kernels.consensus import Mixture, Trimmed, run_mixtures
from workers.methods.kernels.fisher_mean import run_fisher_means
from workers.methods.kernels.masks import MOST_MASKS
from workers.methods.kernels.relaxation import Relaxation, run_relaxations
from workers.methods.kernels.swap import run_swaps
from workers.methods.kernels.weighted_sum import Sum, WeightedSums
from workers.methods.nearswap import NO_DISTANCE
from workers.methods.passes import (
    Consensus,
    FisherMean,
    Kept,
    MatrixSum,
    Overlap,
    Pass,
    Relaxed,
    SelectedConsensus,
    Swap,
    TallConsensus,
    WeightedSum,
)
from workers.methods.ranking import Variance, limit_of, selected
from workers.methods.regression import rows_of, summed
from workers.methods.sce import LEAST_DIVISOR
from workers.methods.tile import TILE_ELEMENTS, Array, Tile

Flags = tuple[NDArray[np.bool_], NDArray[np.bool_]]

MERGED_UNITS = 8
"""`TILE_ELEMENTS` in memory of merges that are relaxed: Python takes as long for a piece of any size."""


def run(
    passes: Sequence[Pass], tile: Tile, outputs: Sequence[Array], arithmetic: str
) -> tuple[dict[str, bool], list[bool]]:
    """Writes each pass's elements to its output, rounded once from the arithmetic dtype; outputs share one dtype.

    Returns for each parent that was read, and for each output, whether it has an element that is NaN or infinite.
    """
    broken: dict[str, bool] = {}
    overflowed = [False] * len(passes)
    first: dict[int, int] = {}  # points that differ in their factors alone are neighbours
    alike: dict[type, list[int]] = {}
    for index, each in enumerate(passes):
        alike.setdefault(_kind(each), []).append(index)
    for kind, chosen in alike.items():
        chosen.sort(key=lambda index: first.setdefault(id(_merged(passes[index])), index))
        places: dict[str, int] = {}
        of_parents, of_outputs = RUNNERS[kind](
            [passes[index] for index in chosen], places, tile, [outputs[index] for index in chosen], arithmetic
        )
        broken.update((name, bool(of_parents[place])) for name, place in places.items())
        for index, flag in zip(chosen, of_outputs.tolist(), strict=True):
            overflowed[index] = flag
    return broken, overflowed


def _kind(each: Pass) -> type:
    """The type of the loop for a pass."""
    inner = type(_merged(each))
    return inner if inner in (WeightedSum, Consensus) else type(each)


def _merged(each: Pass) -> Pass:
    """The pass before its relaxation."""
    return each.merged if isinstance(each, Relaxed) else each


def _relaxations(passes: Sequence[Pass]) -> Iterator[tuple[Any, Relaxation | None, bool]]:
    """Each pass before its relaxation, that, and whether the former is that of the pass before."""
    before: Pass | None = None
    for each in passes:
        merged = _merged(each)
        yield merged, Relaxation(each.factors, each.places) if isinstance(each, Relaxed) else None, merged is before
        before = merged


def _weighted_sums(
    passes: Sequence[WeightedSum | Relaxed],
    places: dict[str, int],
    tile: Tile,
    outputs: Sequence[Array],
    arithmetic: str,
) -> Flags:
    alike = tuple(
        (each.models, each.base, tuple(float(number).hex() for number in each.coefficients))  # 0.0 is not −0.0
        for each in passes
        if isinstance(each, WeightedSum) and each.along == "tensor"
    )
    names, sums = _prepared_once(alike, arithmetic) if len(alike) == len(passes) else _prepared(passes, arithmetic)
    places |= {name: place for place, name in enumerate(names)}
    return sums.run(_parents(places, tile), outputs, start=tile.start, row=tile.row)


@lru_cache(maxsize=64)
def _prepared_once(
    alike: Sequence[tuple[tuple[str, ...], str | None, Sequence[str]]], arithmetic: str
) -> tuple[Sequence[str], WeightedSums]:
    """Sums with the same coefficients in many tensors, as those of `linear`; coefficients are hexadecimal.

    To prepare them takes as long as to merge 100,000 elements.
    """
    passes = [WeightedSum(models, tuple(map(float.fromhex, numbers)), base) for models, base, numbers in alike]
    return _prepared(passes, arithmetic)


def _prepared(passes: Sequence[WeightedSum | Relaxed], arithmetic: str) -> tuple[Sequence[str], WeightedSums]:
    """The parents in the order in which they are read, and the sums over them."""
    places: dict[str, int] = {}
    sums = [
        Sum(
            tuple(
                (_place(model, places), number) for model, number in zip(each.models, each.coefficients, strict=True)
            ),
            None if each.base is None else _place(each.base, places),
            each.along,
            relaxation,
            repeats,
        )
        for each, relaxation, repeats in _relaxations(passes)
    ]
    return [*places], WeightedSums(len(places), sums, arithmetic)


def _consensus(
    passes: Sequence[Consensus | Relaxed], places: dict[str, int], tile: Tile, outputs: Sequence[Array], arithmetic: str
) -> Flags:
    coins: dict[tuple[str, str], list[Coin]] = {}
    for each, _, _ in _relaxations(passes):
        for kept in each.kept:
            if kept.coin is not None:
                coins.setdefault((kept.model, each.base), []).append(kept.coin)
    for (model, base), of_pair in coins.items():
        draw_together(tile, of_pair, model, base)
    vectors: dict[tuple[Any, ...], int] = {}  # a task vector that several points trim alike is trimmed once
    trimmed: list[Trimmed] = []

    def place(kept: Kept, base: str) -> int:
        key = (kept.model, base, id(kept.among), id(kept.beyond), kept.coin, kept.factor, kept.score)
        if key not in vectors:
            vectors[key] = len(trimmed)
            trimmed.append(_trimmed(kept, base, places, tile))
        return vectors[key]

    mixtures = [
        Mixture(
            _place(each.base, places),
            tuple((place(kept, each.base), kept.weight) for kept in each.kept),
            each.elect,
            each.normalize,
            each.scale,
            relaxation,
            repeats,
        )
        for each, relaxation, repeats in _relaxations(passes)
    ]
    return run_mixtures(_parents(places, tile), trimmed, mixtures, outputs, arithmetic, tile.start)


def _selected(
    passes: Sequence[SelectedConsensus],
    places: dict[str, int],
    tile: Tile,
    outputs: Sequence[Array],
    arithmetic: str,
) -> Flags:
    def run(points: Sequence[int], parents: Sequence[Array]) -> Flags:
        of_first, some = passes[points[0]], [passes[index] for index in points]
        # a weight that is not finite makes every element NaN, selected or not
        thresholds = [each.among if all(map(math.isfinite, each.weights)) else None for each in some]
        words = selected(tile, Variance(of_first.models, of_first.base), thresholds)
        into = [outputs[index] for index in points]
        return run_selected(parents, [each.weights for each in some], LEAST_DIVISOR, words, into, arithmetic)

    return _by_parents([(*each.models, each.base) for each in passes], places, tile, run, at_once=MOST_MASKS)


def _overlap(
    passes: Sequence[Overlap], places: dict[str, int], tile: Tile, outputs: Sequence[Array], arithmetic: str
) -> Flags:
    def run(points: Sequence[int], parents: Sequence[Array]) -> Flags:
        each = passes[points[0]]
        return run_overlap(parents, each.factors, each.epsilon, outputs[points[0]], arithmetic)

    return _by_parents([(*each.models, each.base) for each in passes], places, tile, run, at_once=1)


def _tall(
    passes: Sequence[TallConsensus], places: dict[str, int], tile: Tile, outputs: Sequence[Array], arithmetic: str
) -> Flags:
    def run(points: Sequence[int], parents: Sequence[Array]) -> Flags:
        each = passes[points[0]]
        return run_tall(parents, each.weights, each.ratios, each.k, each.scale, outputs[points[0]], arithmetic)

    return _by_parents([(*each.models, each.base) for each in passes], places, tile, run, at_once=1)


def _swaps(
    passes: Sequence[Swap], places: dict[str, int], tile: Tile, outputs: Sequence[Array], arithmetic: str
) -> Flags:
    def run(points: Sequence[int], parents: Sequence[Array]) -> Flags:
        (base, other), into = parents, [outputs[index] for index in points]
        return run_swaps(base, other, [passes[index].t for index in points], NO_DISTANCE, into, arithmetic)

    return _by_parents([(each.base, each.model) for each in passes], places, tile, run)


def _matrix_sums(
    passes: Sequence[MatrixSum], places: dict[str, int], tile: Tile, outputs: Sequence[Array], arithmetic: str
) -> Flags:
    first, end = rows_of(tile)
    inside = slice(tile.start - first, tile.start - first + tile.elements)
    rows: dict[str, Array] = {}
    for name in dict.fromkeys(name for each in passes for name in (*each.models, each.base)):
        _place(name, places)
        elements = tile.around[name][first - tile.around_start : end - tile.around_start]
        rows[name] = cast(Array, elements).astype(arithmetic).reshape(-1, tile.row)
    deltas = {
        (name, base): rows[name] - rows[base]
        for name, base in dict.fromkeys((name, each.base) for each in passes for name in each.models)
    }
    overflowed: list[bool] = []
    for each, output in zip(passes, outputs, strict=True):
        steps = [deltas[name, each.base] for name in each.models]
        merged = summed(rows[each.base], steps, each.matrices).reshape(-1)[inside]
        copy = Sum(((0, 1.0),), None, "tensor", None, False)
        _, (flag,) = WeightedSums(1, [copy], arithmetic).run([merged], [output], start=tile.start, row=tile.row)
        overflowed.append(bool(flag))
    broken = [not np.isfinite(rows[name].reshape(-1)[inside]).all() for name in places]
    return np.array(broken, np.bool_), np.array(overflowed, np.bool_)


def _fisher_means(
    passes: Sequence[FisherMean], places: dict[str, int], tile: Tile, outputs: Sequence[Array], arithmetic: str
) -> Flags:
    def run(points: Sequence[int], parents: Sequence[Array]) -> Flags:
        of_first, weights = passes[points[0]], [passes[index].weights for index in points]
        into = [outputs[index] for index in points]
        return run_fisher_means(parents, weights, of_first.inverse, of_first.floor, into, arithmetic)

    names = [(*each.models, *each.fishers) for each in passes]
    return _by_parents(names, places, tile, run, [(each.inverse, each.floor) for each in passes])


def _relaxed(
    passes: Sequence[Relaxed], places: dict[str, int], tile: Tile, outputs: Sequence[Array], arithmetic: str
) -> Flags:
    """Passes whose own loops do not relax: merges into memory that stays in a cache, once for all factors."""
    merges: dict[int, Pass] = {id(each.merged): each.merged for each in passes}
    points = {merge: [index for index, each in enumerate(passes) if id(each.merged) == merge] for merge in merges}
    step = TILE_ELEMENTS * max(1, MERGED_UNITS // len(merges))
    memory = np.empty((len(merges), min(step, tile.elements)), arithmetic)
    flags: dict[str, bool] = {}
    overflowed = np.zeros(len(passes), np.bool_)
    for first in range(0, tile.elements, step):
        part = slice(first, min(first + step, tile.elements))
        raw = {name: elements[part] for name, elements in tile.raw.items()}
        smaller = replace(tile, start=tile.start + first, raw=raw, _memory={})
        merged = [line[: smaller.elements] for line in memory]
        for name, flag in run([*merges.values()], smaller, merged, arithmetic)[0].items():
            _place(name, places)
            flags[name] = flags.get(name, False) or flag
        for line, chosen in zip(merged, points.values(), strict=True):
            of_first = passes[chosen[0]]
            overflowed[chosen] |= run_relaxations(
                cast(Array, raw[of_first.base]),
                line,
                [passes[index].factors for index in chosen],
                of_first.places,
                smaller.start,
                [outputs[index][part] for index in chosen],
            )
    return np.array([flags[name] for name in places], np.bool_), overflowed


def _by_parents(
    names: Sequence[Sequence[str]],
    places: dict[str, int],
    tile: Tile,
    run: Callable[[Sequence[int], Sequence[Array]], Flags],
    others: Sequence[Hashable] = (),
    *,
    at_once: int | None = None,
) -> Flags:
    """Points that read the same parents, and are alike in `others`, in one run of at most so many."""
    flags: dict[str, bool] = {}
    overflowed = np.zeros(len(names), np.bool_)
    alike: dict[Hashable, list[int]] = {}
    for index, key in enumerate(zip(names, others, strict=True) if others else names):
        alike.setdefault(key, []).append(index)
    for group in alike.values():
        parents = [cast(Array, tile.raw[name]) for name in names[group[0]]]
        for first in range(0, len(group), at_once or len(group)):
            points = group[first : first + (at_once or len(group))]
            of_parents, overflowed[points] = run(points, parents)
            for name, flag in zip(names[points[0]], of_parents.tolist(), strict=True):
                _place(name, places)
                flags[name] = flags.get(name, False) or flag
    return np.array([flags[name] for name in places], np.bool_), overflowed


def _trimmed(kept: Kept, base: str, places: dict[str, int], tile: Tile) -> Trimmed:
    return Trimmed(
        _place(kept.model, places),
        _place(base, places),
        None if kept.among is None else limit_of(tile, kept.among),
        None if kept.beyond is None else limit_of(tile, kept.beyond),
        None if kept.coin is None else drawn_on_host(tile, kept.coin, kept.model, base),
        kept.factor,
        None if kept.score is None else kept.score.factors(tile),
    )


def _place(name: str, places: dict[str, int]) -> int:
    return places.setdefault(name, len(places))


def _parents(places: dict[str, int], tile: Tile) -> list[Array]:
    return [cast(Array, tile.raw[name]) for name in places]


RUNNERS: dict[type, Callable[..., Flags]] = {
    WeightedSum: _weighted_sums,
    Consensus: _consensus,
    SelectedConsensus: _selected,
    Overlap: _overlap,
    TallConsensus: _tall,
    Swap: _swaps,
    MatrixSum: _matrix_sums,
    FisherMean: _fisher_means,
    Relaxed: _relaxed,
}
"""The passes that have a compiled loop."""
