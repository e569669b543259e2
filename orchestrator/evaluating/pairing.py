"""Rows of two models about the same items, side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from jobs.errors import BadInput
from jobs.evaluation_tasks import ScoreRow
from orchestrator.judging.samples import Cell, CellSample, cell_sample, paired_sample
from workers.benchmarks.registry import BENCHMARKS

Question = tuple[str, str, int, int]
"""Digest of the set of items, task, length and number: rows that agree in these answer the same question."""
Pairs = Sequence[tuple[ScoreRow, ScoreRow]]
"""Rows of the new and of the old model about the same questions."""


def question(row: ScoreRow) -> Question:
    """The question that a row answers."""
    return row.items, row.task, row.length, row.item


def pairs(new: Sequence[ScoreRow], old: Sequence[ScoreRow]) -> list[CellSample]:
    """Paired differences new − old, a sample for each task and length, on the questions that both answered.

    `BadInput` when there are none.
    """
    common = common_rows(new, old)
    if not common:
        raise BadInput("the two models have no items in common; evaluate both on the same benchmark, lengths and seed")
    return [sample_of(cell, found) for cell, found in common.items()]


def common_rows(new: Sequence[ScoreRow], old: Sequence[ScoreRow]) -> dict[Cell, Pairs]:
    """Both models' rows about the same questions, by cell in order."""
    earlier = {question(row): row for row in old}
    common: dict[Cell, list[tuple[ScoreRow, ScoreRow]]] = defaultdict(list)
    for row in new:
        if (other := earlier.get(question(row))) is not None:
            common[Cell(row.task, row.length, row.benchmark)].append((row, other))
    return {cell: common[cell] for cell in sorted(common)}


def sample_of(cell: Cell, found: Pairs) -> CellSample:
    return paired_sample(
        cell.task,
        cell.length,
        [row.score for row, _ in found],
        [other.score for _, other in found],
        [row.haystack for row, _ in found],
        losable=not BENCHMARKS[found[0][0].benchmark].is_likelihood,
        benchmark=cell.benchmark,
    )


def samples(rows: Sequence[ScoreRow]) -> list[CellSample]:
    """One model's scores as the statistics take them: a sample for each task and length."""
    cells: dict[Cell, list[ScoreRow]] = {}
    for row in rows:
        cells.setdefault(Cell(row.task, row.length, row.benchmark), []).append(row)
    return [
        cell_sample(
            cell.task,
            cell.length,
            [row.score for row in members],
            [row.haystack for row in members],
            benchmark=cell.benchmark,
        )
        for cell, members in sorted(cells.items())
    ]
