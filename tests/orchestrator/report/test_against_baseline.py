"""Differences and their certainty, worked out by hand."""

from __future__ import annotations

import math

import pytest
import scipy.stats

from orchestrator.report.against_baseline import compare, compare_all, compare_overall
from tests.orchestrator.scores import rows


def unanimous(haystacks: int) -> float:
    """The p value where every one of n haystacks is won: as McNemar's, that of n heads or tails in n throws."""
    return 2 / 2**haystacks


def test_a_difference_has_students_p_value() -> None:
    # six gains and two losses of 18: mean 2/9; error √((4/9 − 4/81)/17), and one gain and one loss more, √2/18
    scores = {"new": rows("new", [1] * 6 + [0] * 12), "old": rows("old", [0] * 6 + [1] * 2 + [0] * 10)}
    found = compare(scores, "new", "old")
    assert found is not None and found.difference == pytest.approx(200 / 9)
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(2 / 9 / math.sqrt(32 / 81 / 17 + 2 / 18**2), 17))


def test_few_gains_without_a_loss_are_no_more_than_luck() -> None:
    # differences 1, 1, 0: gains of 2/3 are nothing on the mean if two in five haystacks are lost; none is in (3/5)³
    scores = {"new": rows("new", [1, 1, 1]), "old": rows("old", [0, 0, 1])}
    found = compare(scores, "new", "old")
    assert found is not None
    assert found.difference == pytest.approx(200 / 3)
    assert found.p == pytest.approx(2 * 0.6**3) and not found.sure
    assert found.high == 100  # more is not possible
    assert found.low == -100


def test_models_that_never_differ_may_yet_differ() -> None:
    scores = {"new": rows("new", [1, 0, 1, 1]), "old": rows("old", [1, 0, 1, 1])}
    found = compare(scores, "new", "old")
    assert found is not None
    assert (found.difference, found.p, found.sure) == (0, 1, False)
    assert found.low < 0 < found.high


def test_models_without_a_common_question_are_not_compared() -> None:
    scores = {"new": rows("new", [1, 0], task="vt"), "old": rows("old", [1, 0], task="cwe")}
    assert compare(scores, "new", "old") is None
    assert compare_overall(scores, ["new"], "old") == {}


def test_many_points_are_adjusted_by_holm() -> None:
    won = {f"p{count}": rows(f"p{count}", [1] * count) for count in (3, 7, 9)}
    found = compare_overall({**won, "old": rows("old", [0] * 9)}, [*won], "old")
    for count in (3, 7, 9):
        assert found[f"p{count}"].p == pytest.approx(unanimous(count))
    assert found["p9"].adjusted == pytest.approx(3 * unanimous(9))
    assert found["p7"].adjusted == pytest.approx(2 * unanimous(7))
    assert found["p3"].adjusted == pytest.approx(unanimous(3))
    assert [found[name].sure for name in ("p9", "p7", "p3")] == [True, True, False]


def test_cells_of_a_map_stand_for_themselves() -> None:
    new = [*rows("new", [1] * 7), *rows("new", [1] * 7, length=1024)]
    old = [*rows("old", [0] * 7), *rows("old", [1] * 7, length=1024)]
    found = compare_all({"new": new, "old": old}, ["new", "old"], "old")
    assert found.by_length["new", 512].sure and found.by_length["new", 512].p == pytest.approx(unanimous(7))
    assert not found.by_length["new", 1024].sure and found.by_length["new", 1024].difference == 0
    assert "old" not in found.overall
    assert found.by_task["new", "vt"].difference == pytest.approx(50)  # both lengths alike


def test_the_correction_can_take_certainty_away() -> None:
    # p = 0.031 is sure alone, but not as one cell of three whose others show nothing: Benjamini–Hochberg makes 0.094
    new = [row for length in (512, 1024, 2048) for row in rows("new", [1] * 6, length=length)]
    old = [row for length in (512, 1024, 2048) for row in rows("old", [int(length > 512)] * 6, length=length)]
    found = compare_all({"new": new, "old": old}, ["new"], "old")
    assert found.by_length["new", 512].p == pytest.approx(unanimous(6))
    assert found.by_length["new", 512].p < 0.05 and not found.by_length["new", 512].sure
