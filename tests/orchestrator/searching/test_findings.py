"""The findings of a search: regret bound, importance and surface against surfaces whose answers are known."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import norm

from jobs.search import Axis, Budget, SearchSpec, Space
from orchestrator.searching.encoding import all_choices
from orchestrator.searching.figures import Figures
from orchestrator.searching.findings import Findings, findings, moved_to, regret_bound
from orchestrator.searching.proposing import Evidence
from orchestrator.searching.search import Search
from tests.orchestrator.searching.worlds import CELLS, World, numbers, run

SQUARE = Space((numbers("x", 6), numbers("y", 6)))
WORDS = Space((Axis("m", ("a", "b"), "words", "here"),))


def test_a_space_that_is_known_exactly_has_no_regret() -> None:
    choices = tuple(all_choices(SQUARE))
    means = np.array([0.6 * x / 6 + 0.2 * y / 6 for x, y in choices])
    evidence = Evidence(choices, (Figures(means, 1e-10 * np.eye(len(choices))),))
    assert regret_bound(SQUARE, evidence, int(np.argmax(means)), smooth=True, seed=0) < 1e-3
    second = regret_bound(SQUARE, evidence, 0, smooth=True, seed=0)
    assert second == pytest.approx(0.8, abs=1e-3), "from the worst corner to the best"


def test_points_that_cannot_be_merged_are_in_neither_the_bound_nor_the_map() -> None:
    """The score rises to the corner of all ones, and half of the square before it cannot be merged."""
    space = Space((numbers("x", 20), numbers("y", 20)))
    spec = SearchSpec(space=space, by="gp", budget=Budget(points=24), batch=4)
    search = Search(spec, CELLS, items=40, seed=1, mergeable=lambda choice: sum(choice) <= 20)
    run(search, World(space, lambda place: 5 * float(place.sum()) - 5))
    found = findings(search, seed=1)
    assert found is not None
    assert found.steps[-1].regret < 15, "to a corner that can be merged, not the 45 to the best one"
    column = {axis.name: axis.values for axis in space.axes}
    places = [
        [column[axis].index(Fraction(at)) for axis, at in zip(found.axes, each.at, strict=True)]
        for each in found.surface
    ]
    assert max(map(sum, places)) <= 20 < len(places)


def test_the_bound_of_two_equal_points_is_the_quantile_of_half_a_normal() -> None:
    """Equal means m, prior spread s = noise / 4 (the least), so that each has the variance 1 / (1/s² + 1/noise)."""
    noise = 0.04
    evidence = Evidence(((0,), (1,)), (Figures(np.array([0.5, 0.5]), noise**2 * np.eye(2)),))
    prior = noise / 4
    spread = np.sqrt(2 / (1 / prior**2 + 1 / noise**2))
    found = regret_bound(WORDS, evidence, 0, smooth=False, seed=0)
    assert found == pytest.approx(norm.ppf(0.95) * spread, rel=0.15)


def test_findings_of_a_plane_give_its_importance_and_its_best_corner() -> None:
    """The logit rises by 4 along w and not along the method, of which the importance is that of noise."""
    space = Space((numbers("w", 10), Axis("method", ("linear", "ties"), "words", "here")))
    spec = SearchSpec(space=space, by="gp", budget=Budget(points=16), batch=4)
    search = Search(spec, CELLS, items=40, seed=1)
    run(search, World(space, lambda place: 4 * float(place[0]) - 2))
    found = findings(search, seed=1)
    assert found is not None and found == Findings.read(json.loads(json.dumps(found.document())))
    first, second = found.importance
    assert (first.axis, second.axis) == ("w", "method")
    assert first.low > 0.5 > second.high and 0 <= second.low <= second.share <= second.high
    assert found.axes == ("w", "method") and found.others == ""
    best = max(found.surface, key=lambda place: place.mean)
    assert float(Fraction(best.at[0])) >= 0.8 and best.behind == 0
    assert found.size == 22 and len(found.points) == found.steps[-1].points == 16
    assert all(step.low < step.score < step.high and step.regret >= 0 for step in found.steps)
    assert found.steps[-1].regret < found.steps[0].regret
    by_name = {row.point: row for row in search.standing()}
    assert all(each.figures[0] == pytest.approx(100 * by_name[each.point].score, abs=1e-3) for each in found.points)
    assert all(place.point is None or place.point in by_name for place in found.surface)


def test_partners_in_a_simplex_keep_their_ratios() -> None:
    space = Space(tuple(numbers(name, 10) for name in "abc"), simplexes=(("a", "b", "c"),))
    assert moved_to(space, (1, 6, 3), {0: 4}) == (4, 4, 2)
    assert moved_to(space, (10, 0, 0), {0: 4}) == (4, 3, 3)
    assert moved_to(space, (1, 6, 3), {0: 4, 1: 6}) == (4, 6, 0)
    assert moved_to(space, (1, 6, 3), {0: 5, 1: 6}) is None
