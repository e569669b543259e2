"""Two models' answers to the same questions, side by side."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from jobs.errors import BadInput
from jobs.evaluation_tasks import ScoreRow
from orchestrator.evaluating.pairing import Pairs, check_weights, common_rows, sample_of
from orchestrator.evaluating.results import ranked_rows
from orchestrator.judging.estimates import macro_difference, macro_weights
from orchestrator.judging.samples import Cell
from orchestrator.judging.significance import (
    holm,
    mcnemar,
    mcnemar_interval,
    minimum_detectable_effect,
    paired_test,
    sign_flip_test,
)
from orchestrator.report.against_baseline import SURE
from orchestrator.report.leaderboard import perplexity_by_position
from orchestrator.report.scored_models import ScoredModel, benchmark_settings, right_answers
from workers.benchmarks.registry import BENCHMARKS

Test = Literal["mcnemar", "sign-flip", "binomial", "t"]
"""Binomial is that of `judging.estimates.few_losses`, if a difference is not sure because of it alone."""


@dataclass(frozen=True, slots=True)
class Difference:
    """B − A of one score, in points of 100: a cell's, a length's (no task), or the macro score's (no length either).

    `low` and `high` are the bounds of the 95 % interval. `rare` is the p value that rare losses leave. `p_holm` is
    adjusted over the lines of the same kind. Where `p` alone would make a difference sure, but not the larger of `p`
    and `rare`, `p` and `p_holm` are those of this larger one. `detectable` is the smallest true difference that so many
    items show with probability 0.8, infinite with a single haystack.
    """

    benchmark: str | None
    task: str | None
    length: int | None
    items: int
    haystacks: int
    a: float
    b: float
    difference: float
    low: float
    high: float
    test: Test
    p: float
    rare: float
    p_holm: float
    detectable: float

    def document(self) -> dict[str, Any]:
        """For `--json`; infinite values as None."""
        found = asdict(self)
        return {key: None if isinstance(value, float) and math.isinf(value) else value for key, value in found.items()}


@dataclass(frozen=True, slots=True)
class Flip:
    """A question that the two models scored differently: item `item` of the set `items`.

    `depth` is None where there is no needle; `expected` are the right answers, None until `with_expected` looked, and
    where the items are no longer there.
    """

    items: str
    benchmark: str
    task: str
    length: int
    item: int
    depth: float | None
    score_a: float
    score_b: float
    answer_a: str
    answer_b: str
    expected: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All that is known of B against A. `perplexity` is A's and B's by length and first position of a block."""

    a: ScoredModel
    b: ScoredModel
    cells: tuple[Difference, ...]
    lengths: tuple[Difference, ...]
    overall: Difference
    flips: tuple[Flip, ...]
    perplexity: Mapping[int, Mapping[int, tuple[float, float]]]

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "a": self.a.document(),
            "b": self.b.document(),
            "overall": self.overall.document(),
            "lengths": [line.document() for line in self.lengths],
            "cells": [line.document() for line in self.cells],
            "perplexity": {
                str(length): {str(position): [_finite(value) for value in both] for position, both in blocks.items()}
                for length, blocks in self.perplexity.items()
            },
            "flips": [asdict(flip) for flip in self.flips],
        }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def compare_models(a: ScoredModel, b: ScoredModel) -> Comparison:
    """B against A on the questions that both answered; `BadInput` names the difference if there are none."""
    common = common_rows(b.rows, a.rows)
    if not common:
        raise BadInput(_nothing_in_common(a, b))
    ranked = _ranked(a, b, common)
    tested = {cell: found for cell, found in common.items() if _is_tested(found[0][0], ranked)}
    macro = {cell: found for cell, found in tested.items() if found[0][0].benchmark in ranked}
    check_weights(macro)
    lengths = sorted({cell.length for cell in macro})
    by_length = [{cell: found for cell, found in macro.items() if cell.length == length} for length in lengths]
    return Comparison(
        a=a,
        b=b,
        cells=_corrected([_cell_line(cell, found) for cell, found in tested.items()]),
        lengths=_corrected([replace(_macro_line(cells), length=next(iter(cells)).length) for cells in by_length]),
        overall=_corrected([_macro_line(macro)])[0],
        flips=tuple(_flips(tested)),
        perplexity=_perplexity(common),
    )


