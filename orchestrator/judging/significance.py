"""Tests, corrections for many tests, and the smallest difference that a sample can show.

proportions             wilson_interval, rule_of_three, mcnemar, mcnemar_interval, flip_rate
fractional scores       sign_flip_test
differences of cells    difference_test, spread_test, paired_test
before the run          minimum_detectable_effect, design_effect
many comparisons        holm, benjamini_hochberg
looking more than once  anytime_multiplier, anytime_p_value
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from orchestrator.judging.estimates import Estimate, macro_difference, macro_weights
from orchestrator.judging.samples import (
    CellSample,
    FloatArray,
    Labels,
    cell_sample,
    cluster_sums,
    normal_quantile,
    student_tail,
)

EXACT_CLUSTERS = 20  # 2^20 sign patterns are 8 MB of sums; beyond that, Monte Carlo


class Interval(NamedTuple):
    """Two bounds, both inside."""

    low: float
    high: float


DRAWS = 9_999
"""Keyed sign patterns where there are too many for all of them: the smallest p value is 0.0001."""


def difference_test(estimate: Estimate) -> float:
    """Two-sided p value of "there is no difference", from the estimate's own error: it agrees with the interval.

    Cells may differ in opposite directions; a sign flip of whole haystacks would take that for noise.
    """
    return max(spread_test(estimate), estimate.least_p)


def spread_test(estimate: Estimate) -> float:
    """`difference_test` without the guard against rare losses: Student's test of the observed spread."""
    if math.isinf(estimate.standard_error):
        return 1.0
    return 2 * student_tail(abs(estimate.mean) / estimate.standard_error, estimate.degrees_of_freedom)


@dataclass(frozen=True, slots=True)
class Tested:
    """A mean difference, its p value by the observed spread, and the p value that rare losses leave (`few_losses`).

    The bounds of `estimate` contain zero where either p value is above the level of the interval. `exact` where p is
    McNemar's.
    """

    estimate: Estimate
    p: float
    rare: float
    exact: bool = False


def paired_test(samples: Sequence[CellSample], confidence: float = 0.95) -> Tested:
    """The macro difference of two models: McNemar's exact test where one cell decides, else Student's.

    One cell decides where all others are alike and its differences are right against wrong on haystacks of their
    own. The interval is then the wider one of Bonett & Price's, which leaves the other cells out, and of
    `macro_difference`. McNemar's p value decides unless the other cells are so small that Student's is above the level.
    """
    estimate = macro_difference(samples, confidence)
    weights = macro_weights([sample.cell for sample in samples]).tolist()
    differing = [(sample, weight) for sample, weight in zip(samples, weights, strict=True) if np.any(sample.values)]
    plain = Tested(estimate, spread_test(estimate), estimate.least_p)
    if math.isinf(estimate.standard_error) or len(differing) != 1 or not _right_or_wrong_alone(differing[0][0]):
        return plain
    values, weight = differing[0][0].values, differing[0][1]
    gains, losses = int(np.sum(values > 0)), int(np.sum(values < 0))
    p = mcnemar(gains, losses).two_sided
    if p <= 1 - confidence < plain.p:
        return plain
    low, high = (weight * bound for bound in mcnemar_interval(gains, losses, values.size, confidence))
    low, high = min(low, estimate.low), max(high, estimate.high)
    if p > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return Tested(replace(estimate, low=low, high=high), p, estimate.least_p, exact=True)


def _right_or_wrong_alone(sample: CellSample) -> bool:
    alone = np.unique(sample.haystacks).size == sample.values.size
    return alone and bool(np.isin(sample.values, (-1.0, 0.0, 1.0)).all())


# ---- proportions -----------------------------------------------------------------------------------------------------


