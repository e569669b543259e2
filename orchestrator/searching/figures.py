"""From scores of items to the figures that a search sees: a mean for each point, and the covariance of their errors.

Every point answers a beginning of one list of haystacks. So the errors of two points are correlated. A point with few
haystacks is corrected by what points with more of them score on these and on the later ones, and by the parents, which
answer all (control variates).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
PRIOR_HAYSTACKS = 100.0
"""A correlation of h haystacks has the weight h against this many of the mean over points."""
POOLED_HAYSTACKS = 100.0
"""The same of a variance. It is large: of right-or-wrong answers, the lucky point seems to vary least."""
RIDGE = 5.0
"""Haystacks of pretended data without any relation to the parents."""


@dataclass(frozen=True, slots=True)
class Figures:
    """A figure of points: `means` [points] and the covariance of their errors `noise` [points, points]."""

    means: FloatArray
    noise: FloatArray


def figures(parts: FloatArray, counts: NDArray[np.intp], controls: FloatArray) -> Figures:
    """The figure of each point from its parts, of which the mean over haystacks, summed over groups, is the figure.

    Args:
        parts: [points, groups, haystacks]; point p has the first counts[p] haystacks of each group, the rest is unused.
        counts: haystacks a group of each point [points], at least 1.
        controls: the same of the parents [parents, groups, haystacks], all of whose haystacks are there.
    """
    points, groups, _ = parts.shape
    most = int(counts.max())
    inside = np.arange(most)[None, :] < counts[:, None]
    values = np.where(inside[:, None, :], parts[:, :, :most], 0.0)
    common = np.zeros((points, points))
    if len(controls):
        known = controls - controls.mean(axis=2, keepdims=True)
        all_of = known.shape[2]
        slopes = np.zeros((points, len(controls)))
        for count in np.unique(counts).tolist():
            these = np.flatnonzero(counts == count)
            seen = known[:, :, :count]
            local = (seen - seen.mean(axis=2, keepdims=True)).reshape(len(controls), -1)
            square = local @ local.T
            penalty = RIDGE * np.eye(len(controls)) * (np.trace(square) / len(controls) / count + 1e-9)
            answered = values[these][:, :, :count].reshape(these.size, -1)
            slopes[these] = np.linalg.solve(square + penalty, local @ answered.T).T
            values[these, :, :count] -= np.tensordot(slopes[these], seen, axes=1)
        flat = known.reshape(len(controls), groups, all_of)
        spread = np.einsum("agh,bgh->ab", flat, flat) / max(all_of - 1, 1)
        common = slopes @ spread @ slopes.T / all_of
    means, noise = _combined(values, counts)
    return Figures(means, common + noise)


def _combined(values: FloatArray, counts: NDArray[np.intp]) -> tuple[FloatArray, FloatArray]:
    """Means [points] by generalised least squares, and the covariance of their errors [points, points].

    The haystacks between two counts are a measurement of their own, of all points that have answered them. Its errors
    are correlated over these points, and independent of those of the other haystacks (Aitken 1935).
    """
    covariance = _covariance(values, counts)
    precision, weighted, first = np.zeros_like(covariance), np.zeros(len(counts)), 0
    for last in np.unique(counts).tolist():
        these = np.flatnonzero(counts >= last)
        inverse = (last - first) * np.linalg.inv(covariance[np.ix_(these, these)])
        precision[np.ix_(these, these)] += inverse
        weighted[these] += inverse @ values[these][:, :, first:last].mean(axis=2).sum(axis=1)
        first = last
    noise = np.linalg.inv(precision)
    return noise @ weighted, (noise + noise.T) / 2


def _covariance(values: FloatArray, counts: NDArray[np.intp]) -> FloatArray:
    """Covariance of one haystack's parts [points, points]: variances and correlations are shrunk towards their means.

    The target is the one of Ledoit & Wolf 2004 ("Honey, I shrunk the sample covariance matrix"): equal correlations.
    """
    points, _, most = values.shape
    inside = np.arange(most)[None, :] < counts[:, None]
    group_means = values.sum(axis=2) / counts[:, None]
    residuals = np.where(inside[:, None, :], values - group_means[:, :, None], 0.0)
    freedom = np.maximum(counts - 1, 1)
    variances = np.sum(residuals**2, axis=(1, 2)) / freedom
    typical = float(np.sum(variances * counts) / counts.sum())
    variances = (counts * variances + POOLED_HAYSTACKS * max(typical, 1e-6)) / (counts + POOLED_HAYSTACKS)
    shared = np.minimum(counts[:, None], counts[None, :])
    correlations = np.zeros((points, points))
    for count in np.unique(counts).tolist():
        those = counts >= count
        short = residuals[those][:, :, :count]
        short = (short - short.mean(axis=2, keepdims=True)).reshape(int(those.sum()), -1)
        lengths = np.sqrt(np.sum(short**2, axis=1))
        unit = short / np.where(lengths > 0, lengths, 1.0)[:, None]
        here = np.zeros((points, points))
        here[np.ix_(those, those)] = unit @ unit.T
        correlations = np.where(shared == count, here, correlations)
    others = ~np.eye(points, dtype=np.bool_)
    average = float(np.sum(correlations * shared * others) / max(np.sum(shared * others), 1))
    trusted = shared / (shared + PRIOR_HAYSTACKS)
    shrunk = np.where(others, trusted * correlations + (1 - trusted) * average, 1.0)
    deviations = np.sqrt(variances)
    covariance = shrunk * np.outer(deviations, deviations)
    eigenvalues, vectors = np.linalg.eigh(covariance)
    return (vectors * np.maximum(eigenvalues, 1e-2 * float(np.mean(np.diag(covariance))))) @ vectors.T