def _ranked(a: ScoredModel, b: ScoredModel, common: Mapping[Cell, Pairs]) -> tuple[str, ...]:
    """The benchmarks of the macro score: those that both runs rank by, else whatever both answered."""
    shared = {found[0][0].benchmark for found in common.values()}
    return tuple(name for name in a.ranked if name in b.ranked and name in shared) or tuple(sorted(shared))


def _is_tested(row: ScoreRow, ranked: Sequence[str]) -> bool:
    """A likelihood is tested as a score only where the run has nothing else to rank by."""
    likelihood = BENCHMARKS[row.benchmark].is_likelihood
    return bool(ranked_rows([row], [row.benchmark])) and (not likelihood or row.benchmark in ranked)


def _cell_line(cell: Cell, found: Pairs) -> Difference:
    sample = sample_of(cell, found)
    items, haystacks = len(found), len(set(sample.haystacks.tolist()))
    exact = haystacks == items and all(
        score in (0.0, 1.0) for pair in found for score in (pair[0].score, pair[1].score)
    )
    estimate = macro_difference([sample])
    low, high, error = estimate.low, estimate.high, estimate.standard_error
    test, rare = "sign-flip", estimate.least_p
    if exact:
        test, rare = "mcnemar", 0.0
        gains, losses = int(np.sum(sample.values > 0)), int(np.sum(sample.values < 0))
        p = mcnemar(gains, losses).two_sided
        low, high = mcnemar_interval(gains, losses, items)
    else:
        p = sign_flip_test(sample.values, sample.haystacks)
    return Difference(
        benchmark=found[0][0].benchmark,
        task=cell.task,
        length=cell.length,
        items=items,
        haystacks=haystacks,
        a=100 * sum(old.score for _, old in found) / items,
        b=100 * sum(new.score for new, _ in found) / items,
        difference=100 * estimate.mean,
        low=100 * low,
        high=100 * high,
        test=test,
        p=p,
        rare=rare,
        p_holm=p,
        detectable=_detectable(error),
    )


def _macro_line(cells: Mapping[Cell, Pairs]) -> Difference:
    samples = [sample_of(cell, found) for cell, found in cells.items()]
    weights = macro_weights([*cells])
    found = paired_test(samples)
    estimate = found.estimate
    means = {
        side: 100
        * sum(
            weight * sum(pair[side].score for pair in found) / len(found)
            for weight, found in zip(weights.tolist(), cells.values(), strict=True)
        )
        for side in (0, 1)
    }
    return Difference(
        benchmark=None,
        task=None,
        length=None,
        items=estimate.items,
        haystacks=estimate.clusters,
        a=means[1],
        b=means[0],
        difference=100 * estimate.mean,
        low=100 * estimate.low,
        high=100 * estimate.high,
        test="mcnemar" if found.exact else "t",
        p=found.p,
        rare=found.rare,
        p_holm=found.p,
        detectable=_detectable(estimate.standard_error),
    )


def _detectable(standard_error: float) -> float:
    if math.isinf(standard_error):
        return math.inf
    return 100 * minimum_detectable_effect(1, deviation=standard_error)


def _corrected(lines: Sequence[Difference]) -> tuple[Difference, ...]:
    """Holm over the lines, and the guard against rare losses: on the larger p value, or many lines would undo it."""
    larger = [max(line.p, line.rare) for line in lines]
    found: list[Difference] = []
    for line, p, seen, guarded in zip(
        lines, larger, holm([line.p for line in lines]).tolist(), holm(larger).tolist(), strict=True
    ):
        if line.p <= SURE < p or seen <= SURE < guarded:
            found.append(replace(line, test="binomial", p=p, p_holm=guarded))
        else:
            found.append(replace(line, p_holm=seen))
    return tuple(found)


