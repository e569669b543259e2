"""Scores that no model gave: rows, results made of them, and runs that hold them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.evaluation_tasks import ScoreRow
from orchestrator.evaluating.results import EvaluationResult, write_results
from orchestrator.judging.race import Standing
from workers.storage import open_store

ITEMS = 4


def row(point: str, task: str, length: int, item: int, score: float, **more: Any) -> ScoreRow:
    """One score of RULER, with a haystack to itself; `more` changes fields."""
    fields: dict[str, Any] = {
        "benchmark": "ruler",
        "depth": math.nan,
        "haystack": f"{task}-{item}",
        "pair": f"{task}-{item}",
        "answer": "",
        "finite": True,
        "tokens": 10,
        "seconds": 0.1,
        "items": "set",
        "recipe": point,
        "weights": point,
        "repeat": 0,
    }
    return ScoreRow(point=point, task=task, length=length, item=item, score=score, **{**fields, **more})


def cell(point: str, task: str, length: int, scores: Sequence[float], **more: Any) -> list[ScoreRow]:
    """These scores of the first items of a task at a length."""
    return [row(point, task, length, item, score, **more) for item, score in enumerate(scores)]


def rows(point: str, scores: Sequence[float], task: str = "vt", length: int = 512) -> list[ScoreRow]:
    """As `cell`, on haystacks that all tasks and lengths share."""
    return [
        row(point, task, length, item, score, haystack=f"h{item}", pair=f"h{item}") for item, score in enumerate(scores)
    ]


def standing(point: str, **more: Any) -> Standing:
    """A point's place; `more` changes fields."""
    return Standing(point, **{"score": 0.0, "items": ITEMS, "departed_at_rung": None, "confirmed": None, **more})


def result(rows: Sequence[ScoreRow], points: Sequence[Standing], **more: Any) -> EvaluationResult:
    """A finished evaluation of points alone; `more` changes fields."""
    fields: dict[str, Any] = {
        "ranked": ("ruler", "needle"),
        "departures": (),
        "baselines": (),
        "parents": {},
        "same": {},
        "noise": None,
        "cost_share": 1.0,
        "race": None,
        "seed": 0,
        "finished": True,
    }
    return EvaluationResult(rows=[*rows], standing=tuple(points), **{**fields, **more})


def leave_scores(run: Path | str, scores: Mapping[str, Mapping[int, float]], **more: Any) -> None:
    """Leaves an evaluation in a run: `scores` by point, best first, and length, `ITEMS` items each.

    `more` changes fields of the result.
    """
    found = [
        score
        for point, lengths in scores.items()
        for length, mean in lengths.items()
        for score in cell(point, "niah_single_1", length, [mean] * ITEMS)
    ]
    places = [standing(point, score=sum(lengths.values()) / len(lengths)) for point, lengths in scores.items()]
    write_results(open_store(run), result(found, places, **{"ranked": ("ruler",), **more}))
