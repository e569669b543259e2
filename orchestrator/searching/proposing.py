"""The next points: a pure function of the figures so far, the pending points, a number and a seed.

`sobol` and `random` cover the space, `cma-es` draws around the best points (`evolving.py`). `gp` asks where the
improvement is expected to be largest: the incumbent is the best point by posterior mean, not the luckiest score; the
improvement is that of the difference from it, with its posterior variance (noisy expected improvement: Letham et al.
2019; common random numbers: Pearce et al. 2022, arXiv 1910.09259). A pending point is imagined: it has its posterior
mean, and the variance around it shrinks (Ginsbourger et al. 2010). A constraint multiplies by its probability (Gardner
et al. 2014). Several objectives are joined by random augmented Chebyshev weights, new ones for each point (ParEGO:
Knowles 2006).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from jobs.search import By, Choice, Objective, Space
from orchestrator.searching.encoding import all_choices, decoded, encoded, features, scaled, squared_distances
from orchestrator.searching.evolving import evolved, generation_size
from orchestrator.searching.figures import Figures
from orchestrator.searching.surface import Parameters, Surface, fit, kernel, posterior

FloatArray = NDArray[np.float64]
MOST_AXES = 12
"""Axes of numbers up to which `auto` is a Gaussian process."""
LISTED = 1024
"""Spaces of at most so many points are looked at whole; of larger ones, so many points are looked at."""
WIDE = 2
"""In larger spaces one of so many new points of `gp` is of the Sobol sequence: the process foresees nothing far from
its points, and does not look for a narrow high hill beside a wide low one."""
CLIMBS = 4
DRAWS = 512
WIDER = 1.5
"""So many times the posterior's spread are the draws that find the likely winners, whose average is shown: in replays,
the winner's error is 1.0 to 1.5 times the spread. Without it the score was up to 0.4 points too high."""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A new point, and the reason for it in one line."""

    choice: Choice
    reason: str


@dataclass(frozen=True, slots=True)
class Evidence:
    """The figures of the points that were asked: objectives to maximise, constraints to keep at 0 or above."""

    choices: tuple[Choice, ...]
    objectives: tuple[Figures, ...]
    constraints: tuple[Figures, ...] = ()


def resolved(space: Space, by: By) -> By:
    """The method behind `auto`: gp for at most `MOST_AXES` axes of numbers; beyond cma-es, or sobol beside words."""
    if by != "auto":
        return by
    varying = [axis.kind for axis in space.axes if len(axis.values) > 1]
    if varying.count("numbers") <= MOST_AXES:
        return "gp"
    return "sobol" if "words" in varying else "cma-es"


def propose(
    space: Space,
    evidence: Evidence,
    pending: Sequence[Choice],
    *,
    by: By,
    count: int,
    number: int,
    seed: int,
    first: Objective,
    start: Sequence[Choice] = (),
    batch: int = 8,
    mergeable: Callable[[Choice], bool] = lambda choice: True,
) -> tuple[Proposal, ...]:
    """At most `count` mergeable points that were not asked yet: fewer only where the space ends. Reasons name `first`.

    cma-es draws its first points around the mean of `start`, and learns from whole batches of this size.
    """
    by = resolved(space, by)
    known = {*evidence.choices, *pending}
    enough = len(evidence.choices) >= 4
    if by == "cma-es" and count:
        return _evolving(space, evidence, known, count, number, seed, start, batch, mergeable)
    improving: tuple[Proposal, ...] = ()
    covered = len(known)
    if by == "gp" and enough and count:
        wide = sum(at % WIDE == WIDE - 1 for at in range(len(known), len(known) + count)) if space.size > LISTED else 0
        improving = _improving(space, evidence, pending, count - wide, generator(seed, number), first, mergeable)
        known |= {proposal.choice for proposal in improving}
        count, covered = count - len(improving), covered // WIDE
    drawn = _random(space, seed, number) if by == "random" else _sobol(space, seed, covered)
    reason = "drawn at random" if by == "random" else "covers the space (Sobol)"
    return improving + tuple(Proposal(choice, reason) for choice in _unknown(space, drawn, known, count, mergeable))


