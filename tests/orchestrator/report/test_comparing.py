"""Differences and their certainty, worked out by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from jobs.evaluation import ScoreRow
from orchestrator.report.comparing import compare, compare_all, compare_overall, two_sided
from orchestrator.statistics import paired_mean


def rows(point: str, scores: Sequence[float], task: str = "vt", length: int = 512) -> list[ScoreRow]:
    return [
        ScoreRow(
            point=point,
            benchmark="ruler",
            task=task,
            length=length,
            items="set",
            item=item,
            depth=math.nan,
            haystack=f"h{item}",
            pair=f"h{item}",
            answer="",
            score=score,
            finite=True,
            tokens=1,
            seconds=0.1,
            recipe=point,
            weights=point,
            repeat=0,
        )
        for item, score in enumerate(scores)
    ]


def test_a_difference_has_students_interval_and_p_value() -> None:
    # differences 1, 1, 0: mean 2/3, sd 1/√3, error 1/3, so t = 2 with 2 degrees of freedom, t(0.975; 2) = 4.302653
    scores = {"new": rows("new", [1, 1, 1]), "old": rows("old", [0, 0, 1])}
    found = compare(scores, "new", "old")
    assert found is not None
    assert found.difference == pytest.approx(200 / 3)
    assert found.high - found.difference == pytest.approx(100 * 4.302653 / 3, rel=1e-6)
    assert found.p == pytest.approx(1 - 2 / math.sqrt(6))  # with 2 degrees of freedom P[|T| ≥ t] = 1 − t/√(2 + t²)
    assert not found.sure


def test_without_spread_the_sign_flip_test_remains() -> None:
    assert two_sided(paired_mean([1.0] * 5)) == 2 / 2**5
    assert two_sided(paired_mean([0.0] * 5)) == 1
    assert two_sided(paired_mean([0.1] * 5)) == 2 / 2**5  # the mean of five tenths is not exactly a tenth


def test_models_without_a_common_question_are_not_compared() -> None:
    scores = {"new": rows("new", [1, 0], task="vt"), "old": rows("old", [1, 0], task="cwe")}
    assert compare(scores, "new", "old") is None
    assert compare_overall(scores, ["new"], "old") == {}


def test_many_points_are_adjusted_by_holm() -> None:
    # p of five, six and seven unanimous haystacks: 1/16, 1/32, 1/64
    unanimous = {f"p{count}": rows(f"p{count}", [1] * count) for count in (5, 6, 7)}
    scores = {**unanimous, "old": rows("old", [0] * 7)}
    found = compare_overall(scores, [*unanimous], "old")
    assert [found[name].p for name in ("p7", "p6", "p5")] == [1 / 64, 1 / 32, 1 / 16]
    # Holm: 3/64, then max(3/64, 2/32), then max(2/32, 1/16)
    assert [found[name].adjusted for name in ("p7", "p6", "p5")] == [3 / 64, 1 / 16, 1 / 16]
    assert [found[name].sure for name in ("p7", "p6", "p5")] == [True, False, False]


def test_cells_of_a_map_are_adjusted_together() -> None:
    # eight haystacks at 512 that all differ, p = 2/2⁸; at 1024 none does, p = 1: Benjamini–Hochberg makes 2·2/2⁸ of it
    new = [*rows("new", [1] * 8), *rows("new", [1] * 8, length=1024)]
    old = [*rows("old", [0] * 8), *rows("old", [1] * 8, length=1024)]
    found = compare_all({"new": new, "old": old}, ["new", "old"], "old")
    assert found.by_length["new", 512].sure and found.by_length["new", 512].p == 2 / 2**8
    assert not found.by_length["new", 1024].sure and found.by_length["new", 1024].difference == 0
    assert "old" not in found.overall
    # the task, both lengths alike: 50 points
    assert found.by_task["new", "vt"].difference == pytest.approx(50)


def test_the_correction_can_take_certainty_away() -> None:
    # six unanimous haystacks: p = 1/32 is sure alone, but not as one cell of two whose other has p = 1
    new = [*rows("new", [1] * 6), *rows("new", [1] * 6, length=1024)]
    old = [*rows("old", [0] * 6), *rows("old", [1] * 6, length=1024)]
    found = compare_all({"new": new, "old": old}, ["new"], "old")
    assert found.by_length["new", 512].p == 1 / 32 and not found.by_length["new", 512].sure
