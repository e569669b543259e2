"""Estimates from scores of models that answered the same items: means, differences, and their intervals.

Scores lie in [0, 1], so paired differences (new − old) lie in [−1, 1]. Items that share a haystack are one cluster:
their scores rise and fall together, and a standard error that ignores this is too small. Everything random is keyed by
a seed.

    one sample of cells     macro_mean, macro_score, weighted_score
    differences of cells    macro_difference, pooled, few_losses
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from orchestrator.judging.samples import Cell, CellSample, FloatArray, Labels, cluster_sums, student_quantile

RARE_SHARE = 0.8
"""Of the level of a two-sided test: the part for rare losses. Frequent ones have the rest."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its clustered standard error and two-sided t interval; the error is infinite with one cluster.

    `least_p` is a lower limit for the p value of "the mean is zero", since losses may be too rare to be observed.
    """

    mean: float
    standard_error: float
    degrees_of_freedom: float
    low: float
    high: float
    items: int
    clusters: int
    least_p: float = 0.0


# ---- macro scores ----------------------------------------------------------------------------------------------------


def macro_weights(cells: Sequence[Cell]) -> FloatArray:
    """Weight of each cell in the macro score, summing to 1.

    Lengths weigh alike, benchmarks by their weights within a length, and tasks alike within a benchmark.
    """
    tasks = Counter((cell.length, cell.benchmark) for cell in cells)
    weights = {(cell.length, cell.benchmark): cell.weight for cell in cells}
    by_length: dict[int, float] = defaultdict(float)
    for (length, _), weight in weights.items():
        by_length[length] += weight
    return np.array(
        [cell.weight / len(by_length) / by_length[cell.length] / tasks[cell.length, cell.benchmark] for cell in cells]
    )


def macro_mean(samples: Sequence[CellSample], confidence: float = 0.95) -> Estimate:
    """The macro score over cells with its clustered standard error and t interval.

    With one cell this is the clustered error of Miller 2024 (arXiv 2411.00640), with the factor C/(C−1) for C clusters
    and C−1 degrees of freedom. With several, each cell is a stratum; haystacks shared between cells add their
    covariance. Degrees of freedom are Satterthwaite's, and never more than clusters − 1.
    """
    return _weighted_mean(samples, macro_weights([sample.cell for sample in samples]), confidence)


def _weighted_mean(samples: Sequence[CellSample], weights: FloatArray, confidence: float) -> Estimate:
    _, totals, variances, degrees = cluster_influences(samples, weights)
    mean = float(sum(weight * sample.values.mean() for weight, sample in zip(weights, samples, strict=True)))
    items = sum(sample.values.size for sample in samples)
    if np.any(degrees == 0):
        return Estimate(mean, math.inf, 1.0, -math.inf, math.inf, items, totals.size)
    error = math.sqrt(float(totals @ totals))
    freedom = float(min(satterthwaite(variances, degrees), totals.size - 1))
    half = student_quantile((1 + confidence) / 2, freedom) * error
    return Estimate(mean, error, freedom, mean - half, mean + half, items, totals.size)


def macro_score(samples: Sequence[CellSample], confidence: float = 0.95) -> Estimate:
    """`macro_mean` of scores from 0 to 1, with an interval that does not collapse if all answers of a cell agree.

    Such a cell shows no variance. It gets the variance with two more successes and two more failures among its
    haystacks (Agresti & Coull 1998, "plus four").
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


def macro_difference(samples: Sequence[CellSample], confidence: float = 0.95) -> Estimate:
    """`macro_mean` of paired differences, with an interval that does not collapse if few items or none differ.

    The observed variance grows by one gain and one loss, in the cell where they move the mean most. Their size is
    the largest plausible difference of a haystack there, or 1 if no haystack differs. Bonett & Price 2012 do this for
    one cell of right-or-wrong scores, see `mcnemar_interval`. If losses too rare to be observed explain the mean, the
    interval contains zero, see `few_losses`.
    """
    estimate = macro_mean(samples, confidence)
    weights = macro_weights([sample.cell for sample in samples])
    unlikely = _unlikely(samples, weights, estimate.mean)
    unseen = max(float(weight) * _one_haystack_more(sample) for weight, sample in zip(weights, samples, strict=True))
    error = math.hypot(estimate.standard_error, math.sqrt(2) * unseen)
    half = student_quantile((1 + confidence) / 2, estimate.degrees_of_freedom) * error
    low, high = max(-1.0, estimate.mean - half), min(1.0, estimate.mean + half)
    if unlikely > 1 - confidence:
        low, high = min(low, 0.0), max(high, 0.0)
    return replace(estimate, standard_error=error, low=low, high=high, least_p=unlikely)


def _unlikely(samples: Sequence[CellSample], weights: FloatArray, mean: float) -> float:
    """Two-sided p value of a true mean of zero with so few observed losses (or gains, if the mean is negative)."""
    if not any(sample.losable for sample in samples):
        return 0.0
    haystacks = pooled(samples, weights)
    turned = replace(haystacks, means=math.copysign(1.0, mean) * haystacks.means)
    return few_losses(turned, 0.0, two_sided=True)


