"""Axes of a grid: importances by arithmetic, maps that say where a difference is noise, and what is not shown."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from itertools import product

import numpy as np
import pytest

from jobs.evaluation_tasks import ScoreRow
from jobs.grid import Point
from orchestrator.report.axes import Surface, surface
from tests.orchestrator.report.made_up import score_row

A, B, M = (Fraction(0), Fraction(1), Fraction(2)), (Fraction(0), Fraction(1)), ("ties", "linear")


def world(height: Callable[[int, int, int], float], *, noise: float = 0.0, haystacks: int = 40) -> Surface:
    """A grid of 3 × 2 × 2 points whose scores are `height` plus noise, on haystacks of one task and two lengths."""
    points, rows = [], dict[str, list[ScoreRow]]()
    random = np.random.default_rng(5)
    for a, b, m in product(range(3), range(2), range(2)):
        name = f"a{a}_b{b}_{M[m]}"
        points.append(Point(name, {"a": A[a], "b": B[b], "m": M[m]}, {}))
        rows[name] = [
            score_row(name, "vt", length, item, height(a, b, m) + noise * float(random.standard_normal()))
            for length in (4096, 8192)
            for item in range(haystacks)
        ]
    found = surface(points, rows, {})
    assert found is not None
    return found


def test_shares_without_noise_are_those_of_the_arithmetic() -> None:
    """Variances of 0.3 a, 0.2 b and 0.1 m: 0.06, 0.01 and 0.0025; the sum has no interaction."""
    found = {one.axis: one for one in world(lambda a, b, m: 0.3 * a + 0.2 * b + 0.1 * m).importance()}
    assert [*found] == ["a", "b", "m"]
    for axis, variance in {"a": 0.06, "b": 0.01, "m": 0.0025}.items():
        assert found[axis].share == pytest.approx(variance / 0.0725)
        assert found[axis].low == pytest.approx(found[axis].share) == found[axis].high


def test_an_interaction_is_in_no_share() -> None:
    """b counts only by m: half of the variance of b × m is b's, or m's, or neither's: a third each."""
    found = {one.axis: one.share for one in world(lambda a, b, m: 0.5 * b * m).importance()}
    assert found == {"a": pytest.approx(0, abs=1e-9), "b": pytest.approx(1 / 3), "m": pytest.approx(1 / 3)}


def test_a_flat_grid_has_no_important_axis_and_no_sure_cell() -> None:
    found = world(lambda a, b, m: 0.5, noise=0.3)
    assert all(one.low == 0 and one.high == 1 for one in found.importance())
    tiles = [tile for shown in found.maps(found.axes) for tile in shown.tiles.values()]
    sure = [tile for tile in tiles if tile.sure and "below the best" in tile.text]
    assert len(sure) < 0.2 * len(tiles)


def test_a_large_difference_is_sure_and_its_axis_has_a_narrow_interval() -> None:
    found = world(lambda a, b, m: 0.4 * b, noise=0.3)
    best, *others = found.importance()
    assert best.axis == "b" and best.low > 0.9
    assert all(one.high < 0.1 for one in others)
    (shown,) = [shown for shown in found.maps(("a", "b")) if "mean over the others" in shown.title]
    assert [shown.tiles[row, 0].sure for row in range(3)] == [True] * 3


def test_profiles_go_through_the_best_point_and_over_all() -> None:
    """At the best point b = 1 and m = linear; over all, their mean is half of it."""
    through, mean = world(lambda a, b, m: 0.1 * a + 0.2 * b + 0.2 * m).profiles(0)
    assert through.scores == pytest.approx((40, 50, 60)) and mean.scores == pytest.approx((20, 30, 40))
    words = world(lambda a, b, m: 0.1 * m).profiles(2)[-1]
    assert words.values == M and words.scores == pytest.approx((0, 10))


def test_twins_count_and_points_without_common_haystacks_have_no_surface() -> None:
    points = [Point(f"w{w}", {"w": Fraction(w)}, {}) for w in range(3)]
    rows = {f"w{w}": [score_row(f"w{w}", "vt", 4096, item, w / 2) for item in range(5)] for w in (0, 1)}
    found = surface(points, rows, {"w2": "w0"})
    assert found is not None and found.scores.tolist() == [0, 50, 0] and math.prod(found.at.shape) == 3
    assert surface(points, rows, {}) is None
    rows["w2"] = [score_row("w2", "vt", 4096, item, 1) for item in range(5, 10)]
    assert surface(points, rows, {}) is None
