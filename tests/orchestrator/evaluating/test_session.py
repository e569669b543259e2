"""An evaluation from a user's chair, on the tiny parents: what it asks, keeps, resumes, races and refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs.errors import BadInput, RunBusy
from jobs.evaluation_tasks import EvaluationTask, ScoreRow
from jobs.job import load_job, read_job
from jobs.manifest import Manifest
from jobs.sealing import sealed, unsealed
from jobs.yaml_nodes import node_of
from orchestrator.cluster import in_process
from orchestrator.evaluating.results import EVALUATION, RESULTS, VERDICT, read_results
from orchestrator.evaluating.session import Session
from orchestrator.evaluating.subjects import questions
from orchestrator.planning.plan import make_plan
from orchestrator.points.published_card import published_card
from orchestrator.report.leaderboard import leaderboard
from orchestrator.report.page import page
from orchestrator.report.run import read_run, report_on
from orchestrator.watching import Watcher
from tests.model_server import serving
from tests.orchestrator.conftest import Ended, files_under
from tests.orchestrator.evaluating.asking import evaluated
from tests.orchestrator.tiny_jobs import PARENTS, RULER, SCALED, job_text, soup_parents
from workers.engines.transformers_engine import TransformersEngine
from workers.evaluating.holding import fetch
from workers.evaluating.scores import read_scores

Mergeyard = Callable[..., Ended]


def scaled_race(**more: Any) -> dict[str, Any]:
    """A race of two good points and three that were made bad on purpose."""
    return {
        "parents": {"long": str(PARENTS / "long")},
        "recipe": SCALED,
        "grid": {"w": [1.0, 0.98, 0.3, 0.1, 0.02]},
        "evaluate": {"ruler": {**RULER, "items": 30}, "race": {"keep": 1}, **more},
    }


def results(folder: Path) -> list[ScoreRow]:
    path = folder / "runs" / "tiny" / "report" / "results.parquet"
    return read_scores(path.read_bytes(), str(path))


def race_record(folder: Path) -> dict[str, Any]:
    record = json.loads((folder / "runs" / "tiny" / "report" / "evaluation.json").read_text())
    assert record["finished"]
    return {key: record[key] for key in ("departures", "standing", "noise", "cost_share")}


def blocks(tasks: list[EvaluationTask]) -> Counter[str]:
    return Counter(task.key for task in tasks)


# ---- what is kept


@pytest.mark.usefixtures("real_model")
def test_keep_none_leaves_scores_and_no_point(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file()
    ended = mergeyard("run", job, "--in-process", "--json")
    assert ended.code == 0, ended.err
    run = job.parent / "runs" / "tiny"
    assert not (run / "points").exists()
    counts = Counter((row.point, row.benchmark, row.task, row.length) for row in results(job.parent))
    names = ["fmt", "long", "w0.2", "w0.4", "w0.6", "w0.8"]
    assert counts == {(name, "ruler", "niah_single_1", 256): 6 for name in names}
    facts = ended.facts
    assert facts["results"] == str(run / "report" / "results.parquet")
    assert {line["name"] for line in facts["leaderboard"]} == set(names)
    assert facts["departures"] == [] and facts["noise"]["items"] == 6 and facts["cost_share"] == 1


@pytest.mark.usefixtures("real_model")
def test_keep_all_writes_every_point_and_scores_these_very_weights(
    mergeyard: Mergeyard, job_file: Callable[..., Path]
) -> None:
    job = job_file(keep="all")
    assert mergeyard("run", job, "--in-process").code == 0
    points = job.parent / "runs" / "tiny" / "points"
    manifests = {path.parent.name: Manifest.from_json(path.read_bytes()) for path in points.glob("*/manifest.json")}
    assert manifests.keys() == {"w0.2", "w0.4", "w0.6", "w0.8"}
    for row in results(job.parent):
        if row.point in manifests:
            assert (row.weights, row.recipe) == (manifests[row.point].weights, manifests[row.point].digest)


def test_keep_best_writes_the_best_and_no_other(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled_race(race={"keep": 2}), keep={"best": 2})
    ended = mergeyard("run", job, "--in-process", "--json")
    assert ended.code == 0, ended.err
    best = [line["name"] for line in ended.facts["leaderboard"]][:2]
    written = {path.parent.name for path in (job.parent / "runs/tiny/points").glob("*/manifest.json")}
    assert written == set(best) == {"w1", "w0.98"}


def test_keep_best_says_that_names_decided_among_equal_scores(
    mergeyard: Mergeyard, job_file: Callable[..., Path]
) -> None:
    job = job_file(**scaled_race(), keep={"best": 1})
    ended = mergeyard("run", job, "--in-process")
    assert ended.code == 0, ended.err
    assert "2 points share the first place, the parent long (w1) among them: 100.0 (91.7 to 100.0)." in " ".join(
        ended.out.split()
    )
    assert "names decide which points are kept: w1 scored as much as w0.98\n" in ended.err
    assert [path.name for path in (job.parent / "runs/tiny/points").iterdir()] == ["w0.98"]


def test_a_lack_of_room_that_is_seen_once_the_scores_are_there_is_no_bad_input(
    mergeyard: Mergeyard, job_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.storage.local.LocalStore.free_bytes", lambda _: 0)
    job = job_file(keep={"best": 1})
    ended = mergeyard("run", job, "--in-process")
    assert (ended.code, len(results(job.parent))) == (1, 36)
    assert " MB to write and 0 B free; make room" in ended.err.splitlines()[-1]


# ---- what is asked, and asked again


def test_every_set_of_items_is_there_once_for_all_points(tmp_path: Path) -> None:
    _, asked = evaluated(job_text(tmp_path))
    assert len(list((tmp_path / "runs/tiny/items").iterdir())) == 1
    assert len({task.items.digest for task in asked}) == 1


def test_a_run_that_broke_off_asks_only_what_is_missing(tmp_path: Path) -> None:
    whole, everything = evaluated(job_text(tmp_path / "whole"))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        evaluated(job_text(tmp_path), most=3)
    result, rest = evaluated(job_text(tmp_path))
    assert len(rest) == len(everything) - 3
    assert [(row.point, row.item, row.answer) for row in result.rows] == [
        (row.point, row.item, row.answer) for row in whole.rows
    ]
    again, nothing = evaluated(job_text(tmp_path))
    assert nothing == [] and again.rows == result.rows


def test_a_driver_that_slept_through_a_takeover_replaces_neither_scores_nor_verdict(tmp_path: Path) -> None:
    """It has heard of nothing: its heartbeat, which would tell it, comes every ten seconds."""
    plan = make_plan(load_job(job_text(tmp_path, grid={"w": [0.2]}), "job.yaml"))
    run, newer = tmp_path / "runs" / "tiny", b"the other driver's"
    files = [run / VERDICT, run / RESULTS, run / EVALUATION]
    with (
        pytest.raises(RunBusy),
        Session.of(plan, questions(plan), in_process.InProcessEvaluators, Watcher(visible=False)) as session,
    ):
        session.run()
        session.conclude({"outcome": "pass"})
        assert unsealed(files[0].read_bytes()) == {"outcome": "pass"}
        lease = unsealed((run / "lease.json").read_bytes())
        (run / "lease.json").write_bytes(sealed({**lease, "nonce": "another driver's", "epoch": 2}))
        for path in files:
            path.write_bytes(newer)
        for replace in (lambda: session.conclude({"outcome": "fail"}), session.run):
            with pytest.raises(RunBusy, match="another driver took this run over"):
                replace()
    assert [path.read_bytes() for path in files] == [newer] * 3


def test_another_grid_over_the_same_run_is_refused(tmp_path: Path) -> None:
    evaluated(job_text(tmp_path))
    with pytest.raises(Exception, match="belongs to another job"):
        evaluated(job_text(tmp_path, grid={"w": [0.5]}))


def test_other_weights_ask_nothing_again_and_change_the_scores(tmp_path: Path) -> None:
    ruler, needle = {**RULER, "items": 6}, {"lengths": [256], "depths": 2, "items": 1, "haystack": "noise"}
    asked = {"ruler": ruler, "needle": needle}
    _, everything = evaluated(job_text(tmp_path, evaluate=asked))
    result, again = evaluated(job_text(tmp_path, evaluate={**asked, "weights": {"ruler": 3}}))
    assert everything and not again
    assert {(row.benchmark, row.weight) for row in result.rows} == {("ruler", 3.0), ("needle", 1.0)}
    assert read_results(str(tmp_path / "runs" / "tiny")) == result
    for line in leaderboard(result):
        parts = line.by_benchmark
        assert line.score == pytest.approx((3 * parts["ruler"] + parts["needle"]) / 4)
    shown = page(report_on(read_run(str(tmp_path / "runs" / "tiny"))))
    assert "Mean over lengths, over ruler × 3 and needle, and over their tasks" in shown
    card = published_card("# p\n## Parents\n", {}, {}, leaderboard(result)[0], result.weights)
    assert "| Score (0 to 100): ruler × 3 and needle, " in card
    alike, _ = evaluated(job_text(tmp_path, evaluate=asked))
    assert {row.weight for row in alike.rows} == {1.0}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"ruler": RULER, "weights": {"ruler": 2}}, "the weight of ruler has no effect, as no other benchmark ranks"),
        (
            {"ruler": RULER, "perplexity": {"lengths": [256], "blocks": 2}, "weights": {"perplexity": 2}},
            "the weight of perplexity has no effect, as ruler alone ranks the points; take it out",
        ),
    ],
)
def test_weights_without_an_effect_are_refused(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        questions(make_plan(load_job(job_text(tmp_path, evaluate=keys), "job.yaml")))


def test_more_items_ask_only_for_those(tmp_path: Path) -> None:
    few, _ = evaluated(job_text(tmp_path))
    more, asked = evaluated(job_text(tmp_path, evaluate={"ruler": {**RULER, "items": 9}}))
    assert {(task.first, task.last) for task in asked} == {(6, 9)}, "of every point, and of the noise floor"
    assert [row for row in more.rows if row.item < 6] == few.rows


def test_another_length_asks_only_for_that_length(tmp_path: Path) -> None:
    evaluated(job_text(tmp_path))
    _, asked = evaluated(job_text(tmp_path, evaluate={"ruler": {**RULER, "lengths": [256, 320]}}))
    assert {task.items.length for task in asked} == {320}


def test_points_that_are_the_same_merge_are_asked_once(tmp_path: Path) -> None:
    points = [{"name": "one", "w": 0.6}, {"name": "other", "w": 0.6}, {"name": "parent", "w": 1}]
    result, asked = evaluated(job_text(tmp_path, grid={"points": points}, point=None))
    assert {task.point for task in asked} == {"one", "parent", "fmt"}
    assert result.same == {"other": "one"}
    assert result.baselines == ("fmt",) and result.parents == {"long": "parent", "fmt": "fmt"}


def test_blocks_keep_haystacks_whole(tmp_path: Path) -> None:
    ruler = {**RULER, "items": 70, "questions": 4, "lengths": [320]}
    result, asked = evaluated(job_text(tmp_path, grid={"w": [0.6]}, evaluate={"ruler": ruler}))
    ranges = sorted({(task.first, task.last) for task in asked if task.repeat == 0})
    assert ranges == [(0, 64), (64, 70)]
    again = {(task.first, task.last) for task in asked if task.repeat}
    assert again == {(0, 28)}, "25 items, rounded up to whole haystacks of 4"
    assert result.noise is not None and result.noise.items == 28


@pytest.mark.usefixtures("real_model")
def test_the_noise_floor_is_zero_where_equal_questions_get_equal_answers(tmp_path: Path) -> None:
    result, _ = evaluated(job_text(tmp_path))
    assert result.noise is not None and result.noise.rate == 0
    assert all(row.repeat == 0 for row in result.rows)


# ---- the race


@pytest.mark.usefixtures("real_model")
def test_bad_points_leave_the_race_and_the_record_says_why(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled_race())
    ended = mergeyard("run", job, "--in-process", "--json")
    assert ended.code == 0, ended.err
    record = race_record(job.parent)
    assert {departure["point"] for departure in record["departures"]} == {"w0.3", "w0.1", "w0.02"}
    for departure in record["departures"]:
        assert (departure["rung"], departure["items"]) == (0, 10)
        assert departure["gap"] > departure["bound"] >= 0
        assert f"{departure['point']} leaves: {departure['reason']}" in ended.err, "told where no bar is drawn"
    assert record == {key: ended.facts[key] for key in record}
    asked = Counter(row.point for row in results(job.parent))
    assert [asked[name] for name in ("w0.3", "w0.1", "w0.02")] == [10, 10, 10]
    assert record["cost_share"] == pytest.approx((3 * 10 + 2 * 30 + 15) / (5 * 30))


@pytest.mark.usefixtures("real_model")
def test_a_point_that_writes_less_than_the_best_stays_where_the_job_says_so(tmp_path: Path) -> None:
    """A model of zeros ends every answer at once; the other bad one writes to the limit."""
    job = scaled_race(race={"output_tokens": True}) | {"grid": {"w": [1.0, 0.3, 0.0]}}
    result, _ = evaluated(job_text(tmp_path, **job))
    assert [departure.point for departure in result.departures] == ["w0.3"]
    written = {row.point: row.tokens_out for row in result.rows if row.item == 0}
    assert written["w0"] == 0 < written["w1"] < written["w0.3"]
    assert "fewer tokens of output" in result.rule


def test_the_winner_is_confirmed_on_items_nobody_was_chosen_by(tmp_path: Path) -> None:
    result, _ = evaluated(job_text(tmp_path, **scaled_race()))
    winner, second = result.standing[:2]
    items = {name: {row.item for row in result.rows if row.point == name} for name in (winner.point, second.point)}
    assert items == {winner.point: set(range(45)), second.point: set(range(30))}
    fresh = [row.score for row in result.rows if row.point == winner.point and row.item >= 30]
    assert winner.confirmed == pytest.approx(sum(fresh) / 15) and second.confirmed is None


def test_quiet_prints_the_result_and_no_departures(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    ended = mergeyard("evaluate", job_file(**scaled_race()), "--in-process", "--quiet")
    assert (ended.code, ended.err) == (0, "")
    assert "score" in ended.out  # the result is what was asked for


def test_a_race_that_broke_off_goes_on_to_the_same_end(tmp_path: Path) -> None:
    whole, everything = evaluated(job_text(tmp_path / "whole", **scaled_race()))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        evaluated(job_text(tmp_path, **scaled_race()), most=6)
    resumed, rest = evaluated(job_text(tmp_path, **scaled_race()))
    assert len(rest) == len(everything) - 6
    assert resumed.race_document() == whole.race_document() == whole.race_document() | race_record(tmp_path)
    assert read_results(str(tmp_path / "runs" / "tiny")) == resumed


@pytest.mark.usefixtures("real_model")
def test_only_those_who_stay_answer_what_is_not_raced_over(tmp_path: Path) -> None:
    more = {"needle": {"lengths": [320], "depths": 2, "items": 1}, "perplexity": {"lengths": [256], "blocks": 2}}
    (tmp_path / "own.jsonl").write_text('{"input": "1 2 3 1 2 3 1 2 3 1 2", "target": "3"}')
    own = {"file": str(tmp_path / "own.jsonl"), "scorer": "contains", "max_new_tokens": 8}
    result, _ = evaluated(job_text(tmp_path, **scaled_race(**more, custom=own)))
    answered = {(row.point, row.benchmark) for row in result.rows}
    stayed = {"w1", "w0.98"}
    for name in ("needle", "perplexity", "custom"):
        assert {point for point, benchmark in answered if benchmark == name} == stayed, name
    assert result.ranked == ("ruler",)


def test_a_race_over_the_needle_asks_whole_rounds_of_depths(tmp_path: Path) -> None:
    job = scaled_race()
    job["evaluate"] = {"needle": {"lengths": [320], "depths": 3, "items": 6}, "race": {"keep": 1}}
    result, asked = evaluated(job_text(tmp_path, **job))
    assert result.ranked == ("needle",) and len(result.departures) == 3
    assert {(task.first % 3, task.last % 3) for task in asked} == {(0, 0)}


def test_every_point_answers_all_lengths_at_each_rung(tmp_path: Path) -> None:
    job = scaled_race()
    job["evaluate"]["ruler"] = {**RULER, "items": 12, "lengths": [256, 320]}
    result, _ = evaluated(job_text(tmp_path, **job))
    left = Counter((row.point, row.length) for row in result.rows if row.point == "w0.02")
    assert left == {("w0.02", 256): 10, ("w0.02", 320): 10}


# ---- rankings without RULER


@pytest.mark.usefixtures("real_model")
def test_perplexity_ranks_where_nothing_else_is_asked(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(**scaled_race() | {"evaluate": {"perplexity": {"lengths": [256, 512], "blocks": 2}}})
    ended = mergeyard("evaluate", job, "--in-process", "--json")
    assert ended.code == 0, ended.err
    lines = {line["name"]: line for line in ended.facts["leaderboard"]}
    scores = [line["score"] for line in lines.values() if line["kind"] == "point"]
    assert scores == sorted(scores, reverse=True)
    nothing = lines["w0.02"]["perplexity"]["512"]
    assert nothing == {"0": pytest.approx(2048, rel=0.01), "256": pytest.approx(2048, rel=0.01)}, "a uniform guess"
    assert lines["w1"]["perplexity"].keys() == {"256", "512"}
    assert lines["w1"]["perplexity"]["512"].keys() == {"0", "256"}
    assert lines["w1"]["effective_length"] is None and ended.facts["noise"] is None
    table = mergeyard("evaluate", job, "--in-process").out
    assert "perplexity at 512" in table and "from 256" in table


# ---- lm-evaluation-harness

TASK = """\
task: tiny
dataset_path: json
dataset_kwargs: {data_files: {test: docs.json}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_target: 0
doc_to_choice: ["green", "Tuesday"]
metric_list: [{metric: acc}]
"""


@pytest.fixture
def harness_task(
    real_model: None, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tiny.yaml beside the job: four questions that need no needle."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    questions = ["The grass is", "The sky is blue. The grass is", "Is the grass", "Here we go. The grass is"]
    (tmp_path / "docs.json").write_text("\n".join(json.dumps({"question": question}) for question in questions))
    (tmp_path / "tiny.yaml").write_text(TASK)


@pytest.mark.usefixtures("harness_task", "harness_index")
def test_a_task_of_the_harness_stands_beside_the_rank(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file(grid={"w": [0.6]}, evaluate={"ruler": RULER, "lm_eval": {"tasks": ["tiny.yaml"], "limit": 3}})
    ended = mergeyard("evaluate", job, "--in-process", "--json")
    assert ended.code == 0, ended.err
    rows = [row for row in results(job.parent) if row.benchmark == "lm_eval"]
    assert {(row.point, row.task, row.item) for row in rows} == {
        (point, "tiny:acc", item) for point in ("w0.6", "long", "fmt") for item in range(3)
    }
    mean = {row.point: [other.score for other in rows if other.point == row.point] for row in rows}
    for line in ended.facts["leaderboard"]:
        assert line["beside"] == {"tiny:acc": pytest.approx(100 * sum(mean[line["name"]]) / 3, abs=0.01)}


@pytest.mark.usefixtures("harness_task", "harness_index")
def test_a_real_task_of_the_harness_guards_the_points(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    questions = [f"{number} times the grass is" for number in range(60)]
    (tmp_path / "docs.json").write_text("\n".join(json.dumps({"question": question}) for question in questions))
    (tmp_path / "tiny.yaml").write_text(TASK.replace("Tuesday", 'blue", "yellow'))
    guards = {"tasks": ["tiny.yaml"], "margin": 1}
    keys = scaled_race() | {"grid": {"w": [0.98, 0.3]}, "evaluate": {"ruler": RULER, "guards": guards}}
    job = job_file(**keys, keep={"best": 2})
    ended = mergeyard("run", job, "--in-process", "--json")
    assert ended.code == 0, ended.err
    told = {line["name"]: line["guards"][0] for line in ended.facts["leaderboard"]}
    found = {name: guarded["against"] and guarded["against"]["outcome"] for name, guarded in told.items()}
    assert found == {"w0.98": "undecided", "w0.3": "broken", "long": None}
    assert {guarded["items"] for guarded in told.values()} == {60}
    assert [path.name for path in (tmp_path / "runs/tiny/points").iterdir()] == ["w0.98"]
    assert "points kept: 1; w0.3 surely lost a guard" in ended.err


@pytest.mark.usefixtures("harness_task", "harness_index")
def test_a_task_of_the_harness_ranks_where_nothing_else_is_asked(tmp_path: Path) -> None:
    text = job_text(tmp_path, grid={"w": [0.6]}, evaluate={"lm_eval": {"tasks": [str(tmp_path / "tiny.yaml")]}})
    result, asked = evaluated(text)
    assert result.ranked == ("lm_eval",) and len(asked) == 3 and len(result.rows) == 12
    [standing] = result.standing
    assert standing.score == sum(row.score for row in result.rows if row.point == "w0.6") / 4
    assert evaluated(text)[1] == []


@pytest.mark.usefixtures("harness_task", "harness_index")
def test_a_remark_of_a_worker_reaches_the_terminal_once_the_page_and_a_run_that_goes_on(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(TASK.replace("{metric: acc}", "{metric: acc}, {metric: brier_score}"))
    job = job_file(grid={"w": [0.6]}, evaluate={"lm_eval": {"tasks": ["tiny.yaml"], "limit": 3}})
    remark = "tiny.yaml: brier_score is left out: less of it is better"
    run = tmp_path / "runs" / "tiny"
    for _ in ("three models make the same remark", "their scores lie in the run"):
        ended = mergeyard("evaluate", job, "--in-process")
        assert ended.code == 0 and ended.err.count(remark) == 1, ended.err
        [kept] = json.loads((run / "report/evaluation.json").read_text())["remarks"]
        assert kept.endswith(remark)
        assert (run / "report/index.html").read_text().count(remark) == 1
    assert remark not in mergeyard("evaluate", job, "--in-process", "--quiet").err


# ---- any checkpoint


@pytest.mark.usefixtures("real_model")
def test_any_checkpoints_are_scored_side_by_side(mergeyard: Mergeyard, tmp_path: Path) -> None:
    options = ["--lengths", "256", "--items", "4", "--tasks", "niah_single_1", "--in-process", "--json"]
    models = [PARENTS / "long", PARENTS / "fmt"]
    ended = mergeyard("evaluate", *models, *options, "--output", tmp_path / "runs")
    assert ended.code == 0, ended.err
    assert {line["name"] for line in ended.facts["leaderboard"]} == {"long", "fmt"}
    other = mergeyard("evaluate", PARENTS / "base", *options, "--output", tmp_path / "runs")
    assert other.code == 0, other.err
    assert len(list((tmp_path / "runs").iterdir())) == 2, "other models, another run"


@pytest.fixture
def served_long(real_model: None) -> Iterator[ThreadingHTTPServer]:
    """An OpenAI-compatible server of the parent `long`."""
    with serving(TransformersEngine.from_folder(PARENTS / "long", version="long", device="cpu")) as server:
        yield server


def test_a_served_checkpoint_is_asked_in_place_of_its_files(
    mergeyard: Mergeyard, tmp_path: Path, served_long: ThreadingHTTPServer
) -> None:
    url = f"http://127.0.0.1:{served_long.server_port}/v1"
    options = ["--lengths", "256", "--items", "4", "--tasks", "niah_single_1", "--in-process", "--json"]
    answers: list[list[tuple[str, int, str]]] = []
    for where in (["--server", url, "--output", tmp_path / "served"], ["--output", tmp_path / "files"]):
        ended = mergeyard("evaluate", PARENTS / "long", *options, *where)
        assert ended.code == 0, ended.err
        rows = read_scores(Path(ended.facts["results"]).read_bytes(), "results")
        answers.append([(row.point, row.item, row.answer) for row in rows])
        assert ("http" in rows[0].weights) == (where[0] == "--server")
    assert answers[0] == answers[1]
    assert rows[0].recipe, "a merge by its digest"


def unmergeable(folder: Path, kind: str) -> Path:
    """The parent `long` as somebody serves it, in a form that nothing is merged from."""
    shutil.copytree(PARENTS / "long", folder / kind)
    config = json.loads((folder / kind / "config.json").read_text())
    weights = folder / kind / "model.safetensors"
    match kind:
        case "gptq" | "awq" | "fp8":
            config["quantization_config"] = {"quant_method": kind}
            (folder / kind / "config.json").write_text(json.dumps(config))
        case "gguf":
            weights.rename(weights.with_name("model-q4_k_m.gguf"))
            (folder / kind / "config.json").unlink()
        case "bin":
            old = weights.with_name("pytorch_model.bin")
            torch.save(load_file(weights), old, _use_new_zipfile_serialization=False)
            weights.unlink()
        case _:
            weights.unlink()
    return folder / kind


UNMERGEABLE = ("gptq", "awq", "fp8", "gguf", "bin", "tokenizer")


def test_a_model_that_cannot_be_merged_is_scored_through_a_server_as_its_refusal_advises(
    mergeyard: Mergeyard, tmp_path: Path, served_long: ThreadingHTTPServer
) -> None:
    url = f"http://127.0.0.1:{served_long.server_port}/v1"
    options = ["--lengths", "256", "--items", "2", "--tasks", "niah_single_1", "--in-process", "--json"]
    merges: set[str] = set()
    for kind in UNMERGEABLE:
        model = unmergeable(tmp_path, kind)
        where = ["--output", tmp_path / "runs"]
        refused = mergeyard("evaluate", model, *options, *where)
        assert refused.code == 2
        assert refused.err.endswith("; to score it as it is, take a server (`--server URL`)\n"), refused.err
        ended = mergeyard("evaluate", model, *options, *where, "--server", url, "--served", "long")
        assert ended.code == 0, ended.err
        rows = read_scores(Path(ended.facts["results"]).read_bytes(), "results")
        assert {(row.point, row.weights) for row in rows} == {(kind, f"{url}#long")}
        merges.add(rows[0].recipe)
    assert len(merges) == len(UNMERGEABLE), "other files, another model"


def production(tmp_path: Path, kind: str, **more: Any) -> Any:
    """The plan of a soup with a production model beside it, as the baseline of a gate."""
    parents = {"prod": str(unmergeable(tmp_path, kind)), "a": str(PARENTS / "long"), "b": str(PARENTS / "fmt")}
    models = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]
    job: dict[str, Any] = {
        "name": "beside",
        "parents": parents,
        "recipe": {"merge_method": "linear", "models": models},
        "evaluate": {"ruler": {"lengths": [256], "items": 4, "tasks": ["niah_single_1"]}},
        "gate": {"baseline": "prod"},
        "output": str(tmp_path / "runs"),
    }
    return make_plan(read_job(node_of(job | more, "job.yaml")))


@pytest.mark.parametrize("kind", ["gptq", "awq", "fp8", "gguf"])
def test_a_production_model_that_cannot_be_merged_is_a_baseline(tmp_path: Path, kind: str) -> None:
    with pytest.raises(BadInput, match=r"; to score it as it is, take `engine: vllm` or a server \(`engine: openai`\)"):
        questions(production(tmp_path / "1", kind))
    asked = questions(production(tmp_path / "2", kind, engine={"name": "vllm"}))
    prod, soup = asked.parents["prod"], next(iter(asked.points.values()))
    assert prod.kind == "parent" and prod.model != soup.model
    assert {cell: entry.digest for cell, entry in prod.sets.items()} == {
        cell: entry.digest for cell, entry in soup.sets.items()
    }, "the same questions"
    spec = asked.models[prod.model]
    assert spec.tensors == () and spec.as_it_is is not None
    weights = "model-q4_k_m.gguf" if kind == "gguf" else "model.safetensors"
    fetched = tmp_path / "fetched"
    fetched.mkdir()
    fetch(spec.as_it_is, fetched)
    assert (fetched / weights).read_bytes() == (PARENTS / "long" / "model.safetensors").read_bytes()
    assert spec.bytes >= (fetched / weights).stat().st_size and asked.models[soup.model].as_it_is is None


def test_what_cannot_be_merged_is_refused_in_a_merge_and_where_it_would_be_written(tmp_path: Path) -> None:
    for number, recipe in enumerate(
        (
            {"merge_method": "linear", "models": [{"model": "prod", "parameters": {"weight": 1}}]},
            {"merge_method": "passthrough", "models": [{"model": "prod"}]},
        )
    ):
        with pytest.raises(
            BadInput, match=r"quantised weights \(gptq\) cannot be merged; give the checkpoint"
        ) as caught:
            only = {"parents": {"prod": str(unmergeable(tmp_path / str(number), "gptq"))}, "gate": {"baseline": "prod"}}
            production(tmp_path / f"other{number}", "awq", engine={"name": "vllm"}, recipe=recipe, **only)
        assert "score it" not in str(caught.value)


def test_a_server_is_asked_for_one_model_alone(mergeyard: Mergeyard, tmp_path: Path) -> None:
    models = [PARENTS / "long", PARENTS / "fmt"]
    ended = mergeyard("evaluate", *models, "--server", "http://127.0.0.1:1/v1", "--output", tmp_path / "runs")
    assert ended.code == 2
    assert "the server at http://127.0.0.1:1/v1 serves one model, the job has 2 points; name one MODEL" in ended.err


def test_checkpoints_of_one_name_get_numbers(mergeyard: Mergeyard, tmp_path: Path) -> None:
    for number in ("1", "2"):
        shutil.copytree(PARENTS / "long", tmp_path / number / "my model")
    models = [tmp_path / number / "my model" for number in ("1", "2")]
    options = ["--lengths", "256", "--items", "1", "--tasks", "niah_single_1", "--in-process", "--json"]
    ended = mergeyard("evaluate", *models, *options, "--output", tmp_path / "runs")
    assert ended.code == 0, ended.err
    assert {line["name"] for line in ended.facts["leaderboard"]} == {"my-model", "my-model-2"}


# ---- what is refused


def copied(folder: Path) -> Path:
    shutil.copytree(PARENTS, folder / "parents")
    return folder / "parents"


def without_tokenizer(folder: Path) -> dict[str, str]:
    parents = copied(folder)
    for path in parents.rglob("tokenizer.json"):
        path.unlink()
    return soup_parents(parents)


def with_too_many_tokens(folder: Path) -> dict[str, str]:
    parents = copied(folder)
    for path in parents.rglob("tokenizer.json"):
        tokenizer = json.loads(path.read_text())
        tokenizer["model"]["vocab"]["stray"] = 5000
        path.write_text(json.dumps(tokenizer))
    return soup_parents(parents)


OPENAI = {"name": "openai", "url": "http://127.0.0.1:1/v1"}
CHAT = {**OPENAI, "options": {"api": "chat"}}
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a length beyond the context": (
        {"evaluate": {"ruler": {**RULER, "lengths": [256, 8192]}}},
        "job.yaml:6: niah_single_1 at 8192 tokens is beyond the model's 4096",
    ),
    "an unknown task": (
        {"evaluate": {"ruler": {**RULER, "tasks": ["niah_singel_1"]}}},
        'job.yaml:6: RULER has no task "niah_singel_1"; did you mean "niah_single_1"?',
    ),
    "nothing to evaluate": ({"evaluate": {}}, "job.yaml:6: nothing to evaluate; name a benchmark"),
    "no items": ({"evaluate": {"ruler": {**RULER, "items": 0}}}, "job.yaml:6: "),
    "no tokenizer": ({"parents": without_tokenizer}, "tokenizer.json: no such file; give a checkpoint with a fast"),
    "a tokenizer of another model": (
        {"parents": with_too_many_tokens},
        "tokenizer.json: the tokenizer has token 5000, the model's vocabulary 2048 entries",
    ),
    "a text that is not there": (
        {"evaluate": {"ruler": {**RULER, "tasks": ["niah_single_2"], "haystack": "none.txt"}}},
        "none.txt cannot be read (No such file or directory); give a text file",
    ),
    "data of a task missing": (
        {"evaluate": {"ruler": {**RULER, "tasks": ["qa_1"]}}},
        "job.yaml:6: qa_1 needs its data; give `documents: {qa_1: FILE}`",
    ),
    "a length that no prompt fits in": (
        {"evaluate": {"ruler": {**RULER, "tasks": ["vt"], "lengths": [128]}}},
        "job.yaml:6: vt: no prompt fits in 128 tokens; the smallest length that does is",
    ),
    "a text that is shorter than a window": (
        {"evaluate": {"perplexity": {"lengths": [512], "text": "short.txt"}}},
        "job.yaml:6: perplexity: the text has",
    ),
    "a task that the harness has not": (
        {"evaluate": {"lm_eval": {"tasks": ["arc_eazy"]}}},
        'job.yaml:6: lm_eval has no task "arc_eazy"; did you mean "arc_easy"?',
    ),
    "a task of one's own that is not there": (
        {"evaluate": {"lm_eval": {"tasks": ["mine.yaml"]}}},
        "mine.yaml cannot be read (No such file or directory)",
    ),
    "a race with nothing to race over": (
        {"evaluate": {"perplexity": {"lengths": [256]}, "race": {"keep": 1}}},
        "job.yaml:6: a race is run on items of RULER or of the needle",
    ),
    "a race of less than a haystack": (
        {"evaluate": {"ruler": {**RULER, "questions": 8}, "race": True}},
        "job.yaml:6: a race asks whole haystacks of 8 questions; give at least 8 items",
    ),
    "a server and a grid": (
        {"engine": {"name": "openai", "url": "http://127.0.0.1:1/v1"}},
        "job.yaml:9: the server at http://127.0.0.1:1/v1 serves one model, the job has 4 points",
    ),
    "perplexity in a chat": (
        {"engine": CHAT, "grid": {"w": [0.2]}, "evaluate": {"perplexity": {"lengths": [256]}}},
        "job.yaml:6: perplexity scores a text, and `api: chat` asks a server for answers alone; take perplexity out",
    ),
    "plain questions in a chat": (
        {"engine": CHAT, "grid": {"w": [0.2]}},
        "job.yaml:6: `api: chat` asks a server in messages, and ruler is asked plainly; add `chat: true`",
    ),
    "an API that no server has": (
        {"engine": {"name": "openai", "url": "http://127.0.0.1:1/v1", "options": {"api": "responses"}}},
        '"engine.options.api" cannot be "responses"; choose from completions, chat',
    ),
}


@pytest.mark.parametrize(
    ("rope", "advice", "raised"),
    [
        ({}, "max_position_embeddings", {"max_position_embeddings": 8192}),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 1.5}, "rope_parameters": None},
            "the factor of the RoPE",
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "rope_parameters": None},
        ),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 4096}},
            "the factor of the RoPE",
            {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 4096}},
        ),
    ],
    ids=["plain", "dynamic", "YaRN"],
)
def test_a_context_that_is_too_short_is_raised_as_advised(
    mergeyard: Mergeyard,
    job_file: Callable[..., Path],
    tmp_path: Path,
    rope: dict[str, Any],
    advice: str,
    raised: dict[str, Any],
) -> None:
    parents = copied(tmp_path)
    job = job_file(parents=soup_parents(parents), evaluate={"ruler": {**RULER, "lengths": [8192]}})

    def write(change: dict[str, Any]) -> None:
        for path in parents.rglob("config.json"):
            path.write_text(json.dumps({**json.loads(path.read_text()), **change}))

    write(rope)
    assert f"take that length out, or raise {advice} in the parents' config" in mergeyard("plan", job).err
    write(raised)
    assert mergeyard("plan", job).code == 0


@pytest.mark.parametrize(("keys", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_asked_is_refused_while_planning(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    made = {key: value(tmp_path) if callable(value) else value for key, value in keys.items()}
    job = job_file(**made)
    (job.parent / "short.txt").write_text("Too short.")
    for verb in ("plan", "run", "evaluate"):
        ended = mergeyard(verb, job, *(["--in-process"] if verb != "plan" else []))
        assert (ended.code, ended.out) == (2, "")
        assert ended.err.count("\n") == 1 and message in ended.err
    assert not (tmp_path / "runs").exists()


FOLLOWED: dict[str, list[dict[str, Any]]] = {
    "a length beyond the context": [{"evaluate": {"ruler": {**RULER, "lengths": [256]}}}],
    "an unknown task": [{"evaluate": {"ruler": RULER}}],
    "no tokenizer": [{"parents": soup_parents(PARENTS)}],
    "a text that is not there": [
        {"evaluate": {"ruler": {**RULER, "tasks": ["niah_single_2"], "haystack": "prose.txt"}}}
    ],
    "data of a task missing": [{"evaluate": {"ruler": {**RULER, "tasks": ["qa_generated"], "lengths": [1024]}}}],
    "a text that is shorter than a window": [
        {"evaluate": {"perplexity": {"lengths": [512], "text": "prose.txt", "blocks": 2}}}
    ],
    "a race with nothing to race over": [
        {"evaluate": {"perplexity": {"lengths": [256]}, "ruler": {**RULER, "items": 60}, "race": {"keep": 1}}},
        {"evaluate": {"perplexity": {"lengths": [256]}}},
    ],
    "a race of less than a haystack": [
        {"evaluate": {"ruler": {**RULER, "lengths": [512], "questions": 8, "items": 8}, "race": True}}
    ],
    "a server and a grid": [
        {"engine": OPENAI, "grid": {"w": [0.2]}},
        {"engine": {"name": "transformers"}},
    ],
    "a server and a gate": [
        {"engine": OPENAI, "grid": {"w": [0.2]}},
        {"engine": {"name": "transformers"}, "gate": {"baseline": "fmt"}},
        {
            "engine": {**OPENAI, "servers": {"fmt": {"url": "http://127.0.0.1:2/v1"}}},
            "grid": {"w": [0.2]},
            "gate": {"baseline": "fmt"},
        },
    ],
    "perplexity in a chat": [
        {
            "engine": OPENAI | {"options": {"api": "completions"}},
            "grid": {"w": [0.2]},
            "evaluate": {"perplexity": {"lengths": [256], "blocks": 1}},
        },
    ],
    "plain questions in a chat": [
        {"engine": CHAT, "grid": {"w": [0.2]}, "evaluate": {"ruler": {**RULER, "chat": True}}},
    ],
}
"""The jobs that the remedies of `REFUSED` advise, and that of a gate on a server."""


@pytest.mark.parametrize("kind", FOLLOWED)
def test_the_remedies_of_refused_jobs_work(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    for keys in FOLLOWED[kind]:
        job = job_file(**keys)
        (job.parent / "prose.txt").write_text("The grass is green and the sky is blue today.\n" * 2000)
        ended = mergeyard("plan", job)
        assert ended.code == 0, ended.err


def test_a_length_that_no_prompt_fits_in_is_raised_as_advised(
    mergeyard: Mergeyard, job_file: Callable[..., Path]
) -> None:
    def plan(length: int) -> Ended:
        return mergeyard("plan", job_file(evaluate={"ruler": {**RULER, "tasks": ["vt"], "lengths": [length]}}))

    advised = re.search(r"the smallest length that does is (\d+)", plan(128).err)
    assert advised is not None
    assert plan(int(advised[1])).code == 0 and plan(int(advised[1]) - 1).code == 2


def test_a_gate_on_a_server_is_refused(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    ended = mergeyard("plan", job_file(engine=OPENAI, grid={"w": [0.2]}, gate={"baseline": "fmt"}))
    assert ended.code == 2
    assert (
        "serves one model, a gate compares two; name that of the baseline in `engine:`, as `servers: {fmt:" in ended.err
    )
    assert "take transformers or vllm, or leave the gate out" in ended.err


DAMAGED: dict[str, tuple[str, bytes]] = {
    "deep settings": ("tokenizer_config.json", b'{"bos_token": ' + b"[" * 9000 + b"]" * 9000 + b"}"),
    "half a character": ("tokenizer_config.json", b'{"bos_token": "\\ud800"}'),
    "a list of settings": ("tokenizer_config.json", b"[1]"),
    "a deep end": ("generation_config.json", b'{"eos_token_id": ' + b"[" * 9000 + b"]" * 9000 + b"}"),
    "a deep config": ("config.json", b'{"a": ' + b"[" * 9000 + b"]" * 9000 + b"}"),
    "half a character in a config": ("config.json", b'{"model_type": "\\udfff"}'),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_a_damaged_file_of_a_parent_is_one_line_and_fetching_it_again_mends_it(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path, kind: str
) -> None:
    name, data = DAMAGED[kind]
    parents = copied(tmp_path)
    whole = (parents / "long" / name).read_bytes()
    job = job_file(parents=soup_parents(parents))
    (parents / "long" / name).write_bytes(data)
    ended = mergeyard("plan", job)
    assert (ended.code, ended.out) == (2, "") and ended.err.count("\n") == 1 and name in ended.err, ended.err
    (parents / "long" / name).write_bytes(whole)
    assert mergeyard("plan", job).code == 0


def test_the_harness_that_is_not_installed_is_named(
    mergeyard: Mergeyard, job_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("workers.benchmarks.harness.planned.version", nothing)
    ended = mergeyard("plan", job_file(evaluate={"lm_eval": {"tasks": ["arc_easy"]}}))
    assert ended.code == 2
    assert ended.err.endswith("job.yaml:6: lm_eval needs lm-evaluation-harness; pip install 'mergeyard[lm-eval]'\n")


def test_a_job_without_evaluate_is_not_evaluated(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    ended = mergeyard("evaluate", job_file(evaluate=None, keep="all"), "--in-process")
    assert ended.code == 2 and "job.yaml: nothing to evaluate; add `evaluate:`" in ended.err


def test_a_chat_that_the_tokenizer_has_no_template_for_is_refused(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
) -> None:
    parents = copied(tmp_path)
    for path in parents.rglob("chat_template.jinja"):
        path.unlink()
    job = job_file(parents=soup_parents(parents), evaluate={"ruler": {**RULER, "chat": True}})
    ended = mergeyard("plan", job)
    assert ended.code == 2 and "no chat template; ask it plainly" in ended.err and "job.yaml:6" in ended.err


@pytest.mark.usefixtures("real_model")
def test_a_parent_that_holds_a_nan_is_last_and_marked(mergeyard: Mergeyard, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    parents = copied(tmp_path)
    weights = load_file(parents / "fmt" / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, parents / "fmt" / "model.safetensors", metadata={"format": "pt"})
    options = ["--lengths", "256", "--items", "4", "--tasks", "niah_single_1", "--in-process", "--json"]
    ended = mergeyard("evaluate", parents / "fmt", parents / "long", *options, "--output", tmp_path / "runs")
    assert ended.code == 0, ended.err
    first, last = ended.facts["leaderboard"]
    assert (first["name"], last["name"], last["score"]) == ("long", "fmt", 0)
    assert "4 answers had NaN or infinite logits" in last["note"]


def test_evaluation_leaves_nothing_but_the_run(mergeyard: Mergeyard, job_file: Callable[..., Path]) -> None:
    job = job_file()
    mergeyard("evaluate", job, "--in-process", "--quiet")
    kinds = {name.split("/")[2] for name in files_under(job.parent) if name.startswith("runs/") and "/." not in name}
    assert kinds == {"job.yaml", "plan.json", "lease.json", "items", "scores", "report"}
