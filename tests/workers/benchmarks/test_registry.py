"""The registry is the one place where benchmarks are told apart."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from jobs.evaluate import ALWAYS_DIGESTED, SPECS, Evaluation, PerplexitySpec, RaceSpec
from workers.benchmarks.perplexity import first_position, position_blocks
from workers.benchmarks.registry import BENCHMARKS

ROOT = Path(__file__).parents[3]
QUOTED = re.compile(f"""["']({"|".join(BENCHMARKS)})["']""")
MAY_NAME = ("workers/benchmarks/", "jobs/evaluate.py")
EXCEPTIONS = {
    # not the benchmark, but the quantity that likelihoods are shown as: JSON keys, a section's id, an axis, a metric
    ("orchestrator/report/leaderboard.py", "perplexity"),
    ("orchestrator/report/two_models.py", "perplexity"),
    ("orchestrator/report/page.py", "perplexity"),
    ("orchestrator/report/figures.py", "perplexity"),
    # the findings of guards in results and reports
    ("orchestrator/evaluating/results.py", "guards"),
    ("orchestrator/evaluating/forecast.py", "guards"),
    ("orchestrator/commands/workplace.py", "guards"),
    ("orchestrator/report/terminal/run.py", "guards"),
    ("orchestrator/report/leaderboard.py", "guards"),
    ("orchestrator/report/page.py", "guards"),
    ("orchestrator/report/recommendation.py", "guards"),
    # `mergeyard evaluate MODEL` writes the job that asks RULER
    ("orchestrator/commands/evaluate.py", "ruler"),
    # a genome of mergekit-evolve names tasks of the harness
    ("jobs/genome.py", "lm_eval"),
}


def named(root: Path) -> Iterator[tuple[str, str]]:
    """(file, string) of every string constant that is a benchmark's key, where none may be."""
    for path in sorted(path for top in ("jobs", "workers", "orchestrator") for path in (root / top).rglob("*.py")):
        file, text = path.relative_to(root).as_posix(), path.read_text(encoding="utf-8")
        if file.startswith(MAY_NAME) or not QUOTED.search(text):
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Constant) and node.value in {*BENCHMARKS}:
                yield file, str(node.value)


def test_no_other_file_names_a_benchmark() -> None:
    assert sorted({*named(ROOT)} - EXCEPTIONS) == []


def test_a_planted_name_is_found(tmp_path: Path) -> None:
    (tmp_path / "orchestrator").mkdir()
    (tmp_path / "orchestrator" / "words.py").write_text('def f(row): return row.benchmark == "needle"')
    (tmp_path / "workers" / "benchmarks").mkdir(parents=True)
    (tmp_path / "workers" / "benchmarks" / "needle.py").write_text('KEY = "needle"')
    assert [*named(tmp_path)] == [("orchestrator/words.py", "needle")]


def test_every_spec_of_a_job_has_a_row() -> None:
    assert SPECS.keys() == BENCHMARKS.keys()


def test_a_digest_covers_the_first_four_benchmarks_asked_or_not() -> None:
    asked = {"perplexity": PerplexitySpec(lengths=(64,)), "newer": PerplexitySpec(lengths=(128,))}
    race = RaceSpec()
    assert Evaluation(benchmarks=asked, race=race).digested() == {
        "ruler": None,
        "needle": None,
        "lm_eval": None,
        **asked,
        "race": race,
    }
    assert len(ALWAYS_DIGESTED) == 4


def test_a_task_of_perplexity_names_the_first_position_of_its_block() -> None:
    blocks = position_blocks(2048).tolist()
    for number in range(4):
        assert first_position(f"position_block_{number}") == blocks.index(number)
