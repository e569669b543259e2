"""The truth of the replays: how well the fitted surfaces foretell measured scores of points that were left out."""

from __future__ import annotations

import numpy as np
from scipy.special import ndtr

from tests.benchmarks.search import eight
from tests.benchmarks.search.replay import COUNTS, surface


def test_the_fitted_surface_foretells_a_point_that_was_left_out() -> None:
    """By less than a point, for half of the points. The three parents are corners: nothing lies behind them."""
    table = np.loadtxt(COUNTS, delimiter=",", skiprows=1)
    inner = [row for row in range(len(table)) if table[row, :3].max() < 1]
    foretold = np.array([ndtr(surface(np.delete(table, row, axis=0), table[row : row + 1, :3]))[0] for row in inner])
    apart = 100 * (foretold - table[inner, 4:] / table[inner, 3:4])
    assert np.median(abs(apart.mean(axis=1))) < 1


def test_a_surface_of_eight_axes_foretells_points_that_were_left_out() -> None:
    """Of the cell with the most uneven scores: by 1 point for half of the points, and 5 in the root mean square.

    The standard deviation of its scores is 49 points. A Gaussian process leaves a point out without being fitted anew:
    Rasmussen & Williams 2006, equation 5.12.
    """
    table = np.loadtxt(eight.COUNTS, delimiter=",", skiprows=1)
    found = eight.Surface(table[:, :8] / eight.PARTS, table[:, 12], table[:, 8])
    apart = 100 * (ndtr(found.left_out()) - table[:, 12] / table[:, 8])
    assert np.median(abs(apart)) < 1
    assert np.sqrt(np.mean(apart**2)) < 5 < 40 < 100 * np.std(table[:, 12] / table[:, 8])
