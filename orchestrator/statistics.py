"""What can be said about scores of models that answered the same items: estimates, tests and their error rates.

Scores lie in [0, 1], so paired differences (new − old) lie in [−1, 1]; nothing here knows points out of 100.
Items that share a haystack are one cluster: they rise and fall together, and a standard error that forgets it
is too small. Everything random is keyed by a seed; nothing here reads or writes.

    one sample of cells     macro_mean, macro_score, weighted_score
    differences of cells    macro_difference, difference_test, pooled, few_losses
    proportions             wilson_interval, rule_of_three, mcnemar, mcnemar_interval, flip_rate
    fractional scores       sign_flip_test
    before the run          minimum_detectable_effect, design_effect
    many comparisons        holm, benjamini_hochberg
    looking more than once  anytime_multiplier, anytime_p_value
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jobs.errors import CorruptData

FloatArray = NDArray[np.float64]
Labels = NDArray[Any]

EXACT_CLUSTERS = 20  # 2^20 sign patterns are 8 MB of sums; beyond that, Monte Carlo


class Cell(NamedTuple):
    """One benchmark task at one context length in tokens."""

    task: str
    length: int


class Interval(NamedTuple):
    """Two bounds, both inside."""

    low: float
    high: float


@dataclass(frozen=True, slots=True, eq=False)
class CellSample:
    """One value for each item of a cell (a score, or a paired difference of scores) and the haystack it came from.

    `values` and `haystacks` are of shape [items]. A haystack label that occurs in several cells means the same
    haystack there, and the cells are then treated as dependent. Where a score may be 0 or 1, an answer can be lost
    whole; likelihoods never are, and not `losable`.
    """

    cell: Cell
    values: FloatArray
    haystacks: Labels
    losable: bool = True


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its clustered standard error and two-sided t interval; the error is infinite with one cluster.

    No test of "the mean is zero" may give less than `least_p`: so much explains losses too rare to be seen.
    """

    mean: float
    standard_error: float
    degrees_of_freedom: float
    low: float
    high: float
    items: int
    clusters: int
    least_p: float = 0.0


def cell_sample(
    task: str, length: int, values: ArrayLike, haystacks: Sequence[Any] | Labels | None = None
) -> CellSample:
    """A checked `CellSample`; without `haystacks` every item is a haystack of its own.

    Raises `CorruptData` for an empty cell, a value that is not finite or lies outside [−1, 1], or labels that do not
    match the items one to one.
    """
    array = np.asarray(values, dtype=np.float64)
    place = f"{task} at {length}"
    if array.ndim != 1 or array.size == 0:
        raise CorruptData(f"{place}: scores of shape {array.shape}, expected one a item; evaluate the cell again")
    if not np.all(np.abs(array) <= 1):
        raise CorruptData(f"{place}: a score is missing or outside its range; evaluate the cell again")
    if haystacks is None:
        labels = np.array([f"{task}/{length}/{item}" for item in range(array.size)])
    else:
        labels = np.asarray(haystacks)
    if labels.shape != array.shape:
        raise CorruptData(f"{place}: {array.size} scores but {labels.size} haystacks; evaluate the cell again")
    return CellSample(Cell(task, length), array, labels)


def paired_sample(
    task: str, length: int, new: ArrayLike, old: ArrayLike, haystacks: Sequence[Any] | Labels | None = None
) -> CellSample:
    """Differences new − old of two models' scores on the same items, in the same order, as a `CellSample`."""
    new_scores, old_scores = np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64)
    if new_scores.shape != old_scores.shape:
        raise CorruptData(
            f"{task} at {length}: {new_scores.size} scores against {old_scores.size}; compare the items both answered"
        )
    scores = np.concatenate([new_scores, old_scores])
    within = bool(np.all((scores > 0) & (scores < 1)))
    return replace(cell_sample(task, length, new_scores - old_scores, haystacks), losable=not within)


# ---- macro scores ----------------------------------------------------------------------------------------------------