def _evolving(
    space: Space,
    evidence: Evidence,
    known: Collection[Choice],
    count: int,
    number: int,
    seed: int,
    start: Sequence[Choice],
    batch: int,
    mergeable: Callable[[Choice], bool],
) -> tuple[Proposal, ...]:
    """Points drawn by CMA-ES after all whole generations, in the order of asking."""
    size = generation_size(space, batch)
    whole = [slice(first, first + size) for first in range(0, len(evidence.choices) - size + 1, size)]
    draws = _joined(*_surfaces(space, evidence, smooth=False), generator(seed, 0)) if whole else np.empty((0, 0))
    centre = np.mean([encoded(space, choice) for choice in (start or (space.middle(),))], axis=0)
    key = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    generations = [(evidence.choices[part], draws[:, part]) for part in whole]
    drawn = evolved(space, generations, centre, size=size, seed=key)
    reason = f"drawn by CMA-ES after {len(whole)} generations of {size} points"
    return tuple(Proposal(choice, reason) for choice in _unknown(space, drawn, known, count, mergeable))


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the figures say of the points that were asked, all [points].

    `mean` and `spread` are the posterior's of the first objective; `best` is the probability to be the best point that
    keeps the constraints, `feasible` that of keeping them.

    `shown` is the mean, but of points that likely keep the constraints at most the average of the means over the likely
    winners, those of draws that are `WIDER` than the posterior of a `gp`. Where several points are as good, the highest
    mean is a lucky one, and this average is not (the smoothing of Efron 2014, "Estimation and accuracy after model
    selection"). With several objectives it is the mean.
    """

    mean: FloatArray
    spread: FloatArray
    best: FloatArray
    feasible: FloatArray
    shown: FloatArray


def judge(space: Space, evidence: Evidence, *, by: By, seed: int) -> Verdict:
    """The verdict on the points that were asked; without `gp`, points say nothing about each other."""
    smooth = resolved(space, by) == "gp"
    surfaces, margins = _surfaces(space, evidence, smooth=smooth)
    joined = _joined(surfaces, margins, generator(seed, 0))
    best = _winning(joined)
    feasible = np.prod([_above(margin.mean, margin.spread) for margin in margins] or [np.ones(len(best))], axis=0)
    mean = surfaces[0].mean
    wider = mean + (WIDER if smooth else 1.0) * (joined - mean)
    most = float(_winning(wider) @ mean) if len(surfaces) == 1 else math.inf
    shown = np.where(feasible >= 0.5, np.minimum(mean, most), mean)
    return Verdict(mean, surfaces[0].spread, best, feasible, shown)


def _winning(joined: FloatArray) -> FloatArray:
    """Share of the draws [draws, points] in which each point is the best [points]."""
    return np.bincount(np.argmax(joined, axis=1), minlength=joined.shape[1]) / len(joined)


def _surfaces(space: Space, evidence: Evidence, *, smooth: bool) -> tuple[list[Surface], list[Surface]]:
    """The posteriors of the objectives and of the constraints at the points that were asked."""

    def at_points(figures: Sequence[Figures]) -> list[Surface]:
        return [Model(space, evidence.choices, figure, smooth=smooth).at(evidence.choices) for figure in figures]

    return at_points(evidence.objectives), at_points(evidence.constraints)


def _joined(surfaces: Sequence[Surface], margins: Sequence[Surface], random: np.random.Generator) -> FloatArray:
    """Joint draws [draws, points] of the value of each point; one that breaks a constraint is below all others."""
    kept = np.ones((DRAWS, len(surfaces[0].mean)), dtype=np.bool_)
    for margin in margins:
        kept &= draws(margin, random, DRAWS) >= 0
    values = np.stack([draws(surface, random, DRAWS) for surface in surfaces])
    joined = _chebyshev(values, random) if len(surfaces) > 1 else values[0]
    return np.where(kept, joined, joined - 1e6)


def means_of(space: Space, evidence: Evidence, *, by: By) -> FloatArray:
    """Posterior means [objectives, points] of the points that were asked."""
    smooth = resolved(space, by) == "gp"
    models = [Model(space, evidence.choices, figure, smooth=smooth) for figure in evidence.objectives]
    return np.stack([model.at(evidence.choices).mean for model in models])


class Model:
    """The posterior of one figure: a Gaussian process, or independent points with a common prior."""

    def __init__(self, space: Space, choices: Sequence[Choice], figure: Figures, *, smooth: bool) -> None:
        self._space, self._figure, self._smooth = space, figure, smooth
        seen = features(space, choices)
        if smooth:
            varying = np.array([len(axis.values) > 1 for axis in space.axes])
            found = fit(squared_distances(space, seen, seen)[varying], figure.means, figure.noise)
            lengths = np.ones(len(space.axes))
            lengths[varying] = found.lengths
            self._parameters = Parameters(found.amplitude, lengths, found.nugget)
        else:
            noise = float(np.mean(np.diag(figure.noise)))
            spread = math.sqrt(max(float(np.var(figure.means)) - noise, noise / 16, 1e-6))
            self._parameters = Parameters(spread, np.full(len(space.axes), 1e-6), 0.0)
        self._seen = scaled(space, seen, self._parameters.lengths)
        self._prior = kernel(self._parameters.amplitude, self._seen, self._seen)

    def at(self, choices: Sequence[Choice]) -> Surface:
        """The posterior at these points."""
        parameters = self._parameters
        wanted = scaled(self._space, features(self._space, choices), parameters.lengths)
        nugget = parameters.nugget**2 * np.eye(len(self._seen))
        return posterior(
            self._prior,
            kernel(parameters.amplitude, wanted, self._seen),
            kernel(parameters.amplitude, wanted, wanted),
            self._figure.means,
            self._figure.noise + nugget,
        )


def _improving(
    space: Space,
    evidence: Evidence,
    pending: Sequence[Choice],
    count: int,
    random: np.random.Generator,
    first: Objective,
    mergeable: Callable[[Choice], bool],
) -> tuple[Proposal, ...]:
    """The points of the largest expected improvement, one after the other, each imagined before the next is sought."""
    objectives = [Model(space, evidence.choices, figure, smooth=True) for figure in evidence.objectives]
    constraints = [Model(space, evidence.choices, figure, smooth=True) for figure in evidence.constraints]
    known = (*evidence.choices, *(choice for choice in pending if choice not in evidence.choices))
    top = np.argsort(-objectives[0].at(evidence.choices).mean, kind="stable")[:4]
    pool = _pool(space, [evidence.choices[index] for index in top], {*known}, random)
    if space.size > LISTED and len(objectives) == 1:
        ranked = _climbed(space, pool, evidence.choices[top[0]], objectives[0], constraints, known, random, mergeable)
        pool = _first_mergeable(ranked, LISTED // 2, 8 * max(count, 1), mergeable)
    everywhere = (*known, *pool)
    surfaces = [model.at(everywhere) for model in objectives]
    allowed = _allowed(constraints, everywhere)
    noises = [float(np.median(np.diag(figure.noise))) for figure in evidence.objectives]
    for index in range(len(evidence.choices), len(known)):
        surfaces = [_imagined(surface, index, noise) for surface, noise in zip(surfaces, noises, strict=True)]
    found: list[Proposal] = []
    open_ = np.arange(len(everywhere)) >= len(known)
    while len(found) < count and open_.any():
        looked_at = ~open_
        if len(surfaces) == 1:
            gain, incumbent = _expected_gain(surfaces[0], allowed, looked_at)
        else:
            gain, incumbent = _expected_front_gain(surfaces, looked_at, random)
        worth = np.where(open_, gain * allowed, -np.inf)
        chosen = int(np.argmax(worth))
        open_[chosen] = False
        if not mergeable(everywhere[chosen]):
            continue
        mean, spread = surfaces[0].mean[chosen], surfaces[0].spread[chosen]
        against = space.described(everywhere[incumbent])
        shown = f"foreseen {first.shown(first.sign * float(mean))} ± {first.shown(float(spread))}"
        if len(surfaces) == 1:
            reason = f"expected to improve on {against} by {first.shown(float(gain[chosen]))}; {shown}"
        else:  # whose gain has no unit
            reason = f"expected to exceed {against} by one weighting of the figures; {first.metric} {shown}"
        if constraints:
            reason += f"; keeps the constraints with probability {allowed[chosen]:.2f}"
        found.append(Proposal(everywhere[chosen], reason))
        surfaces = [_imagined(surface, chosen, noise) for surface, noise in zip(surfaces, noises, strict=True)]
    return tuple(found)


def _allowed(constraints: Sequence[Model], choices: Sequence[Choice]) -> FloatArray:
    """The probability that each point keeps the constraints."""
    margins = [model.at(choices) for model in constraints]
    return np.prod([_above(margin.mean, margin.spread) for margin in margins] or [np.ones(len(choices))], axis=0)


def _climbed(
    space: Space,
    pool: Sequence[Choice],
    best: Choice,
    objective: Model,
    constraints: Sequence[Model],
    known: Collection[Choice],
    random: np.random.Generator,
    mergeable: Callable[[Choice], bool],
) -> list[Choice]:
    """The points of the largest expected improvement on `best`, of the pool and of neighbours of the best few of it.

    Neighbours of these are looked at in turn, `CLIMBS` times: in eight axes, few points of a pool are near the maximum.
    The best few can be merged: otherwise all neighbours may lie where no point can.
    """
    worth: dict[Choice, float] = {}
    ranked, new = list[Choice](), [*pool]
    for _ in range(CLIMBS + 1):
        looked_at = np.arange(len(new) + 1) == 0
        gain, _ = _expected_gain(objective.at((best, *new)), np.ones(len(new) + 1), looked_at)
        worth |= dict(zip(new, (gain[1:] * _allowed(constraints, new)).tolist(), strict=True))
        ranked = sorted(worth, key=worth.__getitem__, reverse=True)
        best_few = [*islice(filter(mergeable, ranked), 4)]
        near = dict.fromkeys(_near(space, best_few, random))
        new = [choice for choice in near if choice not in worth and choice not in known]
        if not new:
            break
    return ranked


def _first_mergeable(
    ranked: Sequence[Choice], most: int, enough: int, mergeable: Callable[[Choice], bool]
) -> tuple[Choice, ...]:
    """At most so many of these points, in their order, of which the first `enough` can be merged; others may not be."""
    sure = [*islice(filter(mergeable, ranked), enough)]
    rest = ranked[ranked.index(sure[-1]) + 1 :] if len(sure) == enough else []
    return (*sure, *rest)[:most]


def _expected_gain(surface: Surface, allowed: FloatArray, looked_at: NDArray[np.bool_]) -> tuple[FloatArray, int]:
    """Expected improvement on the incumbent everywhere, and the incumbent: the best by mean that is likely allowed."""
    worthy = np.where(looked_at & (allowed >= 0.5), surface.mean, -np.inf)
    if not np.isfinite(worthy).any():
        worthy = np.where(looked_at, allowed, -np.inf)
    incumbent = int(np.argmax(worthy))
    covariance = surface.covariance
    variance = np.diag(covariance) + covariance[incumbent, incumbent] - 2 * covariance[incumbent]
    spread = np.sqrt(np.maximum(variance, 1e-14))
    gap = surface.mean - surface.mean[incumbent]
    return gap * _above(gap, spread) + spread * _density(gap / spread), incumbent


def _expected_front_gain(
    surfaces: Sequence[Surface], looked_at: NDArray[np.bool_], random: np.random.Generator
) -> tuple[FloatArray, int]:
    """The same for one random weighting of several objectives, over joint draws of each surface."""
    values = np.stack([draws(surface, random, 64) for surface in surfaces])
    joined = _chebyshev(values, random, same=True)
    best = np.where(looked_at, joined, -np.inf).max(axis=1, keepdims=True)
    incumbent = int(np.argmax(np.where(looked_at, joined.mean(axis=0), -np.inf)))
    return np.maximum(joined - best, 0.0).mean(axis=0), incumbent


def _chebyshev(values: FloatArray, random: np.random.Generator, *, same: bool = False) -> FloatArray:
    """Joins objectives [objectives, draws, points] by augmented Chebyshev weights, for each draw or one for all."""
    count, draws, _ = values.shape
    middle = values.mean(axis=1, keepdims=True)
    low, high = middle.min(axis=2, keepdims=True), middle.max(axis=2, keepdims=True)
    scaled = (values - high) / np.maximum(high - low, 1e-9)
    weights = random.dirichlet(np.ones(count), size=1 if same else draws).T[:, :, None]
    return np.min(weights * scaled, axis=0) + 0.05 * np.sum(weights * scaled, axis=0)


def _imagined(surface: Surface, index: int, noise: float) -> Surface:
    """The surface as if this point had been asked, and had scored as foreseen."""
    column = surface.covariance[:, index]
    return Surface(surface.mean, surface.covariance - np.outer(column, column) / (column[index] + noise))


def draws(surface: Surface, random: np.random.Generator, count: int) -> FloatArray:
    """Joint draws [draws, points]."""
    values, vectors = np.linalg.eigh(surface.covariance)
    factor = vectors * np.sqrt(np.maximum(values, 0.0))
    return surface.mean + random.standard_normal((count, len(values))) @ factor.T


def _above(mean: FloatArray, spread: FloatArray) -> FloatArray:
    """P(value ≥ 0) of a normal value."""
    from scipy.special import ndtr

    return np.asarray(ndtr(mean / spread), dtype=np.float64)


def _density(value: FloatArray) -> FloatArray:
    return np.exp(-(value**2) / 2) / math.sqrt(2 * math.pi)


def _pool(
    space: Space, best: Sequence[Choice], known: Collection[Choice], random: np.random.Generator
) -> tuple[Choice, ...]:
    """The points to look at: all of a small space; of a large one Sobol points, and neighbours of the best points."""
    if space.size <= LISTED:
        return tuple(choice for choice in all_choices(space) if choice not in known)
    near = _near(space, best, random)
    wide = decoded(space, sequence(space, random, LISTED // 2))
    return tuple(dict.fromkeys(choice for choice in (*near, *wide) if choice not in known))


def _near(space: Space, best: Sequence[Choice], random: np.random.Generator) -> list[Choice]:
    """Neighbours of these points: normal steps along some axes, and one step along each."""
    near: list[Choice] = []
    for choice in best:
        place = encoded(space, choice)
        steps = random.standard_normal((64, place.size)) * 0.25 * random.random((64, 1)) ** 2
        moved = random.random((64, place.size)) < max(0.3, 1.5 / place.size)
        near += decoded(space, np.clip(place + steps * moved, 0.0, 1.0))
        single = np.repeat(place[None], 2 * place.size, axis=0)
        widths = 1 / np.array([len(axis.values) for axis in space.axes])
        for axis in range(place.size):
            single[2 * axis, axis] += widths[axis]
            single[2 * axis + 1, axis] -= widths[axis]
        near += decoded(space, np.clip(single, 0.0, 1.0))
    return near


def _sobol(space: Space, seed: int, skipped: int) -> Iterator[Choice]:
    """The points of one scrambled Sobol sequence, those after the first `skipped`."""
    from scipy.stats import qmc

    points = qmc.Sobol(len(space.axes), scramble=True, rng=generator(seed, 0))
    if skipped:
        points.fast_forward(skipped)
    while True:
        yield from decoded(space, np.asarray(points.random(1), dtype=np.float64))


def _random(space: Space, seed: int, number: int) -> Iterator[Choice]:
    random = generator(seed, number)
    while True:
        yield from decoded(space, random.random((64, len(space.axes))))


def sequence(space: Space, random: np.random.Generator, count: int) -> FloatArray:
    """Places of a scrambled Sobol sequence in the unit cube [count, axes]."""
    from scipy.stats import qmc

    return np.asarray(qmc.Sobol(len(space.axes), scramble=True, rng=random).random(count), dtype=np.float64)


def _unknown(
    space: Space,
    drawn: Iterator[Choice],
    known: Collection[Choice],
    count: int,
    mergeable: Callable[[Choice], bool],
) -> list[Choice]:
    """The first `count` drawn points that are not known; after many vain draws, those of a small space in order."""
    found: dict[Choice, None] = {}
    for _ in range(64 * count + 256):
        if len(found) == count:
            return [*found]
        choice = next(drawn)
        if choice not in known and choice not in found and mergeable(choice):
            found[choice] = None
    if space.size <= 100 * LISTED:
        unknown = (choice for choice in all_choices(space) if choice not in known and choice not in found)
        found |= dict.fromkeys(islice((c for c in islice(unknown, LISTED) if mergeable(c)), count - len(found)))
    return [*found]


def generator(seed: int, number: int) -> np.random.Generator:
    """The random draws of this seed and number."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, number])))
