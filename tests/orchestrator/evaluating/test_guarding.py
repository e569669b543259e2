"""Guards from a user's chair: a merge that gains at length and loses at short is neither kept nor recommended."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.evaluation_tasks import EvaluationTask
from orchestrator.evaluating.results import read_results
from orchestrator.points.published_card import published_card
from orchestrator.report.leaderboard import leaderboard
from tests.orchestrator.conftest import Ended
from tests.orchestrator.scripts import scripted
from tests.orchestrator.tiny_jobs import RULER
from workers.benchmarks.items import Item

Mergeyard = Callable[..., Ended]

LONG_GAINS = {"w0.2": 0.6, "w0.4": 0.7, "w0.6": 0.8, "w0.8": 0.9, "fmt": 0.5, "long": 0.4}
"""The share of right answers at length."""

SHORT_LOSES = {"w0.8": 0.5, "w0.6": 0.89, "long": 0.2}
"""The share of right answers to a guard, of all others 0.9."""

QUESTIONS = 200
GUARDS = {"tasks": ["gsm8k"], "margin": 5}


def answer(task: EvaluationTask, item: Item) -> float:
    """The first questions right, as many as the share says: of 10 at length, of all of a guard."""
    if task.items.length:
        return float(item.index % 10 < 10 * LONG_GAINS[task.point])
    return float(item.index < QUESTIONS * SHORT_LOSES.get(task.point, 0.9))


@pytest.fixture(autouse=True)
def _answers() -> Iterator[None]:
    with scripted(answer, QUESTIONS):
        yield


def evaluation(**more: Any) -> dict[str, Any]:
    return {"evaluate": {"ruler": {**RULER, "items": 60}, "guards": GUARDS, **more}}


def kept(job: Path) -> list[str]:
    return sorted(path.parent.name for path in (job.parent / "runs/tiny/points").glob("*/manifest.json"))


def asked(job: Path) -> list[str]:
    """The models that answered the guard."""
    return sorted(path.parent.name for path in (job.parent / "runs/tiny/scores").glob("*/gsm8k-*.parquet"))


@pytest.mark.parametrize("race", [None, {"keep": 1}])
def test_the_best_at_length_is_not_kept_if_it_loses_at_short(
    mergeyard: Mergeyard, job_file: Callable[..., Path], race: dict[str, int] | None
) -> None:
    job = job_file(**evaluation(**({"race": race} if race else {})), keep={"best": 1})
    ended = mergeyard("run", job, "--in-process")
    assert ended.code == 0, ended.err
    assert kept(job) == ["w0.6"]
    said = " ".join(ended.out.split())
    assert "Keep w0.6: 80.0" in said
    assert "w0.8 is out: gsm8k -40.0 (" in said and "against fmt, worse by more than the margin of 5." in said
    everyone = ["parent-fmt", "parent-long", "w0.2", "w0.4", "w0.6", "w0.8"]
    assert asked(job) == (["parent-fmt", "w0.6", "w0.8"] if race else everyone)
    if race:
        assert "w0.8 is out: guard gsm8k -40.0" in ended.err
    report = mergeyard("report", job.parent / "runs/tiny", "--json").facts
    assert report["verdict"]["keep"] == "w0.6"
    found = {line["name"]: [(one["guard"], one["outcome"]) for one in _told(line)] for line in report["leaderboard"]}
    assert (found["w0.8"], found["w0.6"], found["fmt"]) == (
        [("gsm8k", "broken")],
        [("gsm8k", "held")],
        [("gsm8k", None)],
    )
    if not race:
        _check_page_and_card(job.parent / "runs/tiny")
    assert mergeyard("run", job, "--in-process").code == 0
    assert kept(job) == ["w0.6"]


def _check_page_and_card(run: Path) -> None:
    page = (run / "report" / "index.html").read_text("utf-8")
    assert '<th scope="col">guard gsm8k</th>' in page and "Guards: ✓ surely within the margin, ✗ surely worse" in page
    marks = [
        (score, mark) for score, _, mark in re.findall(r'number">([\d.]+) <abbr title="(gsm8k [^"]+)">(.*?)<', page)
    ]
    assert sorted(marks) == [("50.0", " ✗"), ("89.0", " ✓"), ("90.0", " ✓"), ("90.0", " ✓")]
    result = read_results(str(run))
    lines = {line.name: line for line in leaderboard(result)}
    cards = {name: published_card("# p\n## Parents\n", {}, {}, lines[name], result.weights) for name in ("w0.8", "fmt")}
    [row] = [row for row in cards["w0.8"].splitlines() if "Guard" in row]
    assert row.startswith("| Guard `gsm8k` | 50.0; gsm8k -40.0 (") and row.endswith("the margin of 5 |")
    assert "| Guard `gsm8k` | 90.0 |" in cards["fmt"], "the baseline is not judged"


def _told(line: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**one, "outcome": one["against"] and one["against"]["outcome"]} for one in line["guards"]]


def test_the_race_confirms_those_that_hold_their_guards(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**evaluation(race={"keep": 1}))
    assert mergeyard("evaluate", job, "--in-process").code == 0
    standing = json.loads((job.parent / "runs/tiny/report/evaluation.json").read_text())["standing"]
    assert [entry["point"] for entry in standing if entry["confirmed"] is not None] == ["w0.6"]


def test_a_gate_fails_a_point_that_loses_a_guard_and_judges_the_next_best(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    job = job_file(**evaluation(), gate={"baseline": "fmt", "margin": 30})
    named = mergeyard("gate", job, "--in-process", "--point", "w0.8", "--junit", tmp_path / "gate.xml")
    assert named.code == 1, named.err
    assert named.out.startswith("gate: fail: w0.8 against fmt\n  guard gsm8k -40.0 (")
    assert 'failures="1"' in (tmp_path / "gate.xml").read_text()
    ended = mergeyard("run", job, "--in-process")
    assert ended.code == 0, ended.err
    assert "gate: pass: w0.6 against fmt\n" in ended.out
    assert "  guard gsm8k -1.0 (" in ended.out and "against fmt, not worse by 5 or more\n" in ended.out


def test_no_point_is_kept_where_each_loses_its_guard(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**evaluation(), grid={"w": [0.8]}, keep={"best": 1}, gate={"baseline": "fmt"})
    ended = mergeyard("run", job, "--in-process")
    assert ended.code == 1, ended.err
    assert kept(job) == [] and "points kept: 0; w0.8 surely lost a guard" in ended.err
    assert "Keep the parent fmt: each merge that was left surely loses at a guard." in " ".join(ended.out.split())
    assert "gate: fail: w0.8 against fmt\n" in ended.out


def test_a_guard_that_is_not_decided_is_said(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**evaluation(guards={**GUARDS, "margin": 1}), keep={"best": 1})
    ended = mergeyard("run", job, "--in-process")
    assert kept(job) == ["w0.6"]
    assert "Guards that are not decided: gsm8k -1.0 (" in " ".join(ended.out.split())
    assert "89.0 ?" in ended.out and "50.0 ✗" in ended.out


@pytest.mark.parametrize(
    ("guards", "words"),
    [
        ({"margin": 1}, "at the margin of 1 an equal model needs about 6,181 items each to hold"),
        ({"limit": 400, "margin": 1}, "a loss of 5.7 points, 8 times in 10 (if 10% of answers differ), but"
         " the margin of 1 cannot be decided for an equal model; give limit: 6181 or margin: 4"),
        ({"limit": 400, "margin": 5}, "an equal model holds the margin of 5"),
    ],
)  # fmt: skip
def test_plan_says_the_loss_that_a_guard_sees(
    mergeyard: Mergeyard, job_file: Callable[..., Path], guards: dict[str, Any], words: str
) -> None:
    ended = mergeyard("plan", job_file(**evaluation(guards={**GUARDS, **guards})))
    assert ended.code == 0, ended.err
    assert words in " ".join(ended.out.split())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"evaluate": {"guards": GUARDS}}, "nothing to evaluate; name a benchmark: ruler, "),
        (evaluation(guards={**GUARDS, "baseline": "fnt"}), 'the baseline "fnt" is neither a parent nor a point'),
        (evaluation(guards={**GUARDS, "margin": 0}), "a margin is a number of points between 0 and 100"),
        (evaluation(guards={"tasks": ["gsm9k"]}), 'lm_eval has no task "gsm9k"; did you mean "gsm8k"?'),
        *(
            (
                evaluation(guards={"tasks": [name]}),
                f'lm_eval has no task "{name}", which is a benchmark of mergeyard; ask it as `{name}:` of `evaluate:`,'
                " and name here tasks of lm-evaluation-harness, such as gsm8k\n",
            )
            for name in ("needle", "custom")
        ),
    ],
)
def test_guards_that_cannot_work_are_refused(
    mergeyard: Mergeyard, job_file: Callable[..., Path], keys: dict[str, Any], message: str
) -> None:
    ended = mergeyard("plan", job_file(**keys))
    assert (ended.code, message in ended.err) == (2, True), ended.err
