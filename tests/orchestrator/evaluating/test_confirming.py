"""The gate from a user's chair, on the tiny parents: whom it judges, on which items, and what its verdict says."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from jobs.evaluation_tasks import EvaluationTask
from orchestrator.evaluating.confirming import first_fresh
from orchestrator.evaluating.results import read_results
from tests.orchestrator.conftest import Ended
from tests.orchestrator.scripts import scripted
from tests.orchestrator.tiny_jobs import PARENTS, RULER, SCALED, SOUP, scaled
from workers.benchmarks.items import Item
from workers.benchmarks.planned import PlannedSet
from workers.evaluating.scores import read_scores

Mergeyard = Callable[..., Ended]


def verdict_of(job: Path) -> dict[str, Any]:
    return json.loads((job.parent / "runs/tiny/gate/verdict.json").read_text())


def items_answered(job: Path, point: str) -> set[int]:
    """The numbers of all items that the point has answered, as the store has them."""
    files = (job.parent / "runs/tiny/scores" / point).iterdir()
    return {row.item for path in files for row in read_scores(path.read_bytes(), str(path)) if row.repeat == 0}


@pytest.mark.usefixtures("real_model")
def test_a_point_that_was_turned_down_fails(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    job = job_file(**scaled([0.3], margin=10, budget=6))
    ended = mergeyard("gate", job, "--in-process", "--junit", tmp_path / "gate.xml")
    assert ended.code == 1, ended.err
    assert ended.out.startswith("gate: fail: w0.3 against long\n  overall: -")
    suite = ElementTree.parse(tmp_path / "gate.xml").getroot()
    assert (suite.get("failures"), suite.get("errors")) == ("1", "0")
    verdict = verdict_of(job)
    assert (verdict["outcome"], verdict["exit_code"], verdict["fresh"]) == ("fail", 1, False)
    assert (verdict["noise"]["flips"], verdict["noise"]["items"]) == (0, 6)
    assert "  asked the same again, 0.0% of 6 answers changed their score" in ended.out
    assert [look["items"] for look in verdict["looks"]] == [6]


def test_the_only_point_is_judged_on_the_items_of_the_evaluation(
    mergeyard: Mergeyard, job_file: Callable[..., Path]
) -> None:
    job = job_file(**scaled([0.3], margin=10, budget=6))
    assert mergeyard("run", job, "--in-process").code == 1
    assert items_answered(job, "w0.3") == set(range(6))


def test_the_best_of_several_is_judged_on_items_nobody_was_chosen_by(
    mergeyard: Mergeyard, job_file: Callable[..., Path]
) -> None:
    job = job_file(**scaled([0.02, 0.3], margin=10, budget=6))
    ended = mergeyard("run", job, "--in-process", "--json")
    assert ended.code == 1, ended.err
    verdict = ended.facts["gate"]
    assert verdict["fresh"] and verdict["looks"][0]["items"] == 6
    assert items_answered(job, verdict["new"]) == items_answered(job, "parent-long") == set(range(12))
    other = {"w0.02", "w0.3"} - {verdict["new"]}
    assert items_answered(job, other.pop()) == set(range(6))
    assert {row["name"]: row["items"] for row in ended.facts["leaderboard"]}[verdict["new"]] == 6, "not in the ranking"


@pytest.mark.usefixtures("real_model")
def test_equal_models_are_asked_more_until_they_pass(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    # the least variance of a loss of 20 points is 0.2·0.8 an item: with none, 1.645 of it in a margin of 0.2 needs 11
    job = job_file(**scaled([0.99], margin=20, budget=60))
    ended = mergeyard("gate", job, "--in-process", "--json")
    assert ended.code == 0, ended.err
    looks = [look["items"] for look in ended.facts["looks"]]
    assert looks[0] == 6 and len(looks) > 1 and all(after <= 2 * before for before, after in pairwise(looks))
    assert ended.facts["rule"]["planned_haystacks"] == 6
    assert [look["outcome"] for look in ended.facts["looks"]] == ["inconclusive"] * (len(looks) - 1) + ["pass"]


def test_models_that_say_nothing_are_not_equal(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled([0.99], margin=20, budget=60))
    with scripted(lambda task, item: ""):
        ended = mergeyard("gate", job, "--in-process")
    assert ended.code == 3, ended.err
    verdict = verdict_of(job)
    [line] = verdict["lines"]
    assert (verdict["outcome"], line["outcome"], line["p_pass"] < 0.05) == ("inconclusive", "inconclusive", True)
    items = line["items"]
    silent = "; ".join(f"of {name}, {items} of {items} answers are empty" for name in ("w0.99", "long"))
    assert f"not worse by 20 or more; but {silent}" in ended.out
    assert {name: found["empty"] for name, found in verdict["unanswered"].items()} == {"w0.99": items, "long": items}


def test_a_point_that_is_its_baseline_passes_unasked(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    ended = mergeyard("gate", job_file(**scaled([1.0], margin=20)), "--in-process")
    assert (ended.code, ended.out) == (0, "gate: pass: w1 against long\n  overall: the same merge as the baseline\n")


def test_bounds_stay_within_what_scores_can_differ_by(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled([0.3], margin=10, budget=6))
    mergeyard("gate", job, "--in-process")
    [line] = verdict_of(job)["lines"]
    assert line["low"] == line["difference"] == -100


def test_a_verdict_that_the_budget_does_not_reach_is_inconclusive(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    job = job_file(**scaled([0.98], margin=1, budget=9))
    ended = mergeyard("gate", job, "--in-process", "--junit", tmp_path / "gate.xml")
    assert ended.code == 3, ended.err
    assert "gate: inconclusive: w0.98 against long" in ended.out and "items would decide" in ended.out
    assert [look["items"] for look in verdict_of(job)["looks"]] == [6, 9]
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("errors") == "1"


def test_a_budget_of_the_first_look_is_a_plain_test(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled([0.98], margin=1, budget=6))
    assert mergeyard("gate", job, "--in-process", "--quiet") == Ended(3, "", "")
    verdict = verdict_of(job)
    assert verdict["rule"]["planned_haystacks"] is None and len(verdict["looks"]) == 1


def test_one_open_length_is_asked_more_until_the_budget_ends(
    mergeyard: Mergeyard, job_file: Callable[..., Path]
) -> None:
    # overall the margin of 60 points is passed at once, at each length that of 1 point is far away
    ruler = {**RULER, "lengths": [256, 320]}
    job = job_file(**scaled([0.98], margin=60, length_margin=1, budget=9), evaluate={"ruler": ruler})
    ended = mergeyard("gate", job, "--in-process", "--json")
    assert ended.code == 3, ended.err
    assert [line["outcome"] for line in ended.facts["lines"]] == ["pass", "inconclusive", "inconclusive"]
    assert [look["items"] for look in ended.facts["looks"]] == [12, 18]


def test_fresh_items_share_no_haystack_with_those_points_are_chosen_by() -> None:
    planned = PlannedSet("ruler", "vt", 512, 4, 4, "d", lambda _: b"", "job.yaml:1", share=8, grows=True)
    assert first_fresh(planned) == 8
    assert first_fresh(replace(planned, made=16)) == 16


def test_a_gate_leaves_the_evaluation_that_ended_as_it_is(
    mergeyard: Mergeyard, job_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.evaluating.session.RENEW_SECONDS", 0.0)
    job = job_file(**scaled([0.3, 1.0], margin=20, budget=12))
    mergeyard("run", job, "--in-process")
    before = read_results(str(job.parent / "runs/tiny"))
    assert before.finished and {row.item for row in before.rows} == set(range(6))
    assert mergeyard("gate", job, "--point", "w0.3", "--in-process").code in (1, 3)
    assert read_results(str(job.parent / "runs/tiny")) == before


def test_a_verdict_goes_with_its_gate(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled([0.98], margin=40))
    mergeyard("run", job, "--in-process")
    assert verdict_of(job)["new"] == "w0.98"
    mergeyard("run", job_file(**scaled([0.98]) | {"gate": None}), "--in-process")
    assert not (job.parent / "runs/tiny/gate").exists()


def test_a_second_call_asks_nothing_and_says_the_same(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled([0.98], margin=20, budget=40))
    first = mergeyard("gate", job, "--in-process", "--json")
    files = {path: path.stat().st_mtime_ns for path in (job.parent / "runs/tiny/scores").rglob("*.parquet")}
    again = mergeyard("gate", job, "--in-process", "--json")
    assert (again.code, again.facts) == (first.code, first.facts)
    assert files == {path: path.stat().st_mtime_ns for path in (job.parent / "runs/tiny/scores").rglob("*.parquet")}


@pytest.mark.usefixtures("real_model")
def test_a_baseline_need_be_no_parent_of_the_merge(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(
        parents={name: str(PARENTS / name) for name in ("long", "fmt", "base")},
        recipe=SOUP,
        grid={"w": [0.7]},
        gate={"baseline": "base", "margin": 30, "budget": 12},
        evaluate={"ruler": {**RULER, "lengths": [1024]}},
    )
    ended = mergeyard("gate", job, "--in-process", "--json")
    assert ended.code == 0, ended.err
    assert (ended.facts["new"], ended.facts["old"]) == ("w0.7", "base")
    assert ended.facts["lines"][0]["difference"] > 50, "the base finds nothing at 1,024 tokens"


def test_a_named_point_is_judged(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled([0.02, 1.0], margin=10))
    ended = mergeyard("gate", job, "--point", "w0.02", "--in-process")
    assert ended.code == 1 and "w0.02 against w1" in ended.out, "the baseline is a point as well, under its name"


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        ({"gate": None}, (), "job.yaml: no gate to pass; add `gate: {baseline: …}`"),
        ({}, ("--point", "w0.31"), '"w0.31" is neither a point nor a parent of this job; did you mean "w0.3"?'),
    ],
)
def test_what_cannot_be_judged_is_refused(
    mergeyard: Mergeyard,
    job_file: Callable[..., Path],
    change: dict[str, Any],
    arguments: tuple[str, ...],
    message: str,
) -> None:
    job = job_file(**scaled([0.3]) | change)
    ended = mergeyard("gate", job, "--in-process", *arguments)
    assert ended.code == 2 and message in ended.err and not (job.parent / "runs").exists()


def test_a_file_for_the_verdict_is_looked_at_first(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled([0.3]))
    ended = mergeyard("gate", job, "--in-process", "--junit", job.parent / "none" / "gate.xml")
    assert ended.code == 2 and "there is no folder" in ended.err and not (job.parent / "runs").exists()


def test_a_server_has_no_second_model_to_judge_by(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled([1.0]), engine={"name": "openai", "url": "http://127.0.0.1:9/v1"})
    ended = mergeyard("gate", job, "--in-process")
    assert ended.code == 2 and "serves one model, a gate compares two" in ended.err


def test_models_of_different_tokenizers_are_not_compared(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    shutil.copytree(PARENTS / "base", tmp_path / "other")
    tokenizer = json.loads((tmp_path / "other/tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (tmp_path / "other/tokenizer.json").write_text(json.dumps(tokenizer))
    job = job_file(
        parents={"long": str(PARENTS / "long"), "other": str(tmp_path / "other")},
        recipe=SCALED,
        grid={"w": [1.0]},
        gate={"baseline": "other"},
    )
    ended = mergeyard("gate", job, "--in-process")
    assert ended.code == 1 and "different tokenizers" in ended.err, "the answers that show it are in the store"


def thinks(task: EvaluationTask, item: Item) -> str:
    """The right answer after eight words, or as many as the name of a point says."""
    words = re.fullmatch(r"w0\.(\d)", task.point)
    return " ".join(["so"] * (8 if words is None else int(words[1])) + [*item.answers])


@pytest.mark.parametrize(("weight", "code", "outcome"), [(0.2, 0, "pass"), (0.9, 1, "fail")])
def test_a_gate_may_ask_for_half_the_thinking(
    mergeyard: Mergeyard, job_file: Callable[..., Path], weight: float, code: int, outcome: str, tmp_path: Path
) -> None:
    ruler = {**RULER, "items": 60, "max_new_tokens": 12}
    job = job_file(**scaled([weight], margin=20, budget=60, output_tokens={"at_most": 0.5}), evaluate={"ruler": ruler})
    with scripted(thinks):
        planned = mergeyard("plan", job)
        assert "tokens of output that are surely at most 0.5 times the baseline's" in planned.out
        ended = mergeyard("gate", job, "--in-process", "--junit", tmp_path / "gate.xml")
    assert ended.code == code, ended.err
    score, line = verdict_of(job)["lines"]
    assert (score["outcome"], line["scope"], line["outcome"]) == ("pass", "output_tokens", outcome)
    assert line["difference"] == pytest.approx(10 * weight + 1 - 0.5 * 9)
    assert f"\n  output_tokens: {10 * weight + 1:.1f} per question against 9.0, " in ended.out
    assert ElementTree.parse(tmp_path / "gate.xml").getroot().get("tests") == "2"
    assert mergeyard("report", tmp_path / "runs/tiny", "--json").code == 0
    page = (tmp_path / "runs/tiny/report/index.html").read_text()
    assert page.count(f"output_tokens: {10 * weight + 1:.1f} per question") == 2, (
        "in the list of the gate, and under Why"
    )


def test_tokens_of_tasks_with_limits_of_their_own_are_refused_by_name(
    mergeyard: Mergeyard, job_file: Callable[..., Path]
) -> None:
    mrcr = {"lengths": [1024], "items": 6, "needles": [2]}
    job = job_file(**scaled([0.9], output_tokens={"at_most": 0.5}), evaluate={"mrcr": mrcr})
    ended = mergeyard("plan", job)
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "the tasks of mrcr have limits of their own; set `max_new_tokens:` of mrcr" in ended.err
    job = job_file(**scaled([0.9], output_tokens={"at_most": 0.5}), evaluate={"mrcr": {**mrcr, "max_new_tokens": 64}})
    assert mergeyard("plan", job).code == 0
