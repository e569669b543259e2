"""Points that have the name of a parent, of a parent's folder of scores or of the blessed merge keep their answers."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.job import load_job
from orchestrator.cli import main
from orchestrator.cluster.in_process import InProcessPool
from orchestrator.evaluating.results import _result as parsed
from orchestrator.evaluating.results import read_results
from orchestrator.evaluating.subjects import questions
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import make_plan
from orchestrator.watching import Watcher
from tests.orchestrator.conftest import Ended
from tests.orchestrator.evaluating.asking import evaluated
from tests.orchestrator.scripts import scripted, turned_down
from tests.orchestrator.tiny_jobs import PARENTS, RULER, job_text

Mergeyard = Callable[..., Ended]

POINTS = {"parent-fmt": 0.5, "blessed": 0.25, "base": 0.75}
"""Weights of the parent `base`, by point; the rest is `fmt`. No point is the same merge as a parent."""

OLDER = Path(__file__).parents[2] / "end_to_end" / "older_run" / "evaluated"
"""A run of a version that called the parent NAME `parent-NAME`."""

MODELS = {
    *(("point", name) for name in POINTS),
    ("parent", "fmt"),
    ("parent", "base (parent)"),  # a point has its name
}


def text(folder: Path, points: dict[str, float] = POINTS, **keys: Any) -> str:
    """The job of these points between `base` and `fmt`; the gate asks no item beyond the six."""
    recipe = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [
            {"model": "base", "parameters": {"weight": "${w}"}},
            {"model": "fmt", "parameters": {"weight": "${1 - w}"}},
        ],
    }
    job = {
        "parents": {name: str(PARENTS / name) for name in ("base", "fmt")},
        "recipe": recipe,
        "grid": {"points": [{"name": name, "w": w} for name, w in points.items()]},
        "point": None,
        "gate": {"baseline": "fmt", "margin": 5.0, "budget": 6},
        "keep": "all",
    }
    return job_text(folder, **{**job, **keys})


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job's file, after its run."""
    path = tmp_path_factory.mktemp("subjects") / "job.yaml"
    path.write_text(text(path.parent))
    with scripted(turned_down):
        assert main(["run", str(path), "--in-process", "--quiet"]) in (0, 1, 3)
    return path


@pytest.fixture
def run(job: Path) -> Path:
    return job.parent / "runs" / "tiny"


@pytest.fixture
def weights(run: Path) -> dict[str, str]:
    """The digest of the weights that answered, by the name of the model."""
    found = {row.point: row.weights for row in read_results(str(run)).rows}
    assert len(set(found.values())) == len(MODELS)
    return found


def test_every_point_and_parent_has_all_its_answers(run: Path, weights: dict[str, str]) -> None:
    counts = Counter((row.kind, row.point) for row in read_results(str(run)).rows)
    assert counts.keys() == MODELS and min(counts.values()) >= RULER["items"]
    for name in POINTS:
        assert weights[name] == json.loads((run / "points" / name / "manifest.json").read_text())["weights"]


def test_evaluating_again_asks_nothing(job: Path) -> None:
    result, asked = evaluated(job.read_text())
    assert asked == []
    assert {(row.kind, row.point) for row in result.rows} == MODELS


@pytest.mark.parametrize("point", POINTS)
def test_the_gate_compares_the_point_with_the_parent(mergeyard: Mergeyard, job: Path, point: str) -> None:
    ended = mergeyard("gate", job, "--in-process", "--point", point, "--json")
    assert (ended.facts["new"], ended.facts["old"]) == (point, "fmt")
    assert ended.facts["lines"][0]["items"] == RULER["items"], "two models, not one that is compared with itself"


def test_a_baseline_is_a_parent_before_it_is_a_point(tmp_path: Path) -> None:
    asked = questions(make_plan(load_job(text(tmp_path), "job.yaml")))
    assert asked.subject("base") is asked.points["base"]
    assert asked.subject("base", "parent") is asked.parents["base"]
    assert asked.parents["base"].kind == "parent" and asked.parents["base"].label == "base (parent)"
    assert asked.subject("blessed", "parent") is asked.points["blessed"]
    with pytest.raises(BadInput, match=r'"bass" is neither a point nor a parent of this job; did you mean "base"?'):
        asked.subject("bass")


def test_compare_finds_each_by_kind_and_name(
    mergeyard: Mergeyard, run: Path, tmp_path: Path, weights: dict[str, str]
) -> None:
    for a, b, names in (
        (run / "fmt", run / "parent-fmt", ("fmt", "parent-fmt")),
        (run / "base", run / "parents" / "base", ("base", "base (parent)")),
        (PARENTS / "base", run / "points" / "blessed", ("base (parent)", "blessed")),
    ):
        found = mergeyard("compare", a, b, "--json").facts
        assert (found["a"]["name"], found["b"]["name"]) == names
        assert (found["a"]["weights"], found["b"]["weights"]) == (weights[names[0]], weights[names[1]])
    called_so = shutil.copytree(run, tmp_path / "parents")
    assert mergeyard("compare", called_so / "fmt", called_so / "base", "--json").facts["b"]["name"] == "base"
    for wrong in (run / "parents" / "parent-fmt", run / "points" / "fmt"):
        ended = mergeyard("compare", run / "base", wrong)
        assert ended.code == 2 and "was scored" in ended.err and ended.err.count("\n") == 1