def macro_weights(cells: Sequence[Cell], length_weights: Mapping[int, float] | None = None) -> FloatArray:
    """Weight of each cell in the macro score, summing to 1: tasks count alike within a length, lengths as given.

    Without `length_weights` lengths count alike.
    """
    tasks_at = Counter(cell.length for cell in cells)
    share = {length: 1.0 if length_weights is None else length_weights[length] for length in tasks_at}
    total = sum(share.values())
    return np.array([share[cell.length] / total / tasks_at[cell.length] for cell in cells])


def macro_mean(
    samples: Sequence[CellSample], length_weights: Mapping[int, float] | None = None, confidence: float = 0.95
) -> Estimate:
    """The macro score over cells with its clustered standard error and t interval.

    With one cell this is the clustered error of Miller 2024 (arXiv 2411.00640), with the factor C/(C−1) for C clusters
    and C−1 degrees of freedom. With several, each cell is a stratum; haystacks shared between cells add their
    covariance. Degrees of freedom are Satterthwaite's, and never more than clusters − 1.
    """
    return _weighted_mean(samples, macro_weights([sample.cell for sample in samples], length_weights), confidence)


def _weighted_mean(samples: Sequence[CellSample], weights: FloatArray, confidence: float) -> Estimate:
    totals, variances, degrees = _cluster_influences(samples, weights)
    mean = float(sum(weight * sample.values.mean() for weight, sample in zip(weights, samples, strict=True)))
    items = sum(sample.values.size for sample in samples)
    if np.any(degrees == 0):
        return Estimate(mean, math.inf, 1.0, -math.inf, math.inf, items, totals.size)
    error = math.sqrt(float(totals @ totals))
    freedom = float(min(_satterthwaite(variances, degrees), totals.size - 1))
    half = student_quantile((1 + confidence) / 2, freedom) * error
    return Estimate(mean, error, freedom, mean - half, mean + half, items, totals.size)


def macro_score(samples: Sequence[CellSample], confidence: float = 0.95) -> Estimate:
    """`macro_mean` of scores from 0 to 1, with an interval that does not collapse where all answers of a cell agree.

    Such a cell shows no variance; it is given that of two successes and two failures more among its haystacks (Agresti
    & Coull 1998, "plus four").
    """
    return weighted_score(samples, macro_weights([sample.cell for sample in samples]), confidence)


def weighted_score(samples: Sequence[CellSample], weights: FloatArray, confidence: float = 0.95) -> Estimate:
    """Σ weight × mean of a cell [cells], clustered as in `macro_mean`, with the variance that `macro_score` adds.

    Weights may be negative: a model's score less a share of another's is such a sum.
    """
    estimate = _weighted_mean(samples, weights, confidence)
    unseen = sum(
        float(weight) ** 2 * _plus_four_variance(float(sample.values[0]), np.unique(sample.haystacks).size)
        for weight, sample in zip(weights, samples, strict=True)
        if np.ptp(sample.values) == 0
    )
    error = math.hypot(estimate.standard_error, math.sqrt(unseen))
    half = student_quantile((1 + confidence) / 2, estimate.degrees_of_freedom) * error
    return replace(estimate, standard_error=error, low=estimate.mean - half, high=estimate.mean + half)


def _plus_four_variance(share: float, trials: int) -> float:
    shrunk = (share * trials + 2) / (trials + 4)
    return shrunk * (1 - shrunk) / (trials + 4)


