from __future__ import annotations

import numpy as np
import pytest

from orchestrator.searching.figures import figures

NOTHING = np.empty((0, 1, 0))


def test_a_point_with_few_haystacks_is_corrected_by_those_with_more():
    """The regression estimator of double sampling (Cochran 1977, 12.6): its slope and its variance by hand."""
    random = np.random.Generator(np.random.Philox(key=1))
    common, own = random.normal(0, 1, 4000), random.normal(0, 1, (3, 4000))
    parts = (common + own)[:, None, :]
    found = figures(parts, np.array([4000, 4000, 1000]), NOTHING)
    assert found.means[:2] == pytest.approx(parts[:2, 0].mean(axis=1))
    others = parts[:2, 0].mean(axis=0)
    slope = 1 / 1.5  # the covariance of the point with the mean of the others, 1, by the variance of that, 1.5
    corrected = parts[2, 0, :1000].mean() - slope * (others[:1000].mean() - others.mean())
    assert found.means[2] == pytest.approx(corrected, abs=0.002)
    assert np.diag(found.noise)[:2] == pytest.approx([2 / 4000] * 2, rel=0.1)
    assert found.noise[2, 2] == pytest.approx((2 - 2 / 3) / 1000 + (2 / 3) / 4000, rel=0.1)
    assert found.noise[0, 1] == pytest.approx(1 / 4000, rel=0.1)
    assert found.noise[0, 2] == pytest.approx(slope * 1.5 / 4000, rel=0.1)


def test_groups_add_up():
    random = np.random.Generator(np.random.Philox(key=2))
    parts = random.normal(0.2, 1, (1, 2, 3000))
    found = figures(parts, np.array([3000]), np.empty((0, 2, 0)))
    assert found.means[0] == pytest.approx(parts[0].mean(axis=1).sum())
    assert found.noise[0, 0] == pytest.approx(2 / 3000, rel=0.1)


def test_a_parents_other_haystacks_correct_a_point_that_answers_alike():
    random = np.random.Generator(np.random.Philox(key=3))
    parent = random.normal(0, 1, (1, 1, 2000))
    parts = parent + 0.3 + random.normal(0, 0.1, (1, 1, 2000))
    plain = figures(parts, np.array([50]), np.empty((0, 1, 0)))
    helped = figures(parts, np.array([50]), parent)
    truth = float(parent.mean()) + 0.3
    assert abs(helped.means[0] - truth) < abs(plain.means[0] - truth) / 2
    assert helped.noise[0, 0] < plain.noise[0, 0] / 4


def test_a_parent_without_any_relation_changes_little():
    random = np.random.Generator(np.random.Philox(key=4))
    parts, parent = random.normal(0, 1, (1, 1, 200)), random.normal(0, 1, (1, 1, 400))
    plain, helped = figures(parts, np.array([200]), np.empty((0, 1, 0))), figures(parts, np.array([200]), parent)
    assert helped.means[0] == pytest.approx(plain.means[0], abs=0.02)
    assert helped.noise[0, 0] == pytest.approx(plain.noise[0, 0], rel=0.05)


def test_points_that_agree_on_few_haystacks_are_not_certain():
    found = figures(np.ones((2, 1, 10)), np.array([10, 10]), NOTHING)
    assert np.all(np.linalg.eigvalsh(found.noise) > 0)