@dataclass(frozen=True, slots=True, eq=False)
class Haystacks:
    """The haystacks of several cells: the share of each in the macro mean (their mean), and its bound.

    `means` has shape [haystacks]. `most` is the largest share of a haystack, 1 if all shares are equal. `spread` is
    Σ share²/haystacks², the factor from the variance of one haystack to the variance of the mean.
    """

    means: FloatArray
    most: float
    spread: float


def pooled(samples: Sequence[CellSample], weights: FloatArray) -> Haystacks:
    """Merges the haystacks of all cells; one that several cells share counts once, as all can lose it together."""
    parts = [cluster_sums(sample.values, sample.haystacks) for sample in samples]
    scales = [float(weight) / sample.values.size for weight, sample in zip(weights, samples, strict=True)]
    names = np.concatenate([found for found, _, _ in parts])
    sums = np.concatenate([scale * of for scale, (_, of, _) in zip(scales, parts, strict=True)])
    sizes = np.concatenate([scale * of for scale, (_, _, of) in zip(scales, parts, strict=True)])
    shares = cluster_sums(sizes, names)[1]
    count = shares.size
    return Haystacks(count * cluster_sums(sums, names)[1], count * float(shares.max()), float(shares @ shares))


def few_losses(seen: Haystacks, claimed: float, *, two_sided: bool = False) -> float:
    """P(at most the observed number of losses) if the true mean difference is −claimed.

    A small sample may hide a model that gains a little on most haystacks and loses a few haystacks completely. With a
    mean of g on the others and losses of size l, the claim implies that a haystack is lost with probability
    q = (g + claimed) / (g + l), so the number of losses is binomial. Returns the largest probability over the possible
    sizes l: a whole haystack, even if none was lost, and the size of each observed loss.
    """
    count, total = seen.means.size, float(seen.means.sum())
    losses = np.sort(-seen.means[seen.means < 0])[::-1]
    taken = np.arange(1, losses.size + 1)
    whole = np.flatnonzero(np.append(losses[1:] < losses[:-1], losses.size > 0))  # the last of each run of equal losses
    lost = np.cumsum(losses)[whole]
    numbers, sizes = taken[whole].astype(np.float64), lost / taken[whole]
    gains = np.divide(total + lost, count - numbers, out=np.zeros_like(lost), where=numbers < count)
    if losses.size == 0 or losses[0] < seen.most:
        numbers, sizes, gains = np.append(numbers, 0.0), np.append(sizes, seen.most), np.append(gains, total / count)
    chances = np.clip((gains + claimed) / np.maximum(gains + sizes, 1e-12), 0.0, 1.0)
    return min(1.0, float(at_most(numbers, count, chances, two_sided=two_sided).max()))


def at_most(numbers: FloatArray, count: int, chances: FloatArray, *, two_sided: bool) -> FloatArray:
    """P(at most so many losses [losses] of `count` haystacks), each lost with its chance q [losses].

    If `two_sided`, losses with q ≤ 1/2 have `RARE_SHARE` of a test's level, and others the rest; the first adds P(as
    few haystacks that are not lost), which is little as long as gains are smaller than losses, and is doubled at the
    most.
    """
    from scipy.special import bdtr, bdtrc

    found = np.asarray(bdtr(numbers, count, chances), dtype=np.float64)
    if not two_sided:
        return found
    rare = np.minimum(found / RARE_SHARE + bdtrc(count - numbers - 1, count, chances), 2 * found)
    return np.where(chances <= 0.5, rare, found / (1 - RARE_SHARE))


def _one_haystack_more(sample: CellSample) -> float:
    """The change of the cell's mean by one more haystack with the largest observed difference.

    At least half of its questions differ: whole haystacks are lost more rarely than single questions, so a few observed
    haystacks may show only losses of single questions.
    """
    _, sums, sizes = cluster_sums(sample.values, sample.haystacks)
    most = float(np.abs(sample.values).max())
    if most == 0:
        return float(sizes.max()) / sample.values.size
    return max(float(np.abs(sums).max()), most * float(sizes.max()) / 2) / sample.values.size


def cluster_influences(
    samples: Sequence[CellSample], weights: FloatArray
) -> tuple[Labels, FloatArray, FloatArray, FloatArray]:
    """Haystacks and the part of each in the macro mean's error [clusters]; variance and freedom per cell [cells]."""
    variances, degrees = np.zeros(len(samples)), np.zeros(len(samples))
    labels: list[Labels] = []
    influences: list[FloatArray] = []
    for index, (sample, weight) in enumerate(zip(samples, weights, strict=True)):
        names, sums, _ = cluster_sums(sample.values - sample.values.mean(), sample.haystacks)
        clusters = names.size
        correction = math.sqrt(clusters / (clusters - 1)) if clusters > 1 else 1.0
        influence = sums * (weight / sample.values.size * correction)
        variances[index], degrees[index] = influence @ influence, clusters - 1
        labels.append(names)
        influences.append(influence)
    names, totals, _ = cluster_sums(np.concatenate(influences), np.concatenate(labels))
    return names, totals, variances, degrees


def satterthwaite(variances: FloatArray, degrees: FloatArray) -> float:
    """Degrees of freedom of a sum of independent variances [strata], each with its own (Satterthwaite 1946)."""
    if not variances.any():
        return float(degrees.sum())
    return float(variances.sum() ** 2 / np.sum(variances**2 / degrees))
