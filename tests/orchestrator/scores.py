"""Scores left in a run without a model: four items of RULER at each length, all with the same score."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.evaluation_tasks import ScoreRow
from orchestrator.evaluating.results import EvaluationResult, write_results
from orchestrator.judging.race import Standing
from workers.storage import open_store

ITEMS = 4


def leave_scores(run: Path | str, scores: Mapping[str, Mapping[int, float]], **more: Any) -> None:
    """`scores` is by point, best first, and length; `more` changes fields of the result."""
    rows = [
        _row(point, length, item, score)
        for point, lengths in scores.items()
        for length, score in lengths.items()
        for item in range(ITEMS)
    ]
    standing = [
        Standing(point, sum(lengths.values()) / len(lengths), ITEMS, None, None) for point, lengths in scores.items()
    ]
    fields: dict[str, Any] = {
        "ranked": ("ruler",),
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
    write_results(open_store(run), EvaluationResult(rows=rows, standing=tuple(standing), **{**fields, **more}))


def _row(point: str, length: int, item: int, score: float) -> ScoreRow:
    fields: dict[str, Any] = {
        "benchmark": "ruler",
        "task": "niah_single_1",
        "items": "set",
        "depth": math.nan,
        "haystack": str(item),
        "pair": str(item),
        "answer": "",
        "finite": True,
        "tokens": 10,
        "seconds": 0.1,
        "recipe": "r",
        "weights": "w",
        "repeat": 0,
    }
    return ScoreRow(point=point, length=length, item=item, score=score, **fields)
