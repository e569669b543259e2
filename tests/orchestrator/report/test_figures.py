"""What the figures show, worked out by hand."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any, cast

import pytest

from jobs.evaluation_tasks import ScoreRow
from jobs.grid import Point
from jobs.merge_tasks import Receipt
from orchestrator.evaluating.results import EvaluationResult
from orchestrator.judging.race import Standing
from orchestrator.judging.samples import student_quantile
from orchestrator.report import charts
from orchestrator.report.against_baseline import ComparedCell
from orchestrator.report.figures import (
    Curve,
    Map,
    MapTile,
    Metric,
    StageCost,
    answer_costs,
    front,
    grid_maps,
    grid_of,
    length_curves,
    merge_cost,
    needle_maps,
    scores_by_task,
    shown,
)
from orchestrator.report.leaderboard import leaderboard
from tests.orchestrator.scores import rows


def point(name: str, **bindings: str | Fraction) -> Point:
    return Point(name, bindings, cast(Any, None))


def test_one_axis_makes_rows_in_the_order_of_its_values() -> None:
    points = [point("b", w=Fraction(1, 2)), point("a", w=Fraction(0)), point("c", w=Fraction(1))]
    grid = grid_of(points, ["a", "b", "c"])
    assert (grid.row_title, grid.rows, grid.columns) == ("w", ("0", "0.5", "1"), ())
    assert dict(grid.places) == {"a": (0, 0), "b": (1, 0), "c": (2, 0)}


def test_two_axes_make_rows_and_columns_and_an_axis_of_one_value_none() -> None:
    points = [
        point(f"{method}{w}", method=method, w=Fraction(w), d=Fraction(1))
        for method in ("ties", "dare")
        for w in (0, 1)
    ]
    grid = grid_of(points, [point.name for point in points])
    assert (grid.row_title, grid.rows) == ("method", ("ties", "dare"))
    assert (grid.column_title, grid.columns) == ("w", ("0", "1"))
    assert grid.places["dare1"] == (1, 1)


def test_of_a_simplex_the_last_axis_follows_from_the_others() -> None:
    thirds = [(a, b, 3 - a - b) for a in range(4) for b in range(4 - a)]
    points = [point(f"{a}{b}{c}", a=Fraction(a, 3), b=Fraction(b, 3), c=Fraction(c, 3)) for a, b, c in thirds]
    grid = grid_of(points, [point.name for point in points])
    assert (grid.row_title, grid.column_title) == ("a", "b")
    assert len(set(grid.places.values())) == 10


def test_three_axes_make_a_row_a_point() -> None:
    points = [
        point(f"{a}{b}{c}", a=Fraction(a), b=Fraction(b), c=Fraction(c)) for a in (0, 1) for b in (0, 1) for c in (0, 1)
    ]
    grid = grid_of(points, [point.name for point in points])
    assert grid.columns == () and len(grid.rows) == 8 and grid.rows[5] == "a=1, b=0, c=1"


def test_without_the_job_every_name_is_a_row() -> None:
    assert grid_of((), ["x", "y"]).rows == ("x", "y")


def test_a_tile_is_hatched_only_where_a_difference_is_not_sure() -> None:
    points = [point("a", w=Fraction(0)), point("b", w=Fraction(1)), point("twin", w=Fraction(2))]
    scores = {"a": {"4K": 50.0}, "b": {"4K": 60.0}}
    found = {("b", "4K"): ComparedCell(10.0, 0.2, sure=False)}
    grid = grid_of(points, ["a", "b", "twin"])
    [shown_map] = grid_maps(grid, scores, {"4K": {"length": 4096}}, "length", found, "a", {"twin": "b"})
    assert [shown_map.tiles[row, 0].sure for row in range(3)] == [None, False, False]
    assert shown_map.tiles[0, 0].text == "a, 4K: 50.0, the baseline itself"
    assert shown_map.tiles[2, 0].text == "twin, 4K: 60.0; +10.0 against a, p = 0.2, not sure"
    assert shown_map.tiles[2, 0].answers == {"point": "b", "length": 4096}, "a twin has no answers of its own"


def test_a_task_counts_its_lengths_alike() -> None:
    answers = [*rows("a", [1, 1, 1, 1]), *rows("a", [0], length=1024)]
    assert scores_by_task({"a": answers}) == {"a": {"vt": 50.0}}


def needles(name: str, scores: list[float]) -> list[ScoreRow]:
    return [
        ScoreRow(
            **{field: getattr(row, field) for field in row.__slots__}
            | {"benchmark": "needle", "task": "needle", "depth": (0.0, 0.48, 1.0)[row.item % 3]}
        )
        for row in rows(name, scores)
    ]


def test_needles_lie_at_the_depths_of_the_job() -> None:
    answers = {"a": needles("a", [1, 0, 1, 1, 1, 0]), "base": needles("base", [1, 0, 0, 1, 0, 0])}
    [a, base] = needle_maps(answers, [cast(Any, line("a"))], [], "base", {"needle": 3})
    assert a.scores.rows == ("0", "48", "100")
    assert [a.scores.tiles[depth, 0].value for depth in range(3)] == [100, 50, 50]
    assert a.differences is not None and base.differences is None
    assert [a.differences.tiles[depth, 0].value for depth in range(3)] == [0, 50, 50]


class line:
    """As much of a leaderboard's line as is looked at."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_without_a_needle_rulers_depths_stand_in_by_tenths() -> None:
    answers = [
        ScoreRow(**{field: getattr(row, field) for field in row.__slots__} | {"depth": depth})
        for row, depth in zip(rows("a", [1, 0, 1]), (0.04, 0.07, 1.0), strict=True)
    ]
    [found] = needle_maps({"a": answers}, [cast(Any, line("a"))], [], None, {"needle": 3})
    assert found.differences is None
    assert {place[0]: tile.value for place, tile in found.scores.tiles.items()} == {0: 50.0, 9: 100.0}


