"""The answers as columns: outcomes, order, and numbers that a browser reads as typed arrays."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from orchestrator.evaluating.results import read_results
from orchestrator.viewing.columns import CHUNK_ROWS, FRACTIONS, NUMBERS, OUTCOMES, chunks, columns_of, outcome
from tests.orchestrator.viewing.made_up import made_row, perplexity_row, right_rows, write_run


@pytest.mark.parametrize(
    ("score", "status", "expected"),
    [
        (1.0, "answered", "right"),
        (1.0, "cut", "right"),  # a base model writes on after a right answer
        (0.5, "answered", "partial"),
        (0.5, "cut", "partial"),
        (0.0, "answered", "wrong"),
        (0.0, "cut", "cut"),
        (0.0, "empty", "empty"),
        (0.0, "unended", "unended"),
        (0.0, "filtered", "filtered"),
        (0.0, "failed", "failed"),
    ],
)
def test_an_answer_has_one_outcome(score: float, status: str, expected: str) -> None:
    row = replace(made_row("a", "vt", 1024, 0), score=score, status=status)  # type: ignore[arg-type]
    assert outcome(row) == expected and expected in OUTCOMES


def test_logits_without_a_number_and_likelihoods_are_outcomes_of_their_own() -> None:
    assert outcome(replace(made_row("a", "vt", 1024, 0, 0.0), finite=False)) == "not finite"
    assert outcome(perplexity_row("a")) == "likelihood"


def test_the_numbers_are_columns_in_the_order_of_points_cells_items_and_samples(tmp_path: Path) -> None:
    rows = [replace(row, sample=sample) for row in right_rows(points=("b", "a"), items=2) for sample in (0, 1)]
    columns = columns_of(read_results(write_run(tmp_path, rows[::-1])))  # written in another order
    count = len(rows)
    words = np.frombuffer(columns.numbers(), "<u4").reshape(len(NUMBERS) + len(FRACTIONS), count)
    found = dict(zip(NUMBERS, words.tolist(), strict=False))
    assert columns.points == ("a", "b")  # as they stand: the run was written backwards
    assert [cell[1:3] for cell in columns.cells] == [
        ("niah_single_1", 1024),
        ("niah_single_1", 2048),
        ("vt", 1024),
        ("vt", 2048),
    ]
    keys = [*zip(found["point"], found["cell"], found["item"], found["sample"], strict=True)]
    assert keys == [(p, c, i, s) for p in (0, 1) for c in range(4) for i in (0, 1) for s in (0, 1)]
    score, depth, seconds = words[len(NUMBERS) :].view("<f4")
    assert (score == 1).all() and (depth == 0.5).all() and (seconds == 0.25).all()


def test_chunks_end_by_size_or_by_number_and_cover_every_text() -> None:
    assert [*chunks([])] == []
    assert [*chunks(["x"] * (2 * CHUNK_ROWS + 1))] == [0, CHUNK_ROWS, 2 * CHUNK_ROWS]
    assert [*chunks(["x" * 200_000] * 3)] == [0, 2]
