"""Rows of two models about the same items, side by side."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from statistics import fmean

from jobs.errors import BadInput
from jobs.evaluation_tasks import ScoreRow
from orchestrator.judging.estimates import macro_weights
from orchestrator.judging.gate import Tokens
from orchestrator.judging.samples import Cell, CellSample, cell_of, cell_sample, paired_sample
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

    `BadInput` when there are none, or where the two weigh benchmarks otherwise.
    """
    common = common_rows(new, old)
    check_weights(common)
    if not common:
        raise BadInput("the two models have no items in common; evaluate both on the same benchmark, lengths and seed")
    return [sample_of(cell, found) for cell, found in common.items()]


def common_rows(new: Sequence[ScoreRow], old: Sequence[ScoreRow]) -> dict[Cell, Pairs]:
    """Both models' rows about the same questions, by cell in order."""
    earlier = {question(row): row for row in old}
    common: dict[Cell, list[tuple[ScoreRow, ScoreRow]]] = defaultdict(list)
    for row in new:
        if (other := earlier.get(question(row))) is not None:
            common[cell_of(row)].append((row, other))
    return {cell: common[cell] for cell in sorted(common)}


def check_weights(cells: Mapping[Cell, Pairs]) -> None:
    """`BadInput` if the benchmarks of these cells weigh otherwise in the scores of the two models.

    Only their ratios count: `weights: {ruler: 2}` and `{ruler: 1, needle: 0.5}` are one score of ruler and needle.
    """
    factors = {row.benchmark: (row.weight / other.weight, row, other) for (row, other), *_ in cells.values()}
    ratios = [factor for factor, *_ in factors.values()]
    if not ratios or math.isclose(min(ratios), max(ratios), rel_tol=1e-9):
        return
    _, row, other = max(factors.values(), key=lambda found: abs(found[0] - 1))
    raise BadInput(
        f"{row.benchmark} weighs {row.weight:g} for {row.point} and {other.weight:g} for {other.point}, beside"
        " other benchmarks; evaluate both with the same `evaluate.weights`"
    )


def sample_of(cell: Cell, found: Pairs) -> CellSample:
    return paired_sample(
        cell.task,
        cell.length,
        [row.score for row, _ in found],
        [other.score for _, other in found],
        [row.haystack for row, _ in found],
        losable=not BENCHMARKS[found[0][0].benchmark].is_likelihood,
        benchmark=cell.benchmark,
        weight=cell.weight,
    )


def tokens_of(new: Sequence[ScoreRow], old: Sequence[ScoreRow], *, most: float, limit: int) -> Tokens:
    """The tokens of output of two models, as the gate takes them; a question's are the mean of its samples.

    `limit` is the most tokens of an answer. A question without an answer, as a server refused it or a logit was NaN,
    counts as the limit for the new model and as 0 for the old one. `BadInput` where an answer's tokens are not known,
    or more than the limit.
    """
    whole = limit * max(1.0, most)
    generating = {cell_of(row) for row in (*new, *old) if row.tokens_out}
    written = _tokens_by_question(new, generating, lost=limit, limit=limit)
    earlier = _tokens_by_question(old, generating, lost=0, limit=limit)
    cells: dict[Cell, list[tuple[float, float, str]]] = defaultdict(list)
    for row in {question(row): row for row in new}.values():
        if (place := question(row)) in written.keys() & earlier.keys():
            cells[cell_of(row)].append((written[place], earlier[place], row.haystack))
    cells = dict(sorted(cells.items()))
    if not cells:
        raise BadInput("gate.output_tokens: no answer has a count of tokens; take the key out")
    weights = macro_weights([*cells])
    means = weights @ [
        [fmean(own for own, _, _ in found), fmean(other for _, other, _ in found)] for found in cells.values()
    ]
    samples = [
        cell_sample(
            cell.task,
            cell.length,
            [(most * other - own) / whole for own, other, _ in found],
            [haystack for *_, haystack in found],
            benchmark=cell.benchmark,
            weight=cell.weight,
        )
        for cell, found in cells.items()
    ]
    return Tokens(samples, float(means[0]), float(means[1]), most, whole)


def _tokens_by_question(
    rows: Sequence[ScoreRow], generating: Collection[Cell], *, lost: int, limit: int
) -> dict[Question, float]:
    """The mean tokens of each question's answers in the cells whose questions are answered by a text."""
    found: dict[Question, list[int]] = defaultdict(list)
    for row in rows:
        if cell_of(row) not in generating:
            continue
        if row.tokens_out > limit:
            raise BadInput(
                f"gate.output_tokens: {row.point} wrote {row.tokens_out} tokens where {limit} were allowed;"
                " serve it from a server that keeps to max_tokens"
            )
        check_counted(row, "gate.output_tokens")
        found[question(row)].append(lost if _lost(row) else row.tokens_out)
    return {place: fmean(tokens) for place, tokens in found.items()}


def tokens_by_item(rows: Sequence[ScoreRow], lost: float) -> dict[int, float]:
    """The tokens of all samples of each item of a cell; a sample without an answer has `lost`."""
    found: dict[int, float] = defaultdict(float)
    for row in rows:
        found[row.item] += lost if _lost(row) else row.tokens_out
    return found


def check_counted(row: ScoreRow, place: str) -> None:
    """`BadInput` with the `place` if the model wrote an answer without a count of its tokens."""
    silent = row.status == "empty" or (row.status == "unended" and not row.thought)
    if not (_lost(row) or row.tokens_out or silent):
        raise BadInput(
            f"{place}: an answer of {row.point} has no count of tokens; serve it from a server that"
            " reports `usage`, as vLLM and llama.cpp do, and ask again in a new `output:`"
        )


def _lost(row: ScoreRow) -> bool:
    """Whether a question has no answer: the server refused or filtered it, or a logit was NaN."""
    return not row.finite or row.status in ("filtered", "failed")


def samples(rows: Sequence[ScoreRow]) -> list[CellSample]:
    """One model's scores as the statistics take them: a sample for each task and length."""
    cells: dict[Cell, list[ScoreRow]] = {}
    for row in rows:
        cells.setdefault(cell_of(row), []).append(row)
    return [
        cell_sample(
            cell.task,
            cell.length,
            [row.score for row in members],
            [row.haystack for row in members],
            benchmark=cell.benchmark,
            weight=cell.weight,
        )
        for cell, members in sorted(cells.items())
    ]
