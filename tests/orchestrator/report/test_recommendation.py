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
        baselines=tuple(parents),
        parents={name: name for name in parents} | dict(scored_as_parents or {}),
        **{
            "standing": tuple(Standing(name, 0.0, 8, None, confirmed) for name in points),
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


def test_cut_thoughts_need_a_larger_budget() -> None:
    evaluated = result([*rows("a", MOST), *rows("b", HALF)], [standing("a"), standing("b")])
    refused = with_status(evaluated, "a", "unended", 20)
    assert refused.sentence == (
        "No recommendation: of a, 20 of 20 answers are cut inside their thought."
        " Give `thinking:` a larger `budget:`, or take `thinking: off`, and evaluate under another `name:`."
    )


def test_above_a_tenth_of_unanswered_questions_the_recommendation_warns() -> None:
    evaluated = result([*rows("a", MOST), *rows("b", HALF)], [standing("a"), standing("b")])
    assert "answers are" not in with_status(evaluated, "a", "filtered", 2).sentence
    warned = with_status(evaluated, "a", "filtered", 3)
    assert warned.sentence.startswith("Keep a: 95.0 (")
    assert "But of a, 3 of 20 answers are filtered by the server. Mend the cause" in warned.sentence
    rival = with_status(evaluated, "b", "failed", 20)
    assert rival.sentence.startswith("Keep a") and "of b, 20 of 20 answers are refused" in rival.sentence


def test_a_sure_lead_over_the_parents_is_a_merge_to_keep() -> None:
    found = said({"a": MOST, "b": NONE, "old": NONE})
    # 19 of 20 and one gain and one loss more: error √(0.95·0.05/19 + 2/20²), Student's quantile with 19 degrees 2.093
    assert found.sentence.startswith("Keep a: 95.0 (84.5 to 100.0), +95.0 over the best parent, old (95 % +76.")
    assert found.sentence.endswith("to +100.0). Best of 2: sure against 1 of 1.")
    assert found.why[0].startswith("Against old: p = 0.0001, for 2 points at once.")
    assert found.why[1].startswith("+95.0 over the closest rival, b: p < 0.0001.")  # 2·½¹⁹, McNemar's


def test_a_lead_that_may_be_luck_is_not_sold_as_one() -> None:
    found = said({"a": MOST, "b": [*MOST[1:], 0], "c": NONE, "old": [*MOST[1:], 0]})
    assert found.sentence.startswith("a leads with 95.0 (84.5 to 100.0), but is not surely better than its parents: ")
    assert "+5.0 over the best parent, old (95 % -" in found.sentence
    assert found.sentence.endswith("Not surely the best of 3: b may be as good; more items may show a difference.")
    assert "+5.0 over the closest rival, b: p = 1, the largest p of 2 rivals." in found.why


def test_the_best_of_many_needs_no_correction() -> None:
    """Seven gains and no loss against each of thirty: 2/2⁷ = 0.016 of the closest counts, and not thirty times that."""
    worse = {f"p{number:02d}": [1] * 13 + [0] * 7 for number in range(30)}
    found = said({"a": [1] * 20, **worse}, parents=())
    assert "Best of 31: sure against 30 of 30." in found.sentence
    assert found.document()["closest_rival"]["p"] == pytest.approx(2 / 2**7, rel=1e-3)


def test_where_rare_losses_decide_it_says_so() -> None:
    # gains of a third on each of seven haystacks; their spread is small. A loss of a quarter of all haystacks, which
    # would make up for the gains, is missed by seven in 0.75⁷ = 0.13
    found = said({"a": [0.9, 0.91] * 3 + [0.9], "b": [0.57] * 7, "old": [0.57] * 7})
    assert found.over_parent is not None and found.over_parent.guarded and not found.over_parent.sure
    assert found.sentence.startswith("a leads with 90.4") and ": b may be as good" in found.sentence
    words = "Losses that are too rare to be seen in so few haystacks could explain it; the observed spread could not."
    assert found.why[0] == f"Against old: p = 0.33, for 2 points at once. {words}"
    assert found.why[1] == f"+33.4 over the closest rival, b: p = 0.17. {words}"


def test_no_word_takes_a_test_that_shows_nothing_for_equality() -> None:
    for scores in ({"a": MOST, "b": [*MOST[1:], 0], "old": NONE}, {"a": MOST, "b": MOST, "old": NONE}):
        found = said(scores)
        assert not re.search(r"either|any will do|equally good|no difference", " ".join((found.sentence, *found.why)))


def test_a_merge_that_breaks_the_constraints_of_a_search_is_not_kept() -> None:
    found = said({"a": MOST, "old": NONE}, infeasible=("a",))
    assert found.sentence == "Keep the parent old: no merge is likely to keep the constraints of the search."
    assert found.document()["keep"] == "old"
    alone = said({"a": MOST}, parents=(), infeasible=("a",))
    assert alone.sentence.startswith("No recommendation: no merge is likely to keep the constraints")
    assert alone.document()["keep"] is None
    assert said({"a": MOST, "b": HALF, "old": NONE}, infeasible=("b",)).document()["keep"] == "a"


def test_a_tie_is_called_a_tie() -> None:
    sixty = {f"p{number:02d}": MOST for number in range(60)}
    found = said({**sixty, "old": NONE, "z": HALF})
    assert found.sentence.startswith(
        "60 points share the first place: 95.0 (84.5 to 100.0), +95.0 over the best parent"
    )
    assert found.sentence.endswith("By name they are p00, p01, p02 … p59: more items may tell them apart.")
    assert found.document()["tied"] == sorted(sixty)
    two = said({"a": MOST, "b": MOST}, parents=())
    assert two.sentence == (
        "2 points share the first place: 95.0 (84.5 to 100.0). By name they are a, b: more items may tell them apart."
    )
    unsure = said({"a": MOST, "b": MOST, "old": [*MOST[1:], 0]})
    assert unsure.sentence.startswith("2 points share the first place with 95.0 (84.5 to 100.0), but are not surely")
    assert "better than the parents: +5.0 over the best parent, old (" in unsure.sentence
    assert said({"a": MOST, "b": HALF, "old": NONE}).document()["tied"] == ["a"]


def test_a_tie_with_a_parent_is_called_a_tie() -> None:
    score = "95.0 (84.5 to 100.0)"
    found = said({"a": MOST, "b": HALF, "old": MOST})
    assert found.sentence.startswith(f"a and the best parent, old, share the first place: {score}.")
    found = said({"a": MOST, "b": MOST, "old": MOST})
    assert found.sentence.startswith(f"2 points and the best parent, old, share the first place: {score}.")
    found = said({"a": MOST, "b": MOST}, parents=(), scored_as_parents={"old": "a"})
    assert f"{score}, and no merge scores more; 2 points share the first place." in found.sentence
    found = said({"a": MOST, "b": MOST}, parents=(), scored_as_parents={"old": "b"}, confirmed=0.9)
    assert found.sentence.startswith(f"2 points share the first place, the parent old (b) among them: {score}.")
    assert "On fresh items, that no point was chosen by, a scores 90.0." in found.why
    found = said({"a": NONE, "b": NONE, "old": MOST})
    assert found.sentence.startswith("Keep the parent old: of the merges, 2 points share the first place with 0.0 (")


def test_fewer_items_are_no_tie() -> None:
    assert said({"a": [1] * 20, "b": [1]}, parents=()).tied == ("a",)


def test_a_parent_that_leads_with_a_lower_score_is_not_said_to_score_most() -> None:
    order = tuple(Standing(name, 0.0, 8, None, None) for name in "ab")
    found = said({"a": HALF, "b": MOST}, parents=(), scored_as_parents={"old": "a"}, standing=order)
    assert found.sentence.startswith("Keep the parent old (a): 50.0 (")
    assert ". b has 95.0 (84.5 to 100.0), but the order counts items" in found.sentence
    assert "no merge scores more" not in found.sentence


def test_a_merge_that_is_surely_worse_is_not_kept() -> None:
    found = said({"a": [*NONE[1:], 1], "old": MOST, "bad": NONE}, parents=("old", "bad"))
    assert found.sentence.startswith("Keep the parent old: the best merge, a, has 5.0 (0.0 to 15.5), -90.0 against the")


def test_a_parent_that_is_a_point_may_lead() -> None:
    found = said({"a": MOST, "b": HALF}, parents=(), scored_as_parents={"old": "a"})
    assert found.sentence.startswith(
        "Keep the parent old (a): 95.0 (84.5 to 100.0), and no merge scores more. Best of 2"
    )
    assert found.why[0].startswith("+45.0 over the closest rival, b: p = 0.0")


def test_while_items_come_in_no_p_value_and_no_interval_is_printed() -> None:
    found = said({"a": MOST, "b": NONE, "old": NONE}, finished=False)
    assert found.sentence == "So far, with the evaluation unfinished, a leads with 95.0." and found.why == []
    document = found.document()
    assert document["over_best_parent"] is None and document["closest_rival"] is None
    tied = said({"a": MOST, "b": MOST}, parents=(), finished=False)
    assert tied.sentence.endswith("2 points share the first place with 95.0.")


def test_one_point_alone_is_kept_with_nothing_to_compare() -> None:
    found = said({"a": MOST}, parents=())
    assert found.over_parent is None and not found.over_rivals
    assert found.sentence == "Keep a: 95.0 (84.5 to 100.0)."


def test_the_difference_on_fresh_items_takes_the_place_of_that_on_the_items_that_chose() -> None:
    line = {"difference": 3.25, "low": 1.0, "high": 5.5}
    verdict = {"new": "a", "old": "old", "outcome": "pass", "fresh": True, "lines": [line], "rule": {"alpha": 0.05}}
    found = said({"a": MOST, "old": NONE}, gate=verdict)
    assert "+3.2 over the best parent, old, on fresh questions (90 % +1.0 to +5.5)." in found.sentence
    assert "95 %" not in found.sentence, "one interval for one question"
    assert found.why[0].startswith("Against old, on the items that chose it: +95.0 (95 % +7")
    assert found.why[0].endswith("to +100.0), p = 0.0001.")
    for other in ({"new": "b"}, {"old": "else"}, {"fresh": False}):
        assert "fresh questions" not in said({"a": MOST, "old": NONE}, gate=verdict | other).sentence


@pytest.mark.parametrize("chosen", [NONE, HALF, [*MOST[1:], 0], MOST], ids=["sure", "unsure", "a point more", "tied"])
@pytest.mark.parametrize(
    ("low", "high", "begins"),
    [
        (2.0, 10.0, "Keep a: 95.0 (84.5 to 100.0), +6.0 over the best parent, old, on fresh"),
        (-5.0, 17.0, "a leads with 95.0 (84.5 to 100.0), but is not surely better than its parents: +6.0 over"),
        (-10.0, -2.0, "Keep the parent old: the best merge, a, has 95.0 (84.5 to 100.0), -6.0 against the best parent"),
    ],
)
def test_the_interval_of_fresh_questions_decides_what_to_keep(
    chosen: list[int], low: float, high: float, begins: str
) -> None:
    line = {"difference": (low + high) / 2, "low": low, "high": high}
    verdict = {"new": "a", "old": "old", "outcome": "fail", "fresh": True, "lines": [line], "rule": {"alpha": 0.05}}
    sentence = said({"a": MOST, "old": chosen}, gate=verdict).sentence
    assert sentence.startswith(begins) and f"on fresh questions (90 % {low:+.1f} to {high:+.1f})." in sentence


def test_fresh_questions_of_one_of_several_equal_points_are_told_of_that_one() -> None:
    line = {"difference": 6.0, "low": 2.0, "high": 10.0}
    verdict = {"new": "a", "old": "old", "outcome": "pass", "fresh": True, "lines": [line], "rule": {"alpha": 0.05}}
    found = said({"a": MOST, "b": MOST, "old": NONE}, gate=verdict)
    assert found.sentence.startswith("Keep a: 95.0 (84.5 to 100.0), +6.0 over the best parent, old, on fresh")
    assert found.sentence.endswith("2 points share the first place: a, b: more items may tell them apart.")


def test_the_lengths_at_which_it_fails_are_named() -> None:
    lengths = {512: MOST, 1024: MOST, 2048: [1] * 6 + [0] * 14, 4096: NONE}
    evaluated = result([row for length, of in lengths.items() for row in rows("a", of, length=length)], [standing("a")])
    found = recommend(evaluated, leaderboard(evaluated), None)
    assert found is not None and found.sentence.endswith("a fails at 2K, 4K: 30, 0.")
    assert "fails" not in said({"a": MOST}, parents=()).sentence


def test_where_a_parent_is_kept_no_rank_and_no_failure_of_the_best_merge_is_told() -> None:
    lengths = {512: MOST, 1024: NONE}
    scored = [row for length, of in lengths.items() for row in (*rows("a", of, length=length), *rows("b", NONE))]
    parent = [row for length in lengths for row in rows("old", [1] * 20, length=length)]
    evaluated = replace(
        result([*scored, *parent], [standing("a"), standing("b")]), baselines=("old",), parents={"old": "old"}
    )
    found = recommend(evaluated, leaderboard(evaluated), None)
    assert found is not None and found.sentence.startswith("Keep the parent old: the best merge, a, has 47.5")
    assert "fails" not in found.sentence and "est of" not in found.sentence
    assert found.document()["keep"] == "old"


def test_points_against_which_the_leader_is_sure_are_not_counted_unless_they_are_all() -> None:
    """Of equal points the leader is sure against some in most worlds: its luck chose it."""
    found = said({"a": [1] * 20, "b": MOST, "c": [0] * 6 + [1] * 14, "d": NONE}, parents=())
    assert found.sentence.endswith(
        "Not surely the best of 4: b may be as good; more items may show a difference."
    ) and (found.document()["best_of_all"] is False)


def test_the_gate_and_fresh_items_have_the_last_word() -> None:
    verdict = {"new": "a", "old": "o", "outcome": "pass", "fresh": True, "lines": [{"difference": 3.25}]}
    told = "The gate says pass on items that no point was chosen by: +3.2 against o."
    assert said({"a": MOST}, parents=(), gate=verdict).why == [told]
    assert said({"a": MOST}, parents=(), gate={**verdict, "new": "other"}).why == []
    fresh = "On fresh items, that no point was chosen by, it scores 90.0."
    assert said({"a": MOST}, parents=(), confirmed=0.9).why == [fresh]


def test_what_the_same_weights_show_against_themselves_is_said_beside_the_differences() -> None:
    told = said({"a": MOST}, parents=(), noise=FlipRate(2, 48, 2 / 48, 0.0115, 0.1397)).why
    assert told == ["Asked the same again, 4.2% of 48 answers changed their score (at most 14.0%)."]


@pytest.mark.parametrize("parents", [(), ("old",)])
def test_it_is_facts_too(parents: tuple[str, ...]) -> None:
    found = said({"a": MOST, "b": HALF, "old": NONE}, parents=parents).document()
    assert found["keep"] == "a"
    assert (found["over_best_parent"] is None) is (not parents)
    assert found["closest_rival"]["difference"] == 45.0
    assert (found["rivals"], found["best_of_all"]) == ((1, True) if parents else (2, True))