def test_parents_are_shown_beside_the_best() -> None:
    lines = [cast(Any, line(name)) for name in ("a", "b", "p", "c", "q")]
    assert [entry.name for entry in shown(lines, ["p", "q"], 4)] == ["a", "b", "p", "q"]


def test_the_front_holds_whom_nobody_beats_in_both() -> None:
    score = Metric("score", {"a": 3, "b": 2, "c": 1, "beaten": 1, "half": 9})
    perplexity = Metric("perplexity", {"a": 30, "b": 20, "c": 10, "beaten": 25}, more_is_better=False)
    assert front(score, perplexity) == ["c", "b", "a"]
    assert front(score, score) == ["half"]


def test_of_points_that_are_equal_in_both_all_are_on_the_front() -> None:
    x = Metric("score", {"a": 2, "twin": 2, "beaten": 2, "b": 1, "other": 1})
    y = Metric("vt", {"a": 5, "twin": 5, "beaten": 4, "b": 5, "other": 6})
    assert front(x, y) == ["other", "twin", "a"]


def test_an_interval_of_a_curve_does_not_collapse_where_all_is_right() -> None:
    # 8 right answers, and two right and two wrong more: 10/12 right, and a variance of 10·2/12³ (Agresti & Coull 1998)
    answered = [*rows("a", [1] * 8), *rows("a", [1] * 8, length=1024)]
    line = leaderboard(
        EvaluationResult(
            rows=answered,
            ranked=("ruler",),
            standing=(Standing("a", 1.0, 16, None, None),),
            departures=(),
            baselines=(),
            parents={},
            same={},
            noise=None,
            cost_share=1.0,
            race=None,
            seed=0,
            finished=True,
        )
    )
    (curve,) = length_curves({"a": answered}, line, ())
    low = 100 - 100 * student_quantile(0.975, 7) * (10 * 2 / 12**3) ** 0.5
    assert curve.low == pytest.approx((low, low)) and curve.high == (100, 100)


def test_a_name_with_dollars_is_drawn_as_it_is() -> None:
    name = "$w^{0.5}$ for $5 \\frac"
    drawn = charts.heatmap(Map(name, ("$x_$", "b"), ("$$",), "$", "^_$", {(0, 0): MapTile(1, None, "")}), 0, 100)
    assert "$x_$" in drawn and "$w^{0.5}$ for $5 \\frac" in drawn
    metric = Metric("$score_$", {"$a_$": 1.0, "b": 2.0})
    assert "$score_$ (more is better)" in charts.pareto(metric, metric, ["b"], {})
    assert "$a_$" in charts.curves([Curve("$a_$", (512, 1024), (1, 2), (), ())], "$", "$")
    assert "$_$ at 4K" in charts.bars([StageCost("$_$ at 4K", 1.0, 1, 1)])


def test_a_tile_leads_to_its_answers_where_there_is_a_page_of_them() -> None:
    tiles = {(0, 0): MapTile(1, None, "told", {"point": "a&b", "length": 512}), (0, 1): MapTile(2, False, "none")}
    shown_map = Map("", ("a",), ("x", "y"), "", "", tiles)
    drawn = charts.heatmap(shown_map, 0, 100, view="view/index.html")
    [link] = re.findall(r'<a href="([^"]*)" tabindex="-1"><\w+ [^>]*><title>told</title>', drawn)
    assert link == "view/index.html#point=a%26b&amp;length=512&amp;outcome=missed"
    assert "<title>none</title>" in drawn and drawn.count("<a ") == 1
    assert drawn.count('<g pointer-events="none">') == 3, "two numbers and the hatching let the pointer through"
    assert "<a " not in charts.heatmap(shown_map, 0, 100)


def test_no_words_are_read_as_mathematics_by_matplotlibs_own_formatters() -> None:
    assert "mathdefault" not in charts.curves([Curve("a", (512, 1024), (1, 2), (), ())], "length", "score")


def test_a_tasks_bytes_and_seconds_count_once() -> None:
    def receipt(unit: str, worker: str, seconds: float) -> Receipt:
        return Receipt(unit, unit, f"points/{unit}/m.safetensors", 10, "", {}, (), 100, seconds, worker)

    found = merge_cost([receipt("a", "one", 2.0), receipt("b", "one", 2.0), receipt("c", "two", 3.0)])
    assert found is not None
    assert (found.shards, found.seconds, found.bytes_read, found.bytes_written) == (3, 5.0, 200, 30)
    assert merge_cost([]) is None


def test_answers_cost_what_their_rows_say() -> None:
    [found] = answer_costs(rows("a", [1, 0]))
    assert (found.what, found.items, found.tokens) == ("ruler at 512", 2, 20)
    assert found.seconds == pytest.approx(0.2) and not math.isnan(found.seconds)
