"""A run that nobody ran: answers by a formula over a grid of two axes, written as an evaluation leaves them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from jobs.evaluate import RaceSpec
from jobs.evaluation_tasks import ScoreRow
from jobs.job import load_job
from jobs.merge_tasks import FORMAT, Receipt
from jobs.sealing import sealed
from orchestrator.evaluating.results import EvaluationResult, write_results
from orchestrator.evaluating.subjects import RacePlan
from orchestrator.judging.race import Departure, Standing
from orchestrator.judging.significance import FlipRate
from workers.storage import open_store

TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"quoted\" & 'so' ]]> {{ 7 * 7 }} \u202e"


def job_text(rows: int, columns: int) -> str:
    """A job of rows × columns points."""
    return f"""\
name: made-up   # <b>&amp;</b> {HOSTILE.splitlines()[0][:40]}
parents: {{base: /nowhere/base, cos: /nowhere/cos, fmt: /nowhere/fmt}}
recipe:
  merge_method: ties
  base_model: base
  models:
    - {{model: cos, parameters: {{weight: "${{w}}", density: "${{d}}"}}}}
    - {{model: fmt, parameters: {{weight: "${{1 - w}}", density: "${{d}}"}}}}
  dtype: bfloat16
grid:
  w: {{from: 0, to: 1, num: {rows}}}
  d: {{from: 0.1, to: 1, num: {columns}}}
evaluate:
  ruler: {{lengths: [4096, 8192], items: 8}}
  needle: {{lengths: [4096, 8192], depths: 5}}
gate: {{baseline: cos}}
output: runs
"""


def write_run(
    folder: Path | str,
    *,
    grid: tuple[int, int] = (5, 4),
    tasks: Sequence[str] = TASKS[:3],
    lengths: Sequence[int] = (4096, 8192, 16384),
    items: int = 8,
    finished: bool = True,
    answer: str = HOSTILE,
) -> str:
    """Writes the run to the folder or URL and returns its URL."""
    text = job_text(*grid)
    names = [point.name for point in load_job(text, "job.yaml").points]
    rows = list(_rows(names, grid, tasks, lengths, items, answer))
    result = _result(names, rows, finished)
    store = open_store(str(folder))
    store.write("job.yaml", text.encode())
    store.write("plan.json", sealed(_plan(names)))
    store.write("gate/verdict.json", json.dumps(_verdict(result.standing[0].point)).encode())
    for number, name in enumerate(names[:3]):
        store.write(f"receipts/{number:02d}/{number}.json", _receipt(name, number).to_json())
    write_results(store, result)
    return store.url


def _rows(
    names: Sequence[str],
    grid: tuple[int, int],
    tasks: Sequence[str],
    lengths: Sequence[int],
    items: int,
    answer: str,
) -> Iterator[ScoreRow]:
    """Best in the middle of the grid, worse with length; the same luck for everyone on an item."""
    random = np.random.default_rng(7)
    luck = {(task, length): random.random(items) for task in (*tasks, "needle") for length in lengths}
    for number, name in enumerate([*names, "cos", "fmt"]):
        row, column = divmod(number, grid[1])
        height = 1 - abs(row / max(1, grid[0] - 1) - 0.5) - 0.5 * abs(column / max(1, grid[1] - 1) - 0.6)
        height = height if number < len(names) else 0.4
        own = np.random.default_rng(number)
        for (task, length), fortunes in luck.items():
            ease = 1.25 * height - 0.12 * math.log2(length / lengths[0]) + 0.3 * (hash_of(task) % 5) / 5
            for item in range(items):
                score = float(fortunes[item] + 0.2 * own.standard_normal() < ease)
                yield score_row(name, task, length, item, score, answer)
        for item in range(3):
            for block in range(4):
                likelihood = 0.3 + 0.1 * height - 0.02 * block
                yield score_row(
                    name, f"position_block_{block}", lengths[-1], item, likelihood, "", benchmark="perplexity"
                )


def hash_of(task: str) -> int:
    """The same on every machine and in every process."""
    return sum(task.encode())


def score_row(point: str, task: str, length: int, item: int, score: float, answer: str = "", **more: str) -> ScoreRow:
    depth = (item % 5) / 4 if task == "needle" else math.nan
    return ScoreRow(
        point=point,
        benchmark=more.get("benchmark", "needle" if task == "needle" else "ruler"),
        task=task,
        length=length,
        items=f"set-{task}-{length}",
        item=item,
        depth=depth,
        haystack=f"{task}-{item}",
        pair=f"{task}-{item}",
        answer=answer,
        score=score,
        finite=True,
        tokens=length,
        seconds=length / 100_000,
        recipe=point,
        weights=point,
        repeat=0,
    )


def _result(names: Sequence[str], rows: Sequence[ScoreRow], finished: bool) -> EvaluationResult:
    scores: dict[str, list[float]] = {name: [] for name in names}
    for row in rows:
        if row.point in scores and row.benchmark != "perplexity":
            scores[row.point].append(row.score)
    order = sorted(names, key=lambda name: -sum(scores[name]) / len(scores[name]))
    left = order[len(order) // 2 :]
    return EvaluationResult(
        rows=[*rows],
        ranked=("ruler", "needle"),
        standing=tuple(Standing(name, sum(scores[name]) / len(scores[name]), 8, None, None) for name in order),
        departures=tuple(Departure(name, 0, order[0], 0.2, 0.01, 0.03, 8, f"{name} <i>fell</i>") for name in left),
        baselines=("cos", "fmt"),
        parents={"cos": "cos", "fmt": "fmt"},
        same={},
        noise=FlipRate(1, 100, 0.01, 0.0, 0.05),
        cost_share=0.3,
        race=RacePlan(RaceSpec(keep=3, alpha=0.05, place="job.yaml:1"), "ruler", 8, 0, 1),
        seed=0,
        finished=finished,
    )


def _plan(names: Sequence[str]) -> dict[str, object]:
    return {
        "digest": "0" * 64,
        "format": FORMAT,
        "job": "made-up",
        "numerics": "float32",
        "numerics_version": 1,
        "seed": 0,
        "parents": {
            "cos": {"url": "s3://b/<cos>", "files": {"model.safetensors": {"size": 3_000_000_000, "etag": "ab-1"}}}
        },
        "points": [{"name": name, "digest": name, "same_as": None} for name in names],
    }


def _verdict(new: str) -> dict[str, object]:
    line = {"scope": "overall", "outcome": "inconclusive", "difference": 2.5, "reason": "overall: <b>+2.5</b> points"}
    look = {"items": 8, "outcome": "inconclusive", "difference": 2.5}
    return {
        "outcome": "inconclusive",
        "new": new,
        "old": "cos",
        "lines": [line],
        "items_needed": 900,
        "exit_code": 3,
        "fresh": True,
        "looks": [look, look],
    }


def _receipt(name: str, number: int) -> Receipt:
    return Receipt(
        unit=str(number),
        point=name,
        key=f"points/{name}/model.safetensors",
        size=1_000_000,
        etag="e",
        tensors={},
        nonfinite=(),
        bytes_read=6_000_000,
        seconds=1.5,
        worker="one",
    )
