"""Two models' answers to the same questions, side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from jobs.errors import BadInput
from jobs.evaluation import ScoreRow
from orchestrator.statistics import Cell, CellSample, paired_sample

Question = tuple[str, str, int, int]
"""Digest of the set of items, task, length and number: rows that agree in these answer the same question."""


def question(row: ScoreRow) -> Question:
    """What a row answers."""
    return row.items, row.task, row.length, row.item


def pairs(new: Sequence[ScoreRow], old: Sequence[ScoreRow]) -> list[CellSample]:
    """Paired differences new − old, a sample for each task and length, on the questions that both answered.

    `BadInput` when there are none.
    """
    earlier = {question(row): row for row in old}
    common: dict[Cell, list[tuple[ScoreRow, ScoreRow]]] = defaultdict(list)
    for row in new:
        if (other := earlier.get(question(row))) is not None:
            common[Cell(row.task, row.length)].append((row, other))
    if not common:
        raise BadInput("the two models have no items in common; evaluate both on the same benchmark, lengths and seed")
    return [
        paired_sample(
            cell.task,
            cell.length,
            [row.score for row, _ in found],
            [other.score for _, other in found],
            [row.haystack for row, _ in found],
        )
        for cell, found in sorted(common.items())
    ]
