"""The sentence on top says what the numbers allow, and no more."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.evaluating.results import EvaluationResult
from orchestrator.judging.race import Standing
from orchestrator.judging.significance import FlipRate
from orchestrator.report.leaderboard import leaderboard
from orchestrator.report.recommendation import Recommendation, recommend
from tests.orchestrator.scores import result, rows, standing


def said(
    scores: Mapping[str, Sequence[float]],
    parents: Sequence[str] = ("old",),
    gate: Mapping[str, Any] | None = None,
    confirmed: float | None = None,
    scored_as_parents: Mapping[str, str] | None = None,
    **more: Any,
) -> Recommendation:
    """What is said of points with these answers, the parents being no points."""
    points = sorted((name for name in scores if name not in parents), key=lambda name: -sum(scores[name]))
    result = EvaluationResult(
        rows=[row for name, answers in scores.items() for row in rows(name, answers)],
        ranked=("ruler",),
        standing=tuple(Standing(name, 0.0, 8, None, confirmed) for name in points),
        baselines=tuple(parents),
        parents={name: name for name in parents} | dict(scored_as_parents or {}),
        **{
            "departures": (),
            "same": {},
            "noise": None,
            "cost_share": 1.0,
            "race": None,
            "seed": 0,
            "finished": True,
            **more,
        },
    )
    found = recommend(result, leaderboard(result), gate)
    assert found is not None
    return found


MOST, HALF, NONE = [1] * 19 + [0], [1, 0] * 10, [0] * 20


def with_status(result: EvaluationResult, point: str, status: Any, count: int) -> Recommendation:
    """What is said where a point's first answers ended so."""
    seen = 0
    rows = [*result.rows]
    for at, row in enumerate(rows):
        if row.point == point and seen < count:
            rows[at] = replace(row, status=status)
            seen += 1
    changed = replace(result, rows=rows)
    found = recommend(changed, leaderboard(changed), None)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ("empty", "empty"),
        ("cut", r"empty \(20 cut at their limit of new tokens\)"),
        ("filtered", "filtered by the server"),
        ("failed", "refused by the server"),
    ],
)
def test_nothing_is_recommended_where_most_answers_say_nothing(status: str, words: str) -> None:
    evaluated = result(rows("a", NONE), [standing("a")])
    found = with_status(evaluated, "a", status, 20)
    assert re.match(rf"^No recommendation: of a, 20 of 20 answers are {words}\. Mend the cause", found.sentence)
    assert found.document()["keep"] is None and "Keep" not in found.sentence and "0.0 points" not in found.sentence


def test_above_a_tenth_of_unanswered_questions_the_recommendation_warns() -> None:
    evaluated = result([*rows("a", MOST), *rows("b", HALF)], [standing("a"), standing("b")])
    assert "answers are" not in with_status(evaluated, "a", "filtered", 2).sentence
    warned = with_status(evaluated, "a", "filtered", 3)
    assert warned.headline.startswith("Keep a: 95.0 points")
    assert warned.grounds[0].startswith("But of a, 3 of 20 answers are filtered by the server. Mend the cause")
    rival = with_status(evaluated, "b", "failed", 20)
    assert rival.headline.startswith("Keep a") and "of b, 20 of 20 answers are refused" in rival.grounds[0]


def test_a_sure_lead_over_the_parents_is_a_merge_to_keep() -> None:
    found = said({"a": MOST, "b": NONE, "old": NONE})
    assert found.headline.startswith("Keep a: 95.0 points ± ")
    assert "95.0 above the best parent, old (95 % interval" in found.headline
    assert "after Holm over 2 points" in found.headline
    assert found.grounds[0].startswith("Its lead over the runner-up, b, is 95.0 points (95 % interval")
    assert "not sure" not in found.sentence


def test_a_lead_that_may_be_luck_is_not_sold_as_one() -> None:
    found = said({"a": MOST, "b": [*MOST[1:], 0], "old": [*MOST[1:], 0]})
    assert found.headline.startswith("a leads with 95.0 points")
    assert "but is not surely better than its parents: 5.0 above" in found.headline
    assert found.grounds[0].endswith("not sure, either will do, or ask more items.")


