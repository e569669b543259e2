"""Differences and their certainty, worked out by hand."""

from __future__ import annotations

import math

import pytest
import scipy.stats

from orchestrator.report.against_baseline import best_of, compare, compare_all, compare_overall
from tests.orchestrator.scores import rows


def unanimous(haystacks: int) -> float:
    """The p value where every one of n haystacks is won: as McNemar's, that of n heads or tails in n throws."""
    return 2 / 2**haystacks


def test_a_difference_in_several_cells_has_students_p_value() -> None:
    # six gains and two losses of 18 at each of two lengths: mean 2/9; error √((4/9 − 4/81)/17), as the haystacks are
    # the same, and one gain and one loss more at one length, √2/36
    new = [row for length in (512, 1024) for row in rows("new", [1] * 6 + [0] * 12, length=length)]
    old = [row for length in (512, 1024) for row in rows("old", [0] * 6 + [1] * 2 + [0] * 10, length=length)]
    found = compare({"new": new, "old": old}, "new", "old")
    assert found is not None and found.difference == pytest.approx(200 / 9)
    assert found.p == pytest.approx(2 * scipy.stats.t.sf(2 / 9 / math.sqrt(32 / 81 / 17 + 2 / 36**2), 17))


def test_where_one_cell_of_right_and_wrong_decides_p_is_mcnemars() -> None:
    # 11 gains and one loss at one length, all alike at the other: 2·(1 + 12)/2¹²
    new = [*rows("new", [1] * 11 + [0] * 25), *rows("new", [1] * 36, length=256)]
    old = [*rows("old", [0] * 11 + [1] + [0] * 24), *rows("old", [1] * 36, length=256)]
    found = compare({"new": new, "old": old}, "new", "old")
    assert found is not None and found.difference == pytest.approx(100 * 10 / 36 / 2)
    assert found.p == pytest.approx(26 / 2**12) and found.sure
    # Student's with one gain and one loss more, as it is wider than Bonett and Price's here
    error = math.hypot(math.sqrt((12 / 36 - (10 / 36) ** 2) / 35), math.sqrt(2) / 36) / 2
    half = scipy.stats.t.ppf(0.975, 35) * error
    assert (found.low, found.high) == pytest.approx((100 * (10 / 72 - half), 100 * (10 / 72 + half)))
    narrow = 1.959964 * math.sqrt((14 / 38 - (10 / 38) ** 2) / 38)
    assert found.low < 50 * (10 / 38 - narrow) and found.high > 50 * (10 / 38 + narrow)


def test_few_gains_without_a_loss_are_no_more_than_luck() -> None:
    # differences 1, 1, 0: two of two heads
    scores = {"new": rows("new", [1, 1, 1]), "old": rows("old", [0, 0, 1])}
    found = compare(scores, "new", "old")
    assert found is not None
    assert found.difference == pytest.approx(200 / 3)
    assert found.p == pytest.approx(0.5) and not found.sure
    assert found.low <= 0


def test_steady_gains_are_not_sure_where_rare_losses_could_make_up_for_them() -> None:
    # 0.2 on each of 12 haystacks: nothing on the mean if a sixth of them is lost; none of 12 is in (5/6)¹²
    scores = {"new": rows("new", [0.70, 0.71] * 6), "old": rows("old", [0.5, 0.51] * 6)}
    found = compare(scores, "new", "old")
    assert found is not None and found.guarded and not found.sure
    assert found.p == pytest.approx((1 / 1.2) ** 12 / 0.8)
    assert found.low == 0


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


def test_many_points_are_compared_at_once() -> None:
    """Points that answer alike cost nothing; others cost as much as the largest of their statistics."""
    better = [1] * 12 + [0] * 2 + [1] * 6
    old = rows("old", [0] * 12 + [1] * 2 + [1] * 6)
    alone = compare_overall({"a": rows("a", better), "old": old}, ["a"], "old")["a"]
    alike = {name: rows(name, better) for name in ("a", "b", "c", "d")}
    found = compare_overall({**alike, "old": old}, [*alike], "old")
    assert [entry.p for entry in found.values()] == [alone.p] * 4
    others = {f"x{n}": rows(f"x{n}", [int((n * i * i + i) % 3 > 0) for i in range(20)]) for n in range(8)}
    many = compare_overall({**alike, **others, "old": old}, [*alike, *others], "old")["a"]
    assert many.p > alone.p and many.low < alone.low


def test_the_best_is_verified_against_each_rival() -> None:
    scores = {"a": rows("a", [1] * 20), "b": rows("b", [1] * 13 + [0] * 7), "c": rows("c", [1] * 16 + [0] * 4)}
    found = best_of(scores, "a", ["b", "c", "nobody"])
    assert [*found] == ["c", "b"], "the least sure first; without common questions there is no comparison"
    assert found["b"].p == pytest.approx(unanimous(7)) and found["c"].p == pytest.approx(unanimous(4))


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