def test_the_report_names_parents_by_their_own_names(mergeyard: Mergeyard, run: Path) -> None:
    found = mergeyard("report", run, "--json").facts
    assert {(line["kind"], line["name"]) for line in found["leaderboard"]} == MODELS
    assert found["baseline"] == "fmt"
    assert {entry["new"] for entry in found["comparisons"]} == {*POINTS}
    table = mergeyard("report", run).out.splitlines()
    first = [line[1:16].strip() for line in table[1:6]]
    assert {*first} == {*POINTS, "fmt (parent)", "base (parent)"}


def test_a_parent_that_a_point_repeats_is_named(mergeyard: Mergeyard, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text(tmp_path, {"parent-base": 1, "half": 0.5}, keep="none", gate=None))
    ended = mergeyard("evaluate", tmp_path / "job.yaml", "--in-process", "--json")
    lines = {line["name"]: line for line in ended.facts["leaderboard"]}
    assert lines.keys() == {"parent-base", "half", "fmt"}
    assert lines["parent-base"]["note"] == "= parent base"
    assert lines["half"]["relative_effective_length"].keys() == {"base", "fmt"}
    assert mergeyard("compare", tmp_path / "runs/tiny/base", tmp_path / "runs/tiny/half", "--json").facts["a"][
        "name"
    ] == ("parent-base")


def test_publish_sends_the_point(mergeyard: Mergeyard, run: Path, tmp_path: Path, weights: dict[str, str]) -> None:
    for name in POINTS:
        facts = mergeyard("publish", run / name, tmp_path / name, "--json").facts
        assert (facts["point"], facts["weights"]) == (name, weights[name])
    assert mergeyard("publish", run / "fmt", tmp_path / "parent").code != 0, "a parent is no point of the run"


def test_an_older_run_has_its_parents_under_their_own_names(mergeyard: Mergeyard, tmp_path: Path) -> None:
    run = shutil.copytree(OLDER, tmp_path / "run")
    result = read_results(str(run))
    labels = {"long": "parent-long", "fmt": "parent-fmt"}
    assert (result.parents, result.same, {*result.baselines}) == (labels, {}, {*labels.values()})
    assert {row.point for row in result.rows if row.kind == "parent"} == {*labels.values()}
    found = mergeyard("report", run, "--json").facts
    names = [(line["kind"], line["name"]) for line in found["leaderboard"]]
    assert names[3:] == [("parent", label) for label in labels.values()]
    assert found["baseline"] in labels.values()
    assert mergeyard("compare", run / "fmt", run / "long", "--json").facts["b"]["name"] == "parent-long"
    table = mergeyard("report", run).out
    assert " long (parent) " in table and " fmt (parent) " in table and "the best parent, parent-" not in table


def test_where_a_point_is_a_parent_an_older_run_says_so() -> None:
    document = json.loads((OLDER / "report" / "evaluation.json").read_text())
    document |= {"baselines": ["parent-fmt"], "parents": ["w1", "parent-fmt"]}
    found = parsed(document | {"same": {"twin": "w1", "parent-long": "w1"}})
    assert found.parents == {"fmt": "parent-fmt", "long": "w1"} and found.same == {"twin": "w1"}


@pytest.mark.parametrize(("window", "models"), [("step[-${k}:]", {3: 1}), ("step[${k - 2}:${k}]", {2: 2})])
def test_windows_share_a_model_that_holds_no_more_parents_than_the_largest(
    window: str, models: dict[int, int], tmp_path: Path
):
    run = {str(number): str(PARENTS / name) for number, name in enumerate(("base", "long", "fmt"))}
    recipe = {"merge_method": "linear", "models": [{"model": window, "parameters": {"weight": "uniform"}}]}
    keys = {"parents": {"step": run}, "recipe": recipe, "grid": {"k": [2, 3]}, "point": "k{k}", "keep": "all"}
    document = job_text(tmp_path, **keys)
    plan = make_plan(load_job(document, "job.yaml"))
    asked = questions(plan)
    assert Counter(len(spec.parents) for spec in asked.models.values()) == models
    assert {*asked.parents} == {"step-0", "step-1", "step-2"}
    written = drive(plan, InProcessPool(), Watcher(visible=False)).points
    result, _ = evaluated(document)
    for name, point in written.items():
        assert {row.weights for row in result.rows if row.point == name} == {point.weights}