def test_a_tie_is_called_a_tie() -> None:
    sixty = {f"p{number:02d}": MOST for number in range(60)}
    found = said({**sixty, "old": NONE, "z": HALF})
    assert found.headline.startswith("60 points share the first place: 95.0 points ± ")
    assert "95.0 above the best parent, old (95 % interval" in found.headline
    assert found.grounds == ["By name they are p00, p01, p02 … p59: any will do, or ask more items."]
    assert found.document()["tied"] == sorted(sixty)
    two = said({"a": MOST, "b": MOST}, parents=())
    assert two.sentence == (
        f"2 points share the first place: 95.0 points ± {two.best.half_width:.1f}."
        " By name they are a, b: any will do, or ask more items."
    )
    unsure = said({"a": MOST, "b": MOST, "old": [*MOST[1:], 0]})
    assert unsure.headline.startswith("2 points share the first place with 95.0 points ± ")
    assert ", but are not surely better than the parents: 5.0 above the best parent, old (" in unsure.headline
    assert said({"a": MOST, "b": HALF, "old": NONE}).document()["tied"] == ["a"]


def test_a_tie_with_a_parent_is_called_a_tie() -> None:
    found = said({"a": MOST, "b": HALF, "old": MOST})
    assert found.headline.startswith("a and the best parent, old, share the first place: 95.0 points ± ")
    found = said({"a": MOST, "b": MOST, "old": MOST})
    assert found.headline.startswith("2 points and the best parent, old, share the first place: 95.0 points ± ")
    found = said({"a": MOST, "b": MOST}, parents=(), scored_as_parents={"old": "a"})
    assert found.headline.endswith(", and no merge scores more; 2 points share the first place.")
    found = said({"a": MOST, "b": MOST}, parents=(), scored_as_parents={"old": "b"}, confirmed=0.9)
    assert found.headline.startswith("2 points share the first place, the parent old (b) among them: 95.0 points ± ")
    assert "On fresh items, that no point was chosen by, a scores 90.0." in found.sentence
    found = said({"a": NONE, "b": NONE, "old": MOST})
    assert found.headline.startswith(
        "Keep the parent old: of the merges, 2 points share the first place with 0.0 points"
    )


def test_fewer_items_are_no_tie() -> None:
    assert said({"a": [1] * 20, "b": [1]}, parents=()).tied == ("a",)


def test_a_merge_that_is_surely_worse_is_not_kept() -> None:
    found = said({"a": [*NONE[1:], 1], "old": MOST, "bad": NONE}, parents=("old", "bad"))
    assert found.headline.startswith("Keep the parent old: the best merge, a, has 5.0 points")
    assert "90.0 below the best parent" in found.headline


def test_a_parent_that_is_a_point_may_lead() -> None:
    found = said({"a": MOST, "b": HALF}, parents=(), scored_as_parents={"old": "a"})
    spread = f"± {found.best.half_width:.1f}"
    assert found.headline == f"Keep the parent old (a): 95.0 points {spread}, and no merge scores more."
    assert found.grounds[0].startswith("Its lead over the runner-up, b, is 45.0 points")


def test_while_it_runs_it_says_so() -> None:
    assert said({"a": MOST}, parents=(), finished=False).sentence.startswith("So far, with the evaluation unfinished: ")


def test_one_point_alone_is_kept_with_nothing_to_compare() -> None:
    found = said({"a": MOST}, parents=())
    assert found.over_parent is None and found.over_runner_up is None
    assert found.sentence == f"Keep a: 95.0 points ± {found.best.half_width:.1f}."


def test_the_gate_and_fresh_items_have_the_last_word() -> None:
    verdict = {"new": "a", "old": "o", "outcome": "pass", "fresh": True, "lines": [{"difference": 3.25}]}
    told = "The gate says pass on items that no point was chosen by: +3.2 against o."
    assert said({"a": MOST}, parents=(), gate=verdict).grounds == [told]
    assert said({"a": MOST}, parents=(), gate={**verdict, "new": "other"}).grounds == []
    fresh = "On fresh items, that no point was chosen by, it scores 90.0."
    assert said({"a": MOST}, parents=(), confirmed=0.9).grounds == [fresh]


def test_what_the_same_weights_show_against_themselves_is_said_beside_the_differences() -> None:
    told = said({"a": MOST}, parents=(), noise=FlipRate(2, 48, 2 / 48, 0.0115, 0.1397)).grounds
    assert told == ["Asked the same again, 4.2% of 48 answers changed their score (at most 14.0%)."]


@pytest.mark.parametrize("parents", [(), ("old",)])
def test_it_is_facts_too(parents: tuple[str, ...]) -> None:
    found = said({"a": MOST, "b": HALF, "old": NONE}, parents=parents).document()
    assert found["keep"] == "a"
    assert (found["over_best_parent"] is None) is (not parents)
    assert found["over_runner_up"]["difference"] == 45.0