def wilson_interval(successes: int, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927): honest where the normal one is too short (Bowyer 2025)."""
    if trials == 0:
        return Interval(0.0, 1.0)
    z = normal_quantile((1 + confidence) / 2)
    rate = successes / trials
    centre = (rate + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * math.sqrt(rate * (1 - rate) / trials + z**2 / (4 * trials**2))
    return Interval(max(0.0, centre - half), min(1.0, centre + half))


def rule_of_three(trials: int, confidence: float = 0.95) -> float:
    """The rate that `trials` items without one event still allow: −ln(1 − confidence)/trials, 3/n at 95 %."""
    return min(1.0, -math.log(1 - confidence) / trials) if trials else 1.0


@dataclass(frozen=True, slots=True)
class McNemar:
    """Exact p values of McNemar's test: `improved` for more gains than losses, `regressed` for fewer."""

    gains: int
    losses: int
    two_sided: float
    improved: float
    regressed: float


def mcnemar(gains: int, losses: int) -> McNemar:
    """McNemar's exact test (1947): items only the new model solves against items only the old one solves.

    For scores that are right or wrong; for fractional ones see `sign_flip_test`.
    """
    improved = _binomial_tail(gains, gains + losses)
    regressed = _binomial_tail(losses, gains + losses)
    return McNemar(gains, losses, min(1.0, 2 * min(improved, regressed)), improved, regressed)


def _binomial_tail(at_least: int, trials: int) -> float:
    """P[Bin(trials, ½) ≥ at_least]."""
    from scipy.special import betainc

    return 1.0 if at_least == 0 else float(betainc(at_least, trials - at_least + 1, 0.5))


def mcnemar_interval(gains: int, losses: int, items: int, confidence: float = 0.95) -> Interval:
    """Interval of the paired difference of two proportions, (gains − losses)/items.

    Bonett & Price 2012: the Wald interval after adding one gain and one loss, which keeps its coverage where the
    plain one collapses to a point.
    """
    gained, lost = (gains + 1) / (items + 2), (losses + 1) / (items + 2)
    half = normal_quantile((1 + confidence) / 2) * math.sqrt((gained + lost - (gained - lost) ** 2) / (items + 2))
    return Interval(max(-1.0, gained - lost - half), min(1.0, gained - lost + half))


@dataclass(frozen=True, slots=True)
class FlipRate:
    """How often the same weights scored differently on the same item: the noise floor under every difference."""

    flips: int
    items: int
    rate: float
    low: float
    high: float

    @property
    def words(self) -> str:
        """One sentence to print beside every difference."""
        changed = f"{self.rate:.1%} of {self.items} answers changed their score"
        return f"asked the same again, {changed} (at most {self.high:.1%})"


def flip_rate(first: ArrayLike, second: ArrayLike, confidence: float = 0.95) -> FlipRate:
    """The A/A flip rate of one model evaluated twice: Wilson's interval, or the rule of three when none flipped."""
    scores, again = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    flips, items = int(np.sum(scores != again)), int(scores.size)
    low, high = wilson_interval(flips, items, confidence)
    if flips == 0:
        high = rule_of_three(items, confidence)
    return FlipRate(flips, items, flips / items if items else 0.0, low, high)


# ---- fractional scores -----------------------------------------------------------------------------------------------


