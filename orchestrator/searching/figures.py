"""From scores of items to the figures that a search sees: a mean for each point, and the covariance of their errors.

Every point answers a beginning of one list of haystacks. So the errors of two points are correlated, and a point with
few haystacks is corrected by what the parents, which answer all, score on these haystacks (control variates).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
PRIOR_HAYSTACKS = 10.0
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
    group_means = values.sum(axis=2) / counts[:, None]
    residuals = np.where(inside[:, None, :], values - group_means[:, :, None], 0.0).reshape(points, -1)
    means = group_means.sum(axis=1)
    common = np.zeros((points, points))
    if len(controls):
        known = controls - controls.mean(axis=2, keepdims=True)
        all_of = known.shape[2]
        slopes = np.zeros((points, len(controls)))
        for count in np.unique(counts).tolist():
            these = np.flatnonzero(counts == count)
            seen = known[:, :, :count].reshape(len(controls), -1)
            local = (known[:, :, :count] - known[:, :, :count].mean(axis=2, keepdims=True)).reshape(len(controls), -1)
            square = local @ local.T
            penalty = RIDGE * np.eye(len(controls)) * (np.trace(square) / len(controls) / count + 1e-9)
            answered = residuals.reshape(points, groups, most)[these][:, :, :count].reshape(these.size, -1)
            slopes[these] = np.linalg.solve(square + penalty, local @ answered.T).T
            means[these] -= slopes[these] @ seen.reshape(len(controls), groups, count).mean(axis=2).sum(axis=1)
            left = answered - slopes[these] @ local
            residuals.reshape(points, groups, most)[these, :, :count] = left.reshape(these.size, groups, count)
        flat = known.reshape(len(controls), groups, all_of)
        spread = np.einsum("agh,bgh->ab", flat, flat) / max(all_of - 1, 1)
        common = slopes @ spread @ slopes.T / all_of
    return Figures(means, common + _noise(residuals.reshape(points, groups, most), counts))


def _noise(residuals: FloatArray, counts: NDArray[np.intp]) -> FloatArray:
    """Covariance of the errors [points, points]: variances and correlations are shrunk towards their means.

    The target is the one of Ledoit & Wolf 2004 ("Honey, I shrunk the sample covariance matrix"): equal correlations.
    The mean of the first m and the mean of the first n ≥ m haystacks have the covariance σ/n.
    """
    points = len(residuals)
    flat = residuals.reshape(points, -1)
    freedom = np.maximum(counts - 1, 1)
    variances = np.sum(flat**2, axis=1) / freedom
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
    covariance = shrunk * np.outer(deviations, deviations) / np.maximum(counts[:, None], counts[None, :])
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.maximum(values, 1e-3 * float(np.mean(np.diag(covariance))))) @ vectors.T
