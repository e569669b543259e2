"""The answers of a run as a browser reads them: numbers in typed arrays, texts in chunks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.evaluation_tasks import ScoreRow
from orchestrator.evaluating.results import EvaluationResult
from workers.benchmarks.registry import BENCHMARKS

OUTCOMES = (
    *("right", "partial", "wrong", "cut", "empty", "unended", "filtered", "failed"),
    *("not finite", "likelihood"),
)
"""Every answer has one. Of answers with a score of 0: `wrong` is a whole answer, the others say how it ended."""

CHUNK_CHARACTERS = 1 << 18
CHUNK_ROWS = 2_000
"""A chunk of texts ends at the first of the two."""

NUMBERS = ("point", "cell", "item", "sample", "outcome", "tokens", "tokens_out", "tokens_thought")
FRACTIONS = ("score", "depth", "seconds")
"""The columns in the file of numbers, in this order: 32-bit unsigned integers, then 32-bit floats (NaN: none)."""

Cell = tuple[str, str, int, str]
"""Benchmark, task, length (tokens, 0 if unknown) and the digest of the items: one question in it is one number."""


@dataclass(frozen=True)
class Columns:
    """The answers by point, cell, item and sample. `rows` are in the order of every column and chunk."""

    points: tuple[str, ...]
    cells: tuple[Cell, ...]
    rows: Sequence[ScoreRow]

    def numbers(self) -> bytes:
        """The columns `NUMBERS` and `FRACTIONS` one after the other, little-endian."""
        point = {name: number for number, name in enumerate(self.points)}
        cell = {name: number for number, name in enumerate(self.cells)}
        outcomes = {name: number for number, name in enumerate(OUTCOMES)}
        whole = [
            [point[row.point] for row in self.rows],
            [cell[_cell(row)] for row in self.rows],
            [row.item for row in self.rows],
            [row.sample for row in self.rows],
            [outcomes[outcome(row)] for row in self.rows],
            [row.tokens for row in self.rows],
            [row.tokens_out for row in self.rows],
            [row.tokens_thought for row in self.rows],
        ]
        parts = [
            [row.score for row in self.rows],
            [row.depth for row in self.rows],
            [row.seconds for row in self.rows],
        ]
        arrays = [np.array(whole, "<u4"), np.array(parts, "<f4")]
        return b"".join(array.tobytes() for array in arrays)


def columns_of(result: EvaluationResult) -> Columns:
    """All answers of a result. Points come by their rank, then parents."""
    names = {row.point: None for row in result.answers}
    ranked = [entry.point for entry in (*result.standing, *result.departures)]
    points = [name for name in dict.fromkeys((*ranked, *result.baselines, *names)) if name in names]
    order = {name: number for number, name in enumerate(BENCHMARKS)}
    cells = sorted({_cell(row) for row in result.answers}, key=lambda cell: (order[cell[0]], *cell[1:]))
    at, where = ({key: number for number, key in enumerate(keys)} for keys in (points, cells))
    rows = sorted(result.answers, key=lambda row: (at[row.point], where[_cell(row)], row.item, row.sample))
    return Columns(tuple(points), tuple(cells), rows)


def _cell(row: ScoreRow) -> Cell:
    return row.benchmark, row.task, row.length, row.items


def outcome(row: ScoreRow) -> str:
    """One of `OUTCOMES`. An answer that scored counts by its score, however it ended."""
    if BENCHMARKS[row.benchmark].is_likelihood:
        return "likelihood"
    if not row.finite or not math.isfinite(row.score):
        return "not finite"
    if row.score > 0:
        return "right" if row.score >= 1 else "partial"
    return "wrong" if row.status == "answered" else row.status


def chunks(texts: Sequence[str]) -> Iterator[int]:
    """The index at which each chunk begins; no chunk of no texts."""
    size = CHUNK_CHARACTERS
    first = 0
    for index, text in enumerate(texts):
        if size >= CHUNK_CHARACTERS or index - first >= CHUNK_ROWS:
            yield index
            first, size = index, 0
        size += len(text)
