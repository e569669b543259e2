"""`mergeyard search`: a genome of mergekit-evolve, run as the job that it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.job import load_job
from orchestrator.commands.mergekit_options import OF_SEARCH, SEARCH_REFUSED, WITH_VALUE
from orchestrator.planning.plan import make_plan
from tests.orchestrator.conftest import Ended

Mergeyard = Callable[..., Ended]
ROOT = Path(__file__).parents[3]
GENOME = ROOT / "jobs" / "examples" / "evolve" / "genome.yml"


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_the_job_of_a_genome_can_be_planned_anywhere(
    mergeyard: Mergeyard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["--max-fevals", "30", "--force-population-size", "4", "--random-seed", "7", "--no-save-final-model"]
    ended = mergeyard("search", GENOME, tmp_path / "out", "--job", *given)
    assert ended.code == 0, ended.err
    monkeypatch.chdir(tmp_path)
    job = load_job(ended.out, "job.yaml")
    assert job.search is not None
    assert (job.name, job.search.budget.points, job.search.batch, job.seed) == ("genome", 30, 4, 7)
    assert (job.keep.kind, job.output) == ("none", str(tmp_path / "out"))
    plan = make_plan(job)
    assert len(plan.points[0].layout.parents) == 3
    assert [len(part.sources) for part in job.points[0].recipe.slices] == [3, 3, 3]
    assert not (tmp_path / "out").exists()


def test_an_option_of_mergekit_evolve_changes_nothing_or_is_refused_with_its_remedy(
    mergeyard: Mergeyard, tmp_path: Path
) -> None:
    plain = mergeyard("search", GENOME, tmp_path, "--job")
    given = [part for option in OF_SEARCH for part in ([option, "2"] if option in WITH_VALUE else [option])]
    ended = mergeyard("search", GENOME, tmp_path, "--job", *given)
    assert (ended.code, ended.out) == (0, plain.out)
    for option, reason in OF_SEARCH.items():
        assert (f"{option} changes nothing: {reason}\n" in ended.err) == bool(reason)
    for option, remedy in SEARCH_REFUSED.items():
        ended = mergeyard("search", GENOME, tmp_path, *([option, "2"] if option in WITH_VALUE else [option]))
        assert (ended.code, ended.err) == (2, f"mergeyard: {option}: {remedy}\n")
    ended = mergeyard("search", GENOME, tmp_path, "--max-fevals", "0")
    assert (ended.code, ended.err) == (
        2,
        "mergeyard: argument --max-fevals: give a whole number from 1 on, not '0'; see `mergeyard search --help`\n",
    )


def test_a_search_over_whole_tasks_of_the_harness_is_refused_with_the_key_that_is_missing(
    mergeyard: Mergeyard, tmp_path: Path
) -> None:
    job = mergeyard("search", GENOME, tmp_path / "out", "--job").out
    lines = [line for line in job.splitlines() if "metrics:" not in line and "arc_easy: " not in line]
    (tmp_path / "job.yaml").write_text("\n".join(lines))
    ended = mergeyard("run", tmp_path / "job.yaml", "--in-process")
    assert ended.code == 2
    assert "name the metric that counts, as `metrics: {arc_easy: acc}`" in ended.err