def macro_difference(
    samples: Sequence[CellSample], length_weights: Mapping[int, float] | None = None, confidence: float = 0.95
) -> Estimate:
    """`macro_mean` of paired differences with an interval that does not collapse where few items or none differ.

    To the variance that was seen come one gain and one loss, in the cell where that moves the mean most and as large as
    a haystack may differ there, wholly so where none does: what Bonett & Price 2012 do for one cell
    of right-or-wrong scores, see `mcnemar_interval`. Where losses too rare to be seen explain the mean, the interval
    holds zero, see `few_losses`.
    """
    estimate = macro_mean(samples, length_weights, confidence)
    weights = macro_weights([sample.cell for sample in samples], length_weights)
    unlikely = _unlikely(samples, weights, estimate.mean)
    unseen = max(float(weight) * _one_haystack_more(sample) for weight, sample in zip(weights, samples, strict=True))
    error = math.hypot(estimate.standard_error, math.sqrt(2) * unseen)
    half = student_quantile((1 + confidence) / 2, estimate.degrees_of_freedom) * error
    low, high = max(-1.0, estimate.mean - half), min(1.0, estimate.mean + half)
    if unlikely > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return replace(estimate, standard_error=error, low=low, high=high, least_p=unlikely)


def _unlikely(samples: Sequence[CellSample], weights: FloatArray, mean: float) -> float:
    """Two-sided p value of a true mean of zero, of which too few losses (or gains, below zero) were seen."""
    if not any(sample.losable for sample in samples):
        return 0.0
    haystacks = pooled(samples, weights)
    return min(1.0, 2 * few_losses(replace(haystacks, means=math.copysign(1.0, mean) * haystacks.means), 0.0))


@dataclass(frozen=True, slots=True, eq=False)
class Haystacks:
    """The haystacks of several cells: what each adds to the macro mean, which is their mean, and what it may at most.

    `means` is of shape [haystacks]; `most` is the largest share of a haystack, 1 where all count alike, and `spread`
    Σ share²/haystacks², by which the variance of one becomes that of the mean.
    """

    means: FloatArray
    most: float
    spread: float


def pooled(samples: Sequence[CellSample], weights: FloatArray) -> Haystacks:
    """A haystack that several cells ask about is one: it may be lost in all of them at once."""
    parts = [_cluster_sums(sample.values, sample.haystacks) for sample in samples]
    scales = [float(weight) / sample.values.size for weight, sample in zip(weights, samples, strict=True)]
    names = np.concatenate([found for found, _, _ in parts])
    sums = np.concatenate([scale * of for scale, (_, of, _) in zip(scales, parts, strict=True)])
    sizes = np.concatenate([scale * of for scale, (_, _, of) in zip(scales, parts, strict=True)])
    shares = _cluster_sums(sizes, names)[1]
    count = shares.size
    return Haystacks(count * _cluster_sums(sums, names)[1], count * float(shares.max()), float(shares @ shares))


def few_losses(seen: Haystacks, claimed: float) -> float:
    """The chance of no more losses than were seen, if losses of a size make the model worse by `claimed`.

    A model that gains a little on most haystacks and loses all on a few shows nothing of these few while there are not
    many. With a mean of g on the others and losses of l, the claim means that a haystack is lost with the chance
    q = (g + claimed) / (g + l); the number of losses is binomial. It is the largest chance over what may count as a
    loss: a whole haystack, whether or not one was lost, or at least as much as any that was.
    """
    from scipy.special import bdtr

    count, total = seen.means.size, float(seen.means.sum())
    losses = np.sort(-seen.means[seen.means < 0])[::-1]
    taken = np.arange(1, losses.size + 1)
    whole = np.flatnonzero(np.append(losses[1:] < losses[:-1], losses.size > 0))  # the last of those that are alike
    lost = np.cumsum(losses)[whole]
    numbers, sizes = taken[whole].astype(np.float64), lost / taken[whole]
    gains = np.divide(total + lost, count - numbers, out=np.zeros_like(lost), where=numbers < count)
    if losses.size == 0 or losses[0] < seen.most:
        numbers, sizes, gains = np.append(numbers, 0.0), np.append(sizes, seen.most), np.append(gains, total / count)
    chances = np.clip((gains + claimed) / np.maximum(gains + sizes, 1e-12), 0.0, 1.0)
    return float(bdtr(numbers, count, chances).max())


