"""A run that nobody ran, with prompts: what the viewer reads, and no more."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from jobs.evaluation_tasks import ScoreRow
from jobs.sealing import sealed
from orchestrator.evaluating.results import EvaluationResult, write_results
from orchestrator.judging.race import Standing
from workers.benchmarks.items import Item, write_items
from workers.storage import open_store

HOSTILE = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\"> & {{ 1 }} \u202e"


def number_of(item: int) -> str:
    """The right answer to an item."""
    return str(1_000_003 * (item + 1))


def prompt(item: int, length: int) -> str:
    """A haystack of about four characters per token, with one needle in the middle."""
    hay = "The grass is green. The sky is blue.\n" * max(1, 4 * length // 74)
    needle = f"The number of door {item} is {number_of(item)}. "
    return f"Remember the number.\n{hay}{needle}{hay}What is the number of door {item}?"


def made_item(task: str, length: int, item: int) -> Item:
    return Item(
        benchmark="ruler",
        task=task,
        length=length,
        index=item,
        depths=(0.5,),
        haystack=f"{task}-{item}",
        prefix="",
        prompt=prompt(item, length),
        answer_prefix=" It is",
        answers=(number_of(item),),
        scorer="all",
        max_new_tokens=8,
        tokens=length - 8,
        pair=f"{task}-{item}",
    )


def made_row(point: str, task: str, length: int, item: int, score: float = 1.0) -> ScoreRow:
    right = number_of(item)
    return ScoreRow(
        point=point,
        benchmark="ruler",
        task=task,
        length=length,
        items=f"{task}{length}",
        item=item,
        depth=0.5,
        haystack=f"{task}-{item}",
        pair=f"{task}-{item}",
        answer=f"{right}." if score else f"{right[::-1]}.",
        score=score,
        finite=True,
        tokens=length,
        seconds=0.25,
        recipe=point,
        weights=point,
        repeat=0,
        tokens_out=7,
    )


def right_rows(
    points: Sequence[str] = ("a", "b"),
    tasks: Sequence[str] = ("niah_single_1", "vt"),
    lengths: Sequence[int] = (1024, 2048),
    items: int = 4,
) -> list[ScoreRow]:
    """Every point answers every item right."""
    return [
        made_row(point, task, length, item)
        for point in points
        for task in tasks
        for length in lengths
        for item in range(items)
    ]


def changed(rows: Sequence[ScoreRow], chosen: Callable[[ScoreRow], bool], **fields: object) -> list[ScoreRow]:
    """The rows, with other `fields` where `chosen`."""
    return [replace(row, **fields) if chosen(row) else row for row in rows]  # type: ignore[arg-type]


def perplexity_row(point: str) -> ScoreRow:
    """A likelihood: neither an answer nor a prompt."""
    row = made_row(point, "position_block_0", 1024, 0, 0.4)
    return replace(row, benchmark="perplexity", items="windows", depth=math.nan, answer="", tokens_out=0)


def write_run(folder: Path, rows: Sequence[ScoreRow], *, finished: bool = True, prompts: bool = True) -> str:
    """Writes results, plan and prompts of these answers; returns the run's URL."""
    store = open_store(str(folder))
    points = [*dict.fromkeys(row.point for row in rows)]
    result = EvaluationResult(
        rows=[*rows],
        ranked=("ruler",),
        standing=tuple(Standing(point, 1.0, 1, None, None) for point in points),
        departures=(),
        baselines=(),
        parents={},
        same={},
        noise=None,
        cost_share=1.0,
        race=None,
        seed=0,
        finished=finished,
        samples=[*rows],
    )
    write_results(store, result)
    store.write("plan.json", sealed({"job": "made-up", "points": [{"name": point} for point in points]}))
    sets: dict[tuple[str, str, int], set[int]] = {}
    for row in rows if prompts else ():
        if row.benchmark == "ruler":
            sets.setdefault((row.items, row.task, row.length), set()).add(row.item)
    for (digest, task, length), items in sets.items():
        found = write_items(made_item(task, length, item) for item in sorted(items))
        store.write(f"items/{digest}/{min(items):06d}-{max(items) + 1:06d}.parquet", found)
    return store.url
