"""Counts of unanswered questions: when they cast doubt on a verdict."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from orchestrator.judging.gate import GateRule, doubted, judge
from orchestrator.judging.samples import cell_sample
from orchestrator.judging.unanswered import Unanswered, unanswered, unanswered_cells
from tests.orchestrator.scores import row


def rows(statuses: Sequence[str], score: float = 0.0, task: str = "vt", **more: Any) -> list[Any]:
    return [row("a", task, 512, at, score, status=status, **more) for at, status in enumerate(statuses)]


def test_every_status_is_counted_and_a_silent_cut_answer_is_empty_too() -> None:
    found = unanswered(
        [
            *rows(["answered"] * 4 + ["empty", "filtered", "failed"], answer="?"),
            *rows(["cut", "cut", "cut"], task="cwe", answer="so far"),
            *rows(["cut", "cut"], task="fwe"),
            *rows(["unended"], task="qa_1"),
        ]
    )
    assert found == Unanswered(asked=13, empty=1, cut=5, filtered=1, failed=1, silent=2, unended=1)
    assert (found.count, found.share) == (9, pytest.approx(9 / 13))
    assert found.words("ties") == (
        "of ties, 9 of 13 answers are lost: 3 empty (2 cut at their limit of new tokens), 3 cut at their limit of new"
        " tokens, 1 cut inside their thought, 1 filtered by the server, 1 refused by the server"
    )
    assert unanswered(rows(["empty"] * 12)).words("ties") == "of ties, 12 of 12 answers are empty"


def test_cut_answers_count_only_for_a_task_in_which_none_of_them_scored() -> None:
    right, wrong = rows(["cut"], 1.0, answer="7. Then"), rows(["cut"] * 5, answer="no")[1:]
    assert unanswered([*right, *wrong]).count == 0, "a model that writes on after a right answer has room enough"
    assert unanswered([*right, *wrong, *rows(["cut"] * 3, task="cwe", answer="no")]).cut == 3
    assert unanswered([*rows(["answered"], 1.0), *wrong]).cut == 4, "an answer that ended in time shows no such thing"


def test_metrics_of_one_item_are_one_answer_and_broken_logits_are_none() -> None:
    metrics = [*rows(["empty"] * 3, task="gsm8k:exact_match"), *rows(["empty"] * 3, task="gsm8k:f1")]
    assert (unanswered(metrics).count, unanswered(metrics).asked) == (3, 3)
    assert unanswered(rows(["empty"] * 3, finite=False)).asked == 0


def test_cells_with_unanswered_questions_are_listed() -> None:
    found = unanswered_cells([*rows(["answered", "answered"]), *rows(["empty", "answered"], task="cwe")])
    counts = {"asked": 2, "empty": 1, "cut": 0, "filtered": 0, "failed": 0, "silent": 0, "unended": 0}
    assert found == [{"benchmark": "ruler", "task": "cwe", "length": 512, **counts}]


def counted(empty: int) -> Unanswered:
    return unanswered(rows(["empty"] * empty + ["answered"] * (100 - empty)))


@pytest.mark.parametrize(("new", "old"), [(51, 0), (0, 51), (100, 100)])
def test_nothing_passes_where_most_questions_are_unanswered(new: int, old: int) -> None:
    verdict = judge([cell_sample("vt", 512, [0.0] * 400)], GateRule(margin=5), new="a", old="b")
    assert verdict.outcome == "pass"
    found = doubted(verdict, counted(new), counted(old))
    assert (found.outcome, found.exit_code, found.lines[0].outcome) == ("inconclusive", 3, "inconclusive")
    assert f"of {'a' if new else 'b'}, {new or old} of 100 answers are empty" in found.lines[0].reason
    assert "answers are empty" in found.to_junit_xml() and json.loads(found.to_json())["outcome"] == "inconclusive"


def test_a_model_that_gives_no_answers_fails_and_the_reason_says_why() -> None:
    verdict = judge([cell_sample("vt", 512, [-0.9] * 400)], GateRule(margin=5), new="a", old="b")
    found = doubted(verdict, counted(90), counted(0))
    assert (verdict.outcome, found.outcome) == ("fail", "fail")
    assert found.lines[0].reason.endswith("worse by more than 5; but of a, 90 of 100 answers are empty")


def test_a_tenth_is_taken_and_more_is_told() -> None:
    verdict = judge([cell_sample("vt", 512, [0.0] * 400)], GateRule(margin=5), new="a", old="b")
    assert doubted(verdict, counted(10), counted(0)) == verdict
    found = doubted(verdict, counted(11), counted(50))
    assert found.outcome == "pass"
    told = "; but of a, 11 of 100 answers are empty; of b, 50 of 100 answers are empty"
    assert found.lines[0].reason == verdict.lines[0].reason + told