def _one_haystack_more(sample: CellSample) -> float:
    """How far the cell's mean would move with one more haystack as different as any that was seen.

    Half of its questions differ at the least: whole haystacks are lost more rarely than single questions, and the few
    that were seen may have lost only these.
    """
    _, sums, sizes = _cluster_sums(sample.values, sample.haystacks)
    most = float(np.abs(sample.values).max())
    if most == 0:
        return float(sizes.max()) / sample.values.size
    return max(float(np.abs(sums).max()), most * float(sizes.max()) / 2) / sample.values.size


def difference_test(estimate: Estimate) -> float:
    """Two-sided p value of "there is no difference", from the estimate's own error: it agrees with the interval.

    Cells may differ in opposite directions; a sign flip of whole haystacks would take that for noise.
    """
    if math.isinf(estimate.standard_error):
        return 1.0
    found = 2 * student_tail(abs(estimate.mean) / estimate.standard_error, estimate.degrees_of_freedom)
    return max(found, estimate.least_p)


def _cluster_influences(
    samples: Sequence[CellSample], weights: FloatArray
) -> tuple[FloatArray, FloatArray, FloatArray]:
    """What each haystack adds to the macro mean's error [clusters]; the variance and freedom of each cell [cells]."""
    variances, degrees = np.zeros(len(samples)), np.zeros(len(samples))
    labels: list[Labels] = []
    influences: list[FloatArray] = []
    for index, (sample, weight) in enumerate(zip(samples, weights, strict=True)):
        names, sums, _ = _cluster_sums(sample.values - sample.values.mean(), sample.haystacks)
        clusters = names.size
        correction = math.sqrt(clusters / (clusters - 1)) if clusters > 1 else 1.0
        influence = sums * (weight / sample.values.size * correction)
        variances[index], degrees[index] = influence @ influence, clusters - 1
        labels.append(names)
        influences.append(influence)
    _, totals, _ = _cluster_sums(np.concatenate(influences), np.concatenate(labels))
    return totals, variances, degrees


def _cluster_sums(values: FloatArray, labels: Labels) -> tuple[Labels, FloatArray, FloatArray]:
    """Cluster names in order, the sum of their values, their sizes: each of shape [clusters]."""
    names, index = np.unique(labels, return_inverse=True)
    sums = np.asarray(np.bincount(index, weights=values), dtype=np.float64)
    return names, sums, np.asarray(np.bincount(index), dtype=np.float64)


def _satterthwaite(variances: FloatArray, degrees: FloatArray) -> float:
    if not variances.any():
        return float(degrees.sum())
    return float(variances.sum() ** 2 / np.sum(variances**2 / degrees))


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
        """What to read beside every difference."""
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
    draws: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p value of the mean difference when the sign of every haystack's total could as well be the other.

    Exact when at most `EXACT_CLUSTERS` haystacks differ at all; else by `draws` keyed sign patterns, with the observed
    one counted in, so that the p value is never too small and never zero.
    """
    sample = cell_sample("difference", 0, differences, haystacks)
    _, totals, _ = _cluster_sums(sample.values, sample.haystacks)
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
        for signs in _sign_patterns(totals.size, draws, seed)
    )
    return (1 + extreme) / (1 + draws)


def _sign_patterns(clusters: int, draws: int, seed: int) -> Iterator[FloatArray]:
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


# ---- quantiles -------------------------------------------------------------------------------------------------------


def normal_quantile(probability: float) -> float:
    """The standard normal quantile."""
    return NormalDist().inv_cdf(probability)


def normal_tail(statistic: float) -> float:
    """P[Z ≥ statistic] of the standard normal distribution."""
    from scipy.special import ndtr

    return float(ndtr(-statistic))


def student_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Student's t quantile."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, probability))


def student_tail(statistic: float, degrees_of_freedom: float) -> float:
    """P[T ≥ statistic] for Student's t."""
    from scipy.special import stdtr

    return float(stdtr(degrees_of_freedom, -statistic))
