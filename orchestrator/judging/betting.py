"""A bet against "the mean difference is at most this": an e-process, whose level is exact for any number of haystacks.

With differences y of haystacks in [−1, 1] and a mean of at most μ, a bet λ multiplies its capital by
1 + λ(y − μ)/(1 + μ) for each haystack. Its expected capital never grows, so it exceeds 1/α with probability α at the
most, at all looks together (Ville 1939; Waudby-Smith & Ramdas 2024, "Estimating means of bounded random variables by
betting"). Here the capital is divided among fixed bets, so the order of the haystacks does not matter.

Haystacks of different tasks are strata with means of their own. The null hypothesis says only that the weighted mean of
all strata is at most μ. It is rejected if every combination of means that agrees with this is (union–intersection;
Spertus & Stark 2022, Spertus, Sridhar & Stark 2024). The logarithm of each bet's capital is convex in the means, so the
least capital is found by Newton's method, and a tangent bounds it from below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

import numpy as np

from orchestrator.judging.samples import CellSample, FloatArray, Labels, cluster_sums, normal_quantile

BETS = np.append(np.geomspace(0.02, 0.9, 11), 1 - 1e-9)
"""The largest bet wins most if two models agree on everything, and loses nearly all by one haystack that is lost."""
STAKES = np.append(np.full(11, 0.5 / 11), 0.5)
NEVER = 1e9
"""So many times the haystacks that no gate will ask them."""
NEWTON_STEPS = 30
CLOSE = 0.01
"""Of the logarithm of a capital: near enough to its least value."""


@dataclass(frozen=True, slots=True, eq=False)
class Strata:
    """The differences of the haystacks of each stratum.

    `values` and `counts` have shape [strata, values], padded with counts of 0; `weights` [strata] sums to 1.
    """

    values: FloatArray
    counts: FloatArray
    weights: FloatArray

    def negated(self) -> Strata:
        """The same for old − new."""
        return Strata(-self.values, self.counts, self.weights)


def strata(samples: Sequence[CellSample], weights: FloatArray) -> Strata | None:
    """The strata of cells that are weighted by `weights` [cells].

    Cells that share haystacks are one stratum; of these, only haystacks with all questions at all lengths count. None
    if the haystacks of a cell differ in their numbers of questions: their order would then matter.
    """
    cells = [cluster_sums(sample.values, sample.haystacks) for sample in samples]
    parts: list[tuple[FloatArray, FloatArray, float]] = []
    for group in _sharing([names for names, _, _ in cells]):
        found = _stratum([cells[cell] for cell in group], weights[group])
        if found is None:
            return None
        values, counts = np.unique(found.round(12), return_counts=True)
        parts.append((values, counts.astype(np.float64), float(weights[group].sum())))
    most = max(values.size for values, _, _ in parts)
    values = np.array([np.pad(values, (0, most - values.size)) for values, _, _ in parts])
    counts = np.array([np.pad(counts, (0, most - counts.size)) for _, counts, _ in parts])
    shares = np.array([share for _, _, share in parts])
    return Strata(values, counts, shares / shares.sum())


def _sharing(names: Sequence[Labels]) -> Iterator[list[int]]:
    """The numbers of the cells of each stratum."""
    known = [set(found.tolist()) for found in names]
    left = [*range(len(names))]
    while left:
        group, reached = [left[0]], known[left[0]]
        left = left[1:]
        while more := [cell for cell in left if not reached.isdisjoint(known[cell])]:
            group += more
            reached = reached.union(*(known[cell] for cell in more))
            left = [cell for cell in left if cell not in more]
        yield sorted(group)


def _stratum(cells: Sequence[tuple[Labels, FloatArray, FloatArray]], weights: FloatArray) -> FloatArray | None:
    """The weighted mean of each haystack over the cells [haystacks]; None if they differ in their questions."""
    means: list[FloatArray] = []
    whole = [sizes == sizes.max() for _, _, sizes in cells]
    if any(np.sum(~kept) > 1 for kept in whole):
        return None
    common = reduce(np.intersect1d, [names[kept] for (names, _, _), kept in zip(cells, whole, strict=True)])
    for names, sums, sizes in cells:
        means.append((sums / sizes)[np.searchsorted(names, common)])
    return None if common.size == 0 else np.asarray(weights @ np.array(means) / weights.sum(), dtype=np.float64)


@dataclass(frozen=True, slots=True, eq=False)
class Capital:
    """The logarithm of each bet's capital [bets], and its variance over haystacks [bets]."""

    growth: FloatArray
    variance: FloatArray

    @property
    def p_value(self) -> float:
        """Holds at all looks together: 1 / capital, at most 1."""
        log = float(np.logaddexp.reduce(np.log(STAKES) + self.growth))
        return math.exp(-max(0.0, log))

    def growth_needed(self, alpha: float, power: float) -> float:
        """How many times the haystacks until the bets have 1/alpha with this probability; infinite if none will."""
        away = normal_quantile(power) * np.sqrt(self.variance)

        def enough(times: float) -> bool:
            logs = np.log(STAKES) + times * self.growth - math.sqrt(times) * away
            return bool(np.logaddexp.reduce(logs) >= -math.log(alpha))

        low, high = 0.0, 1.0
        while not enough(high):
            low, high = high, 2 * high
            if high > NEVER:
                return math.inf
        while high - low > 1e-4 * high:
            middle = (low + high) / 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


def capital(of: Strata, mean: float) -> Capital:
    """The capital of the bets against "the weighted mean of all strata is at most `mean`", which lies in (−1, 1)."""
    room = 1 + mean
    a = BETS[:, None, None] * (1 + of.values)  # [bets, strata, values]
    b = 1 - BETS[:, None, None]
    above = np.full((BETS.size, of.weights.size), room)  # the mean of each stratum + 1, as each bet fears it most
    least = np.full(BETS.size, -np.inf)
    for _ in range(NEWTON_STEPS):
        u = above[:, :, None]
        lost = a / (a + b * u)
        value = (of.counts * np.log(a / u + b)).sum(axis=(1, 2))
        pull = np.maximum((of.counts * lost).sum(axis=2), 1e-12)
        slope = -pull / above
        bound = value - (slope * above).sum(axis=1) + room * (slope / of.weights).min(axis=1)
        least = np.maximum(least, bound)
        if np.all(value - least < CLOSE):
            break
        bend = 1 + (of.counts * lost * (1 - lost)).sum(axis=2) / pull
        height = np.log(pull) - np.log(above) - np.log(of.weights)
        held = of.weights * above / bend
        level = (held * height).sum(axis=1) / held.sum(axis=1)
        above = above * np.exp(np.clip((height - level[:, None]) / bend, -2.0, 2.0))
        above *= room / (above @ of.weights)[:, None]
    logs = np.log(a / above[:, :, None] + b)
    centred = logs - (of.counts * logs).sum(axis=2, keepdims=True) / of.counts.sum(axis=1)[:, None]
    return Capital(least, (of.counts * centred**2).sum(axis=(1, 2)))


def lower_bound(of: Strata, alpha: float, least: float) -> float:
    """The largest mean that the bets reject at `alpha`, at all looks together; `least` if they do not reject that."""
    low, high = max(least, -1 + 1e-6), float((of.counts * of.values).sum(axis=1) / of.counts.sum(axis=1) @ of.weights)
    if low >= high or capital(of, low).p_value > alpha:
        return least
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if capital(of, middle).p_value <= alpha else (low, middle)
    return low
