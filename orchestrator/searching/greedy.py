"""A greedy soup: which of several models go into an average, decided one after the other by paired tests.

The best single model by its score on all items is the first soup. Then the others are tried, the next best first: the
soup with the model against the soup without it, on the same items, rung by rung as in a race. A model **stays** where
the soup is surely not worse with it: its loss, with the allowance of the race's test, is below `MARGIN`. It **leaves**
where the soup is surely worse with it, or where all items leave the question open. The level `ALPHA` is split over the
models and the rungs, so that a search keeps a model that costs `MARGIN` or more with a probability of 5 % at the most.

Greedy soups are those of Wortsman et al. 2022 (arXiv 2203.05482), which keep a model whose soup scores as high on one
held-out set, whatever the noise.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from jobs.search import Choice, Space
from orchestrator.judging.pairing import Pairing
from orchestrator.judging.race import LEAST_HAYSTACKS
from orchestrator.judging.samples import FloatArray, student_quantile

ALPHA = 0.05
MARGIN = 1.0
"""Points of 100 that a model may cost; that of a gate by default."""


@dataclass(frozen=True, slots=True)
class Ingredient:
    """The verdict on a model: `gain` is the score of the soup with it less that without it, in points of 100.

    `allowed` is the allowance of the test, in points, on `items` items a cell.
    """

    model: str
    stays: bool
    gain: float
    allowed: float
    items: int
    reason: str


@dataclass(frozen=True, slots=True)
class Soup:
    """The soup so far, None before all models have answered alone; `tried` is open at `items` items a cell, or None."""

    choice: Choice | None
    ingredients: tuple[Ingredient, ...]
    tried: Choice | None
    items: int


def singles(space: Space) -> tuple[Choice, ...]:
    """Each model alone, in the order of the file."""
    (names,) = space.subsets.values()
    columns = [index for index, axis in enumerate(space.axes) if axis.name in names]
    return tuple(tuple(int(index == column) for index in range(len(space.axes))) for column in columns)


def soup(
    space: Space, scores: Mapping[Choice, FloatArray], pairing: Pairing, rungs: Sequence[int], *, haystack: int
) -> Soup:
    """The soup by these scores [cells, items], of the items that each point has answered from the first one on."""
    alone = singles(space)
    if any(choice not in scores or scores[choice].shape[1] < rungs[-1] for choice in alone):
        return Soup(None, (), None, rungs[-1])
    values = {choice: float(pairing.parts(scores[choice]).sum()) for choice in alone}
    first, *others = sorted(alone, key=lambda choice: (-values[choice], alone.index(choice)))
    current, found = first, [_first(space, first, values[first], rungs[-1])]
    tail = ALPHA / (len(others) * len(rungs))
    for other in others:
        tried = tuple(map(max, current, other))
        verdict: Ingredient | None = None
        for items in rungs:
            if min(scores[each].shape[1] if each in scores else 0 for each in (current, tried)) < items:
                return Soup(current, tuple(found), tried, items)
            if items // haystack >= LEAST_HAYSTACKS or items == rungs[-1]:
                pair = scores[current][:, :items], scores[tried][:, :items]
                verdict = _verdict(_model(space, other), pairing, *pair, tail, last=items == rungs[-1])
            if verdict is not None:
                break
        assert verdict is not None, "the last rung decides"
        found.append(verdict)
        current = tried if verdict.stays else current
    return Soup(current, tuple(found), None, rungs[-1])


def _model(space: Space, alone: Choice) -> str:
    ((model,),) = space.members(alone).values()
    return model


def _first(space: Space, alone: Choice, score: float, items: int) -> Ingredient:
    return Ingredient(
        _model(space, alone), True, 0.0, 0.0, items, f"the best alone: {100 * score:.1f} on {items} items a cell"
    )


def _verdict(
    model: str, pairing: Pairing, without: FloatArray, with_it: FloatArray, tail: float, *, last: bool
) -> Ingredient | None:
    """None while the question is open and there are more items."""
    items = without.shape[1]
    loss, spare = pairing.gap(without, with_it), pairing.spare(without, with_it, MARGIN / 100)
    multiplier = student_quantile(1 - tail, loss.degrees_of_freedom)
    allowed = multiplier * loss.standard_error
    worse, kept = loss.size > allowed and loss.rare <= tail, spare.size > allowed and spare.rare <= tail
    if not (worse or kept or last):
        return None
    gain = f"{-100 * loss.size:+.2f} ± {100 * allowed:.2f} points on {items} items a cell"
    if worse:
        reason = f"surely worse with it: {gain}"
    elif kept:
        reason = f"surely not worse with it by {MARGIN:.1f} points: {gain}"
    else:
        reason = f"not sure: {gain}, and at most {MARGIN:.1f} points may be lost"
    return Ingredient(model, kept and not worse, -100 * loss.size, 100 * allowed, items, reason)