def sign_flip_test(
    differences: ArrayLike,
    haystacks: Sequence[Any] | Labels | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """Two-sided p value of the mean difference when the sign of every haystack's total could as well be the other.

    Exact when at most `EXACT_CLUSTERS` haystacks differ at all; else by `draws` keyed sign patterns, with the observed
    one counted in, so that the p value is never too small and never zero.
    """
    sample = cell_sample("difference", 0, differences, haystacks)
    _, totals, _ = cluster_sums(sample.values, sample.haystacks)
    totals = totals[totals != 0]
    observed = float(totals.sum())
    tolerance = 1e-9 * max(1.0, float(np.abs(totals).sum()))  # sums in another order may differ in the last bits
    if totals.size <= EXACT_CLUSTERS:
        flipped = np.zeros(1)
        for total in totals:
            flipped = np.concatenate([flipped + total, flipped - total])
        return float(np.mean(np.abs(flipped) >= abs(observed) - tolerance))
    extreme = sum(
        int(np.sum(np.abs(signs @ totals) >= abs(observed) - tolerance))
        for signs in sign_patterns(totals.size, draws, seed)
    )
    return (1 + extreme) / (1 + draws)


def sign_patterns(clusters: int, draws: int, seed: int) -> Iterator[FloatArray]:
    """`draws` keyed rows of ±1, in blocks of shape [at most 1000, clusters]."""
    random = np.random.Generator(np.random.Philox(key=seed))
    for start in range(0, draws, 1000):
        rows = min(1000, draws - start)
        yield random.choice(np.array([-1.0, 1.0]), size=(rows, clusters))


# ---- before the run --------------------------------------------------------------------------------------------------


def minimum_detectable_effect(
    items: float,
    *,
    discordance: float | None = None,
    deviation: float | None = None,
    alpha: float = 0.05,
    power: float = 0.8,
) -> float:
    """The smallest true difference a two-sided paired test at `alpha` finds with probability `power` (Miller 2024).

    Give the share of items on which the two models differ (`discordance`, for right-or-wrong scores) or the standard
    deviation of the paired differences. With several questions a haystack, divide `items` by `design_effect`.
    """
    spread = _spread(discordance, deviation)
    return (normal_quantile(1 - alpha / 2) + normal_quantile(power)) * spread / math.sqrt(items)


def _spread(discordance: float | None, deviation: float | None) -> float:
    if (discordance is None) == (deviation is None):
        raise ValueError("give either the discordance or the standard deviation of the differences")
    return deviation if deviation is not None else math.sqrt(discordance or 0.0)


def design_effect(questions_per_haystack: float, correlation: float) -> float:
    """How many times more items are needed because questions share a haystack: 1 + (m − 1)ρ (Kish 1965)."""
    return 1 + (questions_per_haystack - 1) * correlation


# ---- many comparisons ------------------------------------------------------------------------------------------------


def holm(p_values: ArrayLike) -> FloatArray:
    """Holm's step-down adjusted p values (1979): those ≤ α control the family-wise error rate at α."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1))
    return _restore(np.minimum(stepped, 1.0), order)


def benjamini_hochberg(p_values: ArrayLike) -> FloatArray:
    """Benjamini & Hochberg's adjusted p values (1995): those ≤ q control the false discovery rate at q."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    stepped = np.minimum.accumulate((p[order] * p.size / np.arange(1, p.size + 1))[::-1])[::-1]
    return _restore(np.minimum(stepped, 1.0), order)


def _restore(sorted_values: FloatArray, order: NDArray[np.intp]) -> FloatArray:
    values = np.empty_like(sorted_values)
    values[order] = sorted_values
    return values


# ---- looking more than once ------------------------------------------------------------------------------------------


def anytime_multiplier(clusters: int, planned_clusters: int, alpha: float = 0.05) -> float:
    """How many standard errors a one-sided bound must keep away to hold at level `alpha` at every look at once.

    The asymptotic confidence sequence of Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas 2024 (Robbins' normal mixture),
    tightest near `planned_clusters`, which must be fixed before the first look. Needs a few dozen clusters to be true.
    """
    scale = 1 + _mixture_time(clusters, planned_clusters)
    return math.sqrt(2 * scale / (scale - 1) * math.log(1 + math.sqrt(scale) / (2 * alpha)))


def anytime_p_value(statistic: float, clusters: int, planned_clusters: int) -> float:
    """The smallest alpha whose `anytime_multiplier` lies at or below `statistic`; 1 where no alpha does."""
    if statistic <= 0:
        return 1.0
    scale = 1 + _mixture_time(clusters, planned_clusters)
    exponent = min(700.0, statistic**2 * (scale - 1) / (2 * scale))
    return min(1.0, math.sqrt(scale) / (2 * math.expm1(exponent))) if exponent > 0 else 1.0


def _mixture_time(clusters: int, planned_clusters: int) -> float:
    """Clusters seen, in the unit in which the normal mixture is tightest for 5 % at `planned_clusters`."""
    best_at_plan = -2 * math.log(0.05) + math.log(1 - 2 * math.log(0.05))
    return best_at_plan * clusters / planned_clusters