def _flips(cells: Mapping[Cell, Pairs]) -> list[Flip]:
    """Greatest changes first, losses before gains, long contexts before short ones."""
    found = [
        Flip(
            items=new.items,
            benchmark=new.benchmark,
            task=new.task,
            length=new.length,
            item=new.item,
            depth=_finite(new.depth),
            score_a=old.score,
            score_b=new.score,
            answer_a=old.answer,
            answer_b=new.answer,
            expected=None,
        )
        for pairs_of_cell in cells.values()
        for new, old in pairs_of_cell
        if new.score != old.score and not BENCHMARKS[new.benchmark].is_likelihood
    ]
    return sorted(
        found, key=lambda flip: (-abs(flip.score_b - flip.score_a), flip.score_b, -flip.length, flip.task, flip.item)
    )


def with_expected(comparison: Comparison, most: int | None = None) -> Comparison:
    """The comparison with the right answers of its first `most` flips, or of all, read from the runs' items."""
    known: dict[str, Mapping[int, tuple[str, ...]]] = {}
    shown = comparison.flips[:most]
    for digest, benchmark in {flip.items: flip.benchmark for flip in shown}.items():
        found = (right_answers(model.run, digest, benchmark) for model in (comparison.b, comparison.a))
        known[digest] = next(filter(None, found), {})
    answered = (replace(flip, expected=known[flip.items].get(flip.item)) for flip in shown)
    return replace(comparison, flips=(*answered, *comparison.flips[len(shown) :]))


def _nothing_in_common(a: ScoredModel, b: ScoredModel) -> str:
    """The reason why no question was answered by both, and the remedy."""
    cells_a, cells_b = ({Cell(row.task, row.length): row.items for row in model.rows} for model in (a, b))
    start = f"{a.name} and {b.name} answered no question in common: "
    if not cells_a.keys() & cells_b.keys():
        tasks_a, tasks_b = ({cell.task for cell in cells} for cells in (cells_a, cells_b))
        what = "lengths" if tasks_a & tasks_b else "tasks"
        seen = [
            _listed({str(cell.length if what == "lengths" else cell.task) for cell in cells})
            for cells in (cells_a, cells_b)
        ]
        return f"{start}their {what} differ ({seen[0]} against {seen[1]}); evaluate both on the same"
    if any(cells_b[cell] == items for cell, items in cells_a.items() if cell in cells_b):
        return f"{start}other items of the same sets; evaluate both on as many"
    if a.seed != b.seed:
        return f"{start}their seeds differ ({a.seed} against {b.seed}); evaluate both with the same `seed:`"
    if settings := _settings_that_differ(a, b):
        return f"{start}the jobs' {_listed(settings)} differ; evaluate both with the same"
    return (
        f"{start}their tokenizers differ, so that every length has other items; compare models that share a tokenizer"
    )


def _settings_that_differ(a: ScoredModel, b: ScoredModel) -> list[str]:
    """The keys of the two jobs, such as `ruler.questions`, that make the same tasks at the same lengths differ."""
    if a.run == b.run:
        return []
    benchmarks = sorted({row.benchmark for row in a.rows} & {row.benchmark for row in b.rows})
    found: list[str] = []
    for benchmark in benchmarks:
        asked_a, asked_b = (benchmark_settings(model.run, benchmark) for model in (a, b))
        found += [f"{benchmark}.{key}" for key in asked_a if asked_a[key] != asked_b.get(key)]
    return found


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names, key=lambda name: (len(name), name)))


def _perplexity(common: Mapping[Cell, Pairs]) -> dict[int, dict[int, tuple[float, float]]]:
    rows = [pair for found in common.values() for pair in found]
    b, a = (perplexity_by_position(pair[side] for pair in rows) for side in (0, 1))
    return {
        length: {position: (a[length][position], b[length][position]) for position in blocks}
        for length, blocks in a.items()
    }
