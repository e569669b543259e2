"""What a search found, for its report: the trace of the best point, a bound of the regret, each axis, the surface.

All of it is a function of the batches and the scores: it comes from the model that chose the points, at the end. The
figures are in the unit of the first objective: points of 100, or tokens.

**Regret bound.** The 95 % quantile, over 512 joint draws f of the posterior, of max f(x) − f(best): the maximum is over
the mergeable points x of the space that keep the constraints in this draw, the best is the incumbent. Both have the
same draw, so that the noise of shared items cancels. Of a space of more than 512 points, as many Sobol points and all
asked ones count.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from jobs.expressions import format_number
from jobs.search import Choice, Space
from orchestrator.searching import greedy
from orchestrator.searching.encoding import all_choices, decoded
from orchestrator.searching.proposing import Evidence, Model, draws, generator, resolved, sequence
from orchestrator.searching.search import Search

NORMAL = 1.96
"""Standard deviations on each side of a 95 % interval."""
DRAWS = 512
MOST_LOOKED_AT = 512
MOST_STEPS = 24
"""Closed batches in the trace, evenly chosen, the last always."""
BASE, MOST_LEVELS = 64, 9
"""The importance of an axis is measured at so many places of the others, and at so many values of its own."""
MOST_ALONE, MOST_PAIRED = 101, 11
"""Values along an axis that is shown alone, and along one of two."""
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Step:
    """The search when a batch was closed: points so far, the best by the model, its 95 % interval, the regret bound."""

    batch: int
    points: int
    best: str
    score: float
    low: float
    high: float
    regret: float


@dataclass(frozen=True, slots=True)
class Share:
    """The share from 0 to 1 of the variance over the space that an axis explains alone, with its 95 % interval."""

    axis: str
    share: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Place:
    """A place of the surface: its values, the model's mean, half of its 95 % interval, and the point asked there.

    `behind` is half of the 95 % interval of the difference from the best place shown.
    """

    at: tuple[str, ...]
    mean: float
    half: float
    behind: float
    point: str | None


@dataclass(frozen=True, slots=True)
class Measured:
    """A point as the model sees it: its figures, half of their 95 % interval by its own items, and these items a cell.

    `figures` are the model's means of all objectives, the first as in `Verdict.shown`. `value` and `half` are those of
    the first one, without the model: by the point's items, corrected by what others score on them.
    """

    point: str
    figures: tuple[float, ...]
    value: float
    half: float
    items: int


@dataclass(frozen=True, slots=True)
class Findings:
    """All of it. `others` says where the axes stand that `surface` does not show; it is empty without a model of them.

    `size` is the number of points of the space. `front` has the points of the front of several objectives.
    """

    size: int
    objectives: tuple[str, ...]
    sure: bool
    steps: tuple[Step, ...]
    points: tuple[Measured, ...]
    front: tuple[str, ...]
    importance: tuple[Share, ...]
    axes: tuple[str, ...]
    others: str
    surface: tuple[Place, ...]
    ingredients: tuple[greedy.Ingredient, ...] = ()
    """Of a greedy soup: the verdict on each model that was tried, in this order."""

    def document(self) -> dict[str, Any]:
        """For evaluation.json."""
        return asdict(self)

    @classmethod
    def read(cls, document: Mapping[str, Any]) -> Findings:
        """The findings in a document."""
        return cls(
            size=document["size"],
            objectives=tuple(document["objectives"]),
            sure=document["sure"],
            steps=tuple(Step(**each) for each in document["steps"]),
            points=tuple(Measured(**each | {"figures": tuple(each["figures"])}) for each in document["points"]),
            front=tuple(document["front"]),
            importance=tuple(Share(**each) for each in document["importance"]),
            axes=tuple(document["axes"]),
            others=document["others"],
            surface=tuple(Place(**each | {"at": tuple(each["at"])}) for each in document["surface"]),
            ingredients=tuple(greedy.Ingredient(**each) for each in document.get("ingredients", ())),
        )


def findings(search: Search, seed: int) -> Findings | None:
    """The findings of a search; None before a batch of points is closed."""
    spec, space = search.spec, search.spec.space
    names, evidence, verdict = search.evidence(search.closed - 1)
    if not names:
        return None
    objective = spec.maximize[0]
    unit = objective.sign * (1.0 if objective.metric.startswith("output_tokens") else 100.0)
    smooth = resolved(space, spec.by) == "gp"
    models = [Model(space, evidence.choices, figure, smooth=smooth) for figure in evidence.objectives]
    units = [each.sign * (1.0 if each.metric.startswith("output_tokens") else 100.0) for each in spec.maximize]
    means = [verdict.shown * units[0]]
    means += [model.at(evidence.choices).mean * scale for model, scale in zip(models[1:], units[1:], strict=True)]
    rows = {row.choice: row for row in search.standing()}
    asked = {choice: row.point for choice, row in rows.items()}
    measured = [
        Measured(
            name,
            tuple(_rounded(mean[index]) for mean in means),
            _rounded(evidence.objectives[0].means[index] * unit),
            _rounded(NORMAL * abs(unit) * np.sqrt(evidence.objectives[0].noise[index, index])),
            rows[choice].items,
        )
        for index, (name, choice) in enumerate(zip(names, evidence.choices, strict=True))
    ]
    varying = [index for index, axis in enumerate(space.axes) if len(axis.values) > 1]
    shares: list[Share] = []
    axes: list[int] = []
    if smooth and varying:
        shares = _importance(space, models[0], seed) if len(varying) > 1 else []
        chosen = [each.axis for each in shares[:2]] or [space.axes[varying[0]].name]
        axes = [index for index, axis in enumerate(space.axes) if axis.name in chosen]
    leader = search.leader(search.closed - 1)
    assert leader is not None, "there are points"
    best = evidence.choices[leader]
    return Findings(
        size=space.size,
        objectives=tuple(each.document() for each in spec.maximize),
        sure=search.sure,
        steps=_steps(search, seed, unit),
        points=tuple(measured),
        front=tuple(row.point for row in search.front()) if len(spec.maximize) > 1 else (),
        importance=tuple(shares),
        axes=tuple(space.axes[index].name for index in axes),
        others=_others(space, best, axes),
        surface=_surface(search, models[0], best, axes, unit, asked) if axes else (),
        ingredients=search.soup(search.closed - 1).ingredients if spec.by == "greedy" else (),
    )


def regret_bound(
    space: Space,
    evidence: Evidence,
    best: int,
    *,
    smooth: bool,
    seed: int,
    mergeable: Callable[[Choice], bool] = lambda choice: True,
) -> float:
    """As this file says, in shares of 1; without a model of the surface, over the points that were asked."""
    looked_at = evidence.choices
    if smooth:
        more = (
            all_choices(space)
            if space.size <= MOST_LOOKED_AT
            else decoded(space, sequence(space, generator(seed, 1), MOST_LOOKED_AT))
        )
        looked_at = tuple(dict.fromkeys((*evidence.choices, *filter(mergeable, more))))
    random = generator(seed, 2)
    drawn = draws(Model(space, evidence.choices, evidence.objectives[0], smooth=smooth).at(looked_at), random, DRAWS)
    kept = np.ones(drawn.shape, dtype=np.bool_)
    for figure in evidence.constraints:
        kept &= draws(Model(space, evidence.choices, figure, smooth=smooth).at(looked_at), random, DRAWS) >= 0
    above = np.where(kept, drawn - drawn[:, [best]], 0.0).max(axis=1)
    return float(np.quantile(np.maximum(above, 0.0), 0.95))


def _steps(search: Search, seed: int, unit: float) -> tuple[Step, ...]:
    """The trace, over batches that asked something."""
    closed = [batch.number for batch in search.batches[: search.closed] if batch.proposals or batch.promotions]
    if len(closed) > MOST_STEPS:
        closed = [closed[index] for index in np.linspace(0, len(closed) - 1, MOST_STEPS).round().astype(int).tolist()]
    smooth = resolved(search.spec.space, search.spec.by) == "gp"
    found: list[Step] = []
    for number in closed:
        names, evidence, verdict = search.evidence(number)
        best = search.leader(number)
        assert best is not None, "the batch asked something"
        score, half = float(verdict.shown[best]) * unit, NORMAL * float(verdict.spread[best]) * abs(unit)
        space, mergeable = search.spec.space, search.mergeable
        regret = regret_bound(space, evidence, best, smooth=smooth, seed=seed, mergeable=mergeable) * abs(unit)
        found.append(
            Step(
                number,
                len(names),
                names[best],
                _rounded(score),
                _rounded(score - half),
                _rounded(score + half),
                _rounded(regret),
            )
        )
    return tuple(found)


def _importance(space: Space, model: Model, seed: int) -> list[Share]:
    """The first-order index of Sobol' 1993 of each axis, over draws of the posterior; the largest first.

    Other axes stand at Sobol points, the same for each value of the axis. On a simplex or a subset the axis moves in
    the unit cube, so that its partners give way.
    """
    base = sequence(space, generator(seed, 3), BASE)
    found: list[Share] = []
    for column, axis in enumerate(space.axes):
        count = min(MOST_LEVELS, len(axis.values))
        if count < 2:
            continue
        cube = np.tile(base, (count, 1))
        cube[:, column] = np.repeat((np.arange(count) + 0.5) / count, BASE)
        choices = decoded(space, cube)
        distinct = [*dict.fromkeys(choices)]
        place = {choice: index for index, choice in enumerate(distinct)}
        drawn = draws(model.at(distinct), generator(seed, 4), DRAWS)[:, [place[choice] for choice in choices]]
        by_value = drawn.reshape(DRAWS, count, BASE).mean(axis=2)
        shares = by_value.var(axis=1) / np.maximum(drawn.var(axis=1), 1e-18)
        low, middle, high = np.quantile(shares, [0.025, 0.5, 0.975]).tolist()
        found.append(Share(axis.name, _rounded(middle), _rounded(low), _rounded(high)))
    return sorted(found, key=lambda one: -one.share)


def _surface(
    search: Search, model: Model, best: Choice, axes: Sequence[int], unit: float, asked: Mapping[Choice, str]
) -> tuple[Place, ...]:
    """The model over one or two axes, the others at the best point; without places that are no merges of the space."""
    space = search.spec.space
    most = MOST_ALONE if len(axes) == 1 else MOST_PAIRED
    levels = [
        sorted({*np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist(), best[axis]})
        for axis in axes
        for count in [len(space.axes[axis].values)]
    ]
    if len(axes) == 1:  # also where points were asked
        levels = [sorted({*levels[0], *(point[axes[0]] for point in asked if _same(point, best, axes[0]))})]
    choices: list[Choice] = []
    for index in np.ndindex(*map(len, levels)):
        moved = moved_to(space, best, {axis: of[at] for axis, of, at in zip(axes, levels, index, strict=True)})
        if moved is not None and (moved in asked or search.mergeable(moved)):
            choices.append(moved)
    surface = model.at(choices)
    top = int(np.argmax(surface.mean))
    variance = np.diag(surface.covariance)
    apart = np.sqrt(np.maximum(variance + variance[top] - 2 * surface.covariance[top], 0.0))
    return tuple(
        Place(
            tuple(_word(space, axis, choice) for axis in axes),
            _rounded(float(surface.mean[index]) * unit),
            _rounded(NORMAL * abs(unit) * float(surface.spread[index])),
            _rounded(NORMAL * abs(unit) * float(apart[index])),
            asked.get(choice),
        )
        for index, choice in enumerate(choices)
    )


def _same(point: Choice, other: Choice, axis: int) -> bool:
    """Whether the two differ on this axis alone, if at all."""
    return point[:axis] == other[:axis] and point[axis + 1 :] == other[axis + 1 :]


def moved_to(space: Space, choice: Choice, wanted: Mapping[int, int]) -> Choice | None:
    """The point with these values on these axes; the partners in a simplex keep their ratios. None if there is none."""
    moved = [*choice]
    for axis, value in wanted.items():
        moved[axis] = value
    number = {axis.name: index for index, axis in enumerate(space.axes)}
    for group in space.simplexes:
        columns = [number[name] for name in group]
        partners = [column for column in columns if column not in wanted]
        rest = len(space.axes[columns[0]].values) - 1 - sum(moved[column] for column in columns if column in wanted)
        if len(partners) in (0, len(columns)):
            continue
        if rest < 0:
            return None
        old = np.array([choice[column] for column in partners], dtype=np.float64)
        exact = rest * (old if old.sum() else np.ones(len(partners))) / (old.sum() or len(partners))
        whole = np.floor(exact).astype(int)
        order = np.argsort(whole - exact, kind="stable")[: rest - int(whole.sum())]
        whole[order] += 1
        for column, value in zip(partners, whole.tolist(), strict=True):
            moved[column] = value
    found = tuple(moved)
    return found if space.admits(found) else None


def _others(space: Space, best: Choice, shown: Sequence[int]) -> str:
    """`x=0.3, method=ties`: the axes that are not shown, at the best point."""
    return ", ".join(
        f"{axis.name}={_word(space, index, best)}"
        for index, axis in enumerate(space.axes)
        if index not in shown and len(axis.values) > 1
    )


def _word(space: Space, axis: int, choice: Choice) -> str:
    value = space.axes[axis].values[choice[axis]]
    return value if isinstance(value, str) else format_number(value)


def _rounded(value: float) -> float:
    """With so few digits that the last bits of another machine's arithmetic do not show."""
    return round(float(value), DIGITS)
