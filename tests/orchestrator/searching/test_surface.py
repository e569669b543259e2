from __future__ import annotations

import math

import numpy as np
import pytest

from orchestrator.searching.surface import fit, kernel, posterior


def squares(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return (first[:, None, :] - second[None, :, :]).transpose(2, 0, 1) ** 2


def test_the_kernel_is_matern_five_halves():
    place = np.array([[0.0, 0.0], [0.3, 0.4]])
    found = kernel(2.0, place / 0.5, place / 0.5)
    distance = math.sqrt(5) * 1.0
    assert found[0, 1] == pytest.approx(4 * (1 + distance + 5 / 3) * math.exp(-distance))
    assert found[0, 0] == pytest.approx(4)


def test_the_posterior_is_that_of_the_joint_normal_distribution():
    """A flat prior of the mean is a prior of large variance: then the formula of conditional normals."""
    random = np.random.Generator(np.random.Philox(key=1))
    seen, wanted = random.random((6, 2)), random.random((4, 2))
    lengths = np.array([0.4, 0.9])
    factor = random.normal(0, 0.1, (6, 6))
    noise, means = factor @ factor.T + 0.01 * np.eye(6), random.normal(0, 1, 6)
    prior, crossed, new = (
        kernel(0.7, a / lengths, b / lengths) for a, b in ((seen, seen), (wanted, seen), (wanted, wanted))
    )
    found = posterior(prior, crossed, new, means, noise)
    gain = (crossed + 1e4) @ np.linalg.inv(prior + 1e4 + noise)
    assert found.mean == pytest.approx(gain @ means, abs=1e-3)
    assert found.covariance == pytest.approx(new + 1e4 - gain @ (crossed + 1e4).T, abs=1e-3)


def test_noise_that_two_points_share_does_not_blur_their_difference():
    shared = np.full((2, 2), 0.05**2) + 1e-8 * np.eye(2)
    apart = np.eye(2) * 0.05**2
    place = np.array([[0.0], [1.0]])
    prior = kernel(0.1, place / 0.5, place / 0.5)
    spreads = []
    for noise in (shared, apart):
        covariance = posterior(prior, prior, prior, np.array([0.5, 0.6]), noise).covariance
        spreads.append(math.sqrt(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]))
    assert spreads[0] < 0.001
    assert spreads[1] > 0.03


def test_the_fit_finds_the_axis_that_matters():
    random = np.random.Generator(np.random.Philox(key=2))
    place = random.random((40, 3))
    means = 0.1 * np.sin(6 * place[:, 1]) + random.normal(0, 0.005, 40)
    found = fit(squares(place, place), means, np.eye(40) * 0.005**2)
    assert found.lengths[1] < 0.5 * min(found.lengths[0], found.lengths[2])
