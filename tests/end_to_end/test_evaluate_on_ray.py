"""Evaluation on a real Ray: the rows of one process, whatever becomes of the workers on the way."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from jobs.evaluation_tasks import ScoreRow
from tests.end_to_end.command import Command, run_here
from tests.end_to_end.conftest import PARENTS
from workers.evaluating.scores import read_scores


def write_job(folder: Path) -> Path:
    """Two points and two parents, answering 8 items at two lengths, on two workers."""
    job: dict[str, Any] = {
        "name": "soup",
        "parents": {name: str(PARENTS / name) for name in ("long", "fmt")},
        "recipe": {
            "merge_method": "linear",
            "dtype": "bfloat16",
            "models": [
                {"model": "long", "parameters": {"weight": "${w}"}},
                {"model": "fmt", "parameters": {"weight": "${1 - w}"}},
            ],
        },
        "grid": {"w": [0.5, 0.9]},
        "point": "w{w}",
        "evaluate": {"ruler": {"tasks": ["niah_single_1"], "lengths": [256, 512], "items": 8}},
        "keep": "none",
        "workers": {"cpus": 0.5, "memory": "1200MB", "count": 2},
        "output": str(folder),
    }
    (folder / "job.yaml").write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in job.items()))
    return folder / "job.yaml"


def rows(facts: dict[str, Any]) -> list[ScoreRow]:
    """The rows of a run, but for how long each took."""
    found = read_scores(Path(facts["results"]).read_bytes(), facts["results"])
    return [replace(row, seconds=0.0) for row in found]


def evaluators(command: Command) -> list[psutil.Process]:
    """The actors that hold a model."""
    return [process for process in command.look() if process.name().startswith("ray::_RemoteEva")]


def test_a_worker_killed_in_the_middle_costs_time_alone(start: Callable[..., Command], tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "alone").mkdir()
    command = start("run", write_job(tmp_path / "ray"), "--json")
    scores = tmp_path / "ray" / "soup" / "scores"
    command.until(lambda: len([*scores.rglob("*.parquet")]) >= 2 and len(evaluators(command)) == 2)
    killed = evaluators(command)[0]
    killed.kill()
    assert len([*scores.rglob("*.parquet")]) < 4 * 2, "killed too late to matter"
    on_ray = command.ended()
    assert killed.pid not in {process.pid for process in psutil.process_iter()}

    alone = run_here("run", write_job(tmp_path / "alone"), "--json", "--in-process", folder=tmp_path)
    assert rows(on_ray.facts) == rows(alone.facts)
    assert len(rows(alone.facts)) == 4 * 2 * 8
    assert on_ray.facts["leaderboard"] == alone.facts["leaderboard"]
    assert command.survivors(seconds=20) == []
