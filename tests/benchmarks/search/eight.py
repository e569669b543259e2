"""A space of eight axes: two example parents, with shares of their own in attention and MLPs of each layer.

A point has the parts, in twentieths, of the parent `long` in the attention of the three layers, in their MLPs, in the
embeddings and in the norms; the rest is of `fmt`. `counts_eight.csv` has right answers of such merges to the items of
`truth.py`; `truth_eight.py` makes it. Surfaces are fitted to these.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.spatial.distance import cdist
from scipy.special import ndtri

PARTS = 20
"""A share of a parent is a number of these."""
COUNTS = Path(__file__).with_name("counts_eight.csv")
LEAST, MOST = 0.1, 20.0
"""Limits of a length scale, in units of an axis: beyond the second, the axis plays no role."""
Array = np.ndarray[Any, Any]


def matern(distance: Any) -> Any:
    """The kernel Matérn 3/2 of distances in length scales, of numpy or torch."""
    exp = np.exp if isinstance(distance, np.ndarray) else torch.exp
    return (1 + 3**0.5 * distance) * exp(-(3**0.5) * distance)


class Surface:
    """Probits of a cell's score over the space: a Gaussian process with a length scale for each axis.

    Its noise is the binomial error of the counts. Length scales, amplitude and mean are the likeliest ones under a weak
    prior.
    """

    def __init__(self, places: Array, right: Array, asked: Array) -> None:
        share = (right + 0.5) / (asked + 1)
        level = ndtri(share)
        noise = share * (1 - share) / (asked + 1) * 2 * np.pi * np.exp(level**2)
        self._places, self._level = places, level
        known, levels, noises = (torch.from_numpy(each) for each in (places, level, noise))

        def loss(free: Array) -> tuple[float, Array]:
            values = torch.tensor(free, requires_grad=True)
            scaled = known * torch.exp(-values[:-2])
            apart = ((scaled[:, None] - scaled[None]) ** 2).sum(-1)
            prior = torch.exp(values[-2]) * matern(torch.sqrt(apart + 1e-12)) + torch.diag(noises + 1e-6)
            factor = torch.linalg.cholesky(prior)
            rest = (levels - values[-1])[:, None]
            fit = (rest * torch.cholesky_solve(rest, factor)).sum() / 2 + torch.log(torch.diagonal(factor)).sum()
            # A weak prior (lengths about one axis, amplitude about one) keeps what the counts leave open in bounds.
            fit = fit + (values[:-1] ** 2).sum() / 8
            fit.backward()
            assert values.grad is not None
            return fit.item(), values.grad.numpy()

        count = places.shape[1]
        bounds = [(float(np.log(LEAST)), float(np.log(MOST)))] * count + [(-4.0, 4.0), (-4.0, 4.0)]
        found = minimize(loss, np.zeros(count + 2), jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": 60})
        self.lengths, self.amplitude = np.exp(found.x[:count]), float(np.exp(found.x[count]))
        self.middle = float(found.x[-1])
        self._factor = np.linalg.cholesky(self._across(places) + np.diag(noise + 1e-6))
        self._weights = np.linalg.solve(self._factor.T, np.linalg.solve(self._factor, level - self.middle))

    def left_out(self) -> Array:
        """Of each measured point, the mean of its probit that the others foretell."""
        inverse = np.linalg.inv(self._factor @ self._factor.T)
        return self._level - self._weights / np.diag(inverse)

    def at(self, places: Array) -> tuple[Array, Array]:
        """Mean and standard deviation of the probit at these places [places, axes]."""
        across = self._across(places)
        spread = self.amplitude - np.sum(np.linalg.solve(self._factor, across.T) ** 2, axis=0)
        return self.middle + across @ self._weights, np.sqrt(np.maximum(spread, 0))

    def mean(self, places: Array) -> Array:
        """Mean of the probit at these places [places, axes]."""
        return self.middle + self._across(places) @ self._weights

    def _across(self, places: Array) -> Array:
        """The prior covariance [places, measured points] of these places with the measured ones."""
        return self.amplitude * matern(cdist(places / self.lengths, self._places / self.lengths))


def surfaces(table: Array) -> list[Surface]:
    """Of each cell, from rows of `counts_eight.csv`: eight parts, the items of a cell, and right answers of each."""
    return [Surface(table[:, :8] / PARTS, table[:, cell], table[:, 8]) for cell in range(9, table.shape[1])]


def points() -> list[tuple[int, ...]]:
    """The measured ones."""
    return [tuple(map(int, row[:8])) for row in np.loadtxt(COUNTS, delimiter=",", skiprows=1)]


@functools.cache
def measured() -> list[Surface]:
    """The surfaces of the measured counts."""
    return surfaces(np.loadtxt(COUNTS, delimiter=",", skiprows=1))
