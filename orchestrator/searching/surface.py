"""The model of a figure over a space: a Gaussian process whose noise is a full covariance over the points.

Points that answer the same items err together, so that their noise is correlated; libraries assume independent noise.
The kernel is Matérn 5/2 with a length scale for each axis (Rasmussen & Williams 2006, chapters 2, 4 and 5). The mean
is a constant, by generalised least squares. Amplitude, length scales and a nugget maximise the likelihood times log
normal priors; the prior length scale grows with √axes, as distances do (Hvarfner et al. 2024, arXiv 2402.02229).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
ROOT_5 = math.sqrt(5)
LENGTH_SCALE, LENGTH_SPREAD = 0.4, 0.8
"""Median of the prior length scale of one axis, and the standard deviation of its logarithm."""
NUGGET = 0.03
"""Prior median of the standard deviation of what no smooth surface explains, in units of the figures' spread."""
LEAST_SPREAD = 0.005


@dataclass(frozen=True, slots=True)
class Parameters:
    """Amplitude, length scale of each axis [axes], and the standard deviation of the nugget, in the figure's unit."""

    amplitude: float
    lengths: FloatArray
    nugget: float


@dataclass(frozen=True, slots=True)
class Surface:
    """The posterior of a figure at points: `mean` [points] and `covariance` [points, points]."""

    mean: FloatArray
    covariance: FloatArray

    @property
    def spread(self) -> FloatArray:
        """Standard deviation at each point [points]."""
        return np.sqrt(np.maximum(np.diag(self.covariance), 1e-16))


def kernel(amplitude: float, first: FloatArray, second: FloatArray) -> FloatArray:
    """Prior covariance [first, second] of places [points, columns] in units of the length scales."""
    from scipy.spatial.distance import cdist

    distance = ROOT_5 * np.asarray(cdist(first, second), dtype=np.float64)
    return amplitude**2 * (1 + distance + distance**2 / 3) * np.exp(-distance)


def fit(squares: FloatArray, means: FloatArray, noise: FloatArray) -> Parameters:
    """The most probable parameters for figures [points] with this covariance of their noise [points, points]."""
    from scipy.optimize import minimize

    axes, count = squares.shape[0], means.size
    noisy = float(np.mean(np.diag(noise)))
    spread = max(math.sqrt(max(float(np.var(means)) - noisy, 0.0)), math.sqrt(noisy) / 4, LEAST_SPREAD)
    centre = np.array(
        [math.log(spread), *[math.log(LENGTH_SCALE) + math.log(axes) / 2] * axes, math.log(NUGGET * spread)]
    )
    widths = np.array([1.0, *[LENGTH_SPREAD] * axes, 1.0])

    def objective(theta: FloatArray) -> tuple[float, FloatArray]:
        weights = np.exp(-2 * theta[1:-1])
        distance = ROOT_5 * np.sqrt(np.tensordot(weights, squares, axes=1))
        decay = math.exp(2 * theta[0]) * np.exp(-distance)
        smooth = (1 + distance + distance**2 / 3) * decay
        nugget = math.exp(2 * theta[-1])
        inverse, logarithm = _inverse(smooth + noise + nugget * np.eye(count))
        ones = inverse.sum(axis=1)
        residual = means - float(ones @ means) / float(ones.sum())
        alpha = inverse @ residual
        slope = inverse - np.outer(alpha, alpha)  # twice the derivative of the negative log likelihood by K
        by_distance = slope * (5 / 3 * (1 + distance) * decay)
        gradient = np.empty_like(theta)
        gradient[0] = np.sum(slope * smooth)
        gradient[1:-1] = np.tensordot(squares, by_distance, axes=([1, 2], [0, 1])) * weights / 2
        gradient[-1] = nugget * float(np.trace(slope))
        pull = (theta - centre) / widths
        value = 0.5 * (float(residual @ alpha) + logarithm) + 0.5 * float(pull @ pull)
        return value, gradient + pull / widths

    bounds = [(at - 3 * width, at + 3 * width) for at, width in zip(centre, widths, strict=True)]
    found = minimize(objective, centre, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 25})
    theta = np.asarray(found.x, dtype=np.float64)
    return Parameters(math.exp(theta[0]), np.exp(theta[1:-1]), math.exp(theta[-1]))


def posterior(
    prior: FloatArray, crossed: FloatArray, wanted: FloatArray, means: FloatArray, noise: FloatArray
) -> Surface:
    """The surface at the wanted points, from figures [seen] and the covariance of their noise [seen, seen].

    `prior` [seen, seen], `crossed` [wanted, seen] and `wanted` [wanted, wanted] are the prior's covariances. The
    constant mean is unknown: its error is part of the covariance (Rasmussen & Williams 2006, 2.42).
    """
    inverse, _ = _inverse(prior + noise)
    ones = inverse.sum(axis=1)
    certainty = float(ones.sum())
    constant = float(ones @ means) / certainty
    mean = constant + crossed @ (inverse @ (means - constant))
    rest = 1 - crossed @ ones
    covariance = wanted - crossed @ inverse @ crossed.T + np.outer(rest, rest) / certainty
    return Surface(mean, (covariance + covariance.T) / 2)


def _inverse(matrix: FloatArray) -> tuple[FloatArray, float]:
    """Inverse and log determinant of a covariance, with the least jitter that makes it positive definite."""
    from scipy.linalg import lapack

    scale = float(np.mean(np.diag(matrix)))
    for jitter in (0.0, 1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        factor, failed = lapack.dpotrf(matrix + jitter * scale * np.eye(len(matrix)), lower=1)  # pyright: ignore[reportAttributeAccessIssue]
        if failed == 0:
            break
    inverse, _ = lapack.dpotri(factor, lower=1)  # pyright: ignore[reportAttributeAccessIssue]
    lower = np.tril(inverse)
    return lower + np.tril(lower, -1).T, 2 * float(np.log(np.diag(factor)).sum())
