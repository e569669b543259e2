"""Answers as a model generated them: several to one item, with sampling, and the tokens of thoughts and answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import comb
from statistics import fmean, median

from jobs.evaluation_tasks import ScoreRow
from orchestrator.judging.estimates import macro_weights
from orchestrator.judging.samples import Cell, cell_of


def by_item(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    """One row for each item: the mean score of its samples, the rest as in the first, tokens and seconds summed.

    The samples of an item are about one question: statistics that took them for several would claim too much.
    """
    if all(row.sample == 0 for row in rows):
        return [*rows]
    return [_mean(samples) for samples in _samples(rows)]


def pass_at(rows: Iterable[ScoreRow]) -> dict[int, float]:
    """The chance that one of k samples is right, for k = 1, 2, 4 … up to all samples.

    Of n samples c score 1: 1 − C(n−c, k)/C(n, k), without bias (Chen et al. 2021, arXiv 2107.03374), its mean over the
    items of a cell, and over cells as in the macro score. Cells with one sample an item, as those of likelihoods, do
    not count; empty where there is no other.
    """
    cells: dict[Cell, list[tuple[int, int]]] = {}
    for samples in _samples(rows):
        right = sum(row.score == 1 for row in samples)
        cells.setdefault(cell_of(samples[0]), []).append((len(samples), right))
    least = {cell: min(count for count, _ in found) for cell, found in cells.items()}
    cells = {cell: found for cell, found in cells.items() if least[cell] > 1}
    if not cells:
        return {}
    most = min(least[cell] for cell in cells)
    weights = macro_weights([*cells])
    return {
        k: float(weights @ [fmean(_chance(count, right, k) for count, right in found) for found in cells.values()])
        for k in sorted({2**power for power in range(most.bit_length())} | {most})
        if k <= most
    }


def _chance(count: int, right: int, k: int) -> float:
    return 1 - comb(count - right, k) / comb(count, k)


def _samples(rows: Iterable[ScoreRow]) -> list[list[ScoreRow]]:
    found: dict[tuple[str | int, ...], list[ScoreRow]] = {}
    for row in rows:
        place = (row.point, row.benchmark, row.task, row.length, row.items, row.item, row.repeat)
        found.setdefault(place, []).append(row)
    return [*found.values()]


def _mean(samples: Sequence[ScoreRow]) -> ScoreRow:
    if len(samples) == 1:
        return samples[0]
    return replace(
        samples[0],
        score=fmean(row.score for row in samples),
        finite=all(row.finite for row in samples),
        tokens=sum(row.tokens for row in samples),
        tokens_out=sum(row.tokens_out for row in samples),
        tokens_thought=sum(row.tokens_thought for row in samples),
        seconds=sum(row.seconds for row in samples),
    )


def median_tokens(rows: Iterable[ScoreRow]) -> dict[str, float]:
    """The median tokens of thought and answer, `thought` and `answer`; empty where no model thought."""
    generated = [row for row in rows if row.tokens_out]
    if not any(row.tokens_thought for row in generated):
        return {}
    return {
        "thought": median(row.tokens_thought for row in generated),
        "answer": median(row.tokens_out - row.tokens_thought for row in generated),
    }


def token_cells(rows: Iterable[ScoreRow]) -> list[dict[str, str | int | float]]:
    """`median_tokens` of every benchmark, task and length with a thought, for `--json`."""
    cells: dict[tuple[str, str, int], list[ScoreRow]] = {}
    for row in rows:
        cells.setdefault((row.benchmark, row.task, row.length), []).append(row)
    return [
        {"benchmark": benchmark, "task": task, "length": length, **found}
        for (benchmark, task, length), of_cell in cells.items()
        if (found := median_tokens(of_cell))
    ]
