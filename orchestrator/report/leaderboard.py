"""The table people look at first: every point's score by length, how far its context reaches, and who left the race."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from jobs.evaluation_tasks import Kind, ScoreRow
from orchestrator.evaluating.pairing import samples
from orchestrator.evaluating.results import EvaluationResult, ranked_rows
from orchestrator.judging.effective_length import (
    EffectiveLength,
    effective_length_interval,
    relative_length_interval,
    score_by_length,
    weighted_average,
)
from orchestrator.judging.estimates import macro_mean, macro_score
from orchestrator.judging.guards import Guarded
from orchestrator.judging.sampled import median_tokens, pass_at, token_cells
from orchestrator.judging.samples import CellSample
from orchestrator.judging.unanswered import Unanswered, unanswered, unanswered_cells
from orchestrator.words import finite_or_none, short_length
from workers.benchmarks.registry import BENCHMARKS

MOST_ROWS = 20
LARGEST_EXPONENT = 700.0
GUARD_MARKS = {"held": " ✓", "broken": " ✗", "undecided": " ?", None: ""}
GUARDS_LEGEND = "✓ surely within the margin, ✗ surely worse and out, ? not sure"


@dataclass(frozen=True, slots=True)
class Line:
    """One model's line: scores from 0 to 100, half width of the 95 % interval, effective lengths in tokens.

    `name` is the model's label in the run, `title` its name in a table: a parent's own name, marked as a parent.
    `by_benchmark` is the score over each benchmark that ranks, where several do. `weighted` is RULER's wAvg, with
    weights that increase with length and with weights that decrease. It and the effective lengths are of the scores in
    `by_length`: `effective_of` names their tasks, `as_published` says that they are RULER's thirteen and no other.
    `relative` is by the name of a parent: by 85 % of its score at the shortest length. `beside` has the scores that do
    not rank: means of other benchmarks' tasks from 0 to 100, `beside_of` the benchmark of each. `perplexity` is by
    length and first position of a block. A half width is infinite with a single haystack, a perplexity with NaN or
    infinite likelihoods. `generated` has the columns on sampled answers and thoughts: pass@k from 0 to 100, the medians
    of tokens; `pass_at` is by k, from 0 to 100. `guards` has the score and the finding of each guard that was asked.
    """

    kind: Kind
    name: str
    title: str
    score: float
    half_width: float
    by_benchmark: Mapping[str, float]
    by_length: Mapping[int, float]
    weighted: tuple[float, float] | None
    effective: EffectiveLength | None
    effective_of: str
    as_published: bool
    relative: Mapping[str, EffectiveLength]
    beside: Mapping[str, float]
    beside_of: Mapping[str, str]
    perplexity: Mapping[int, Mapping[int, float]]
    items: int
    note: str
    unanswered: Unanswered
    generated: Mapping[str, float]
    pass_at: Mapping[int, float]
    token_cells: Sequence[Mapping[str, str | int | float]]
    unanswered_cells: Sequence[Mapping[str, str | int]]
    guards: Sequence[Guarded] = ()

    def document(self) -> dict[str, Any]:
        """For `--json`; infinite values as None."""
        return {
            "kind": self.kind,
            "name": self.name,
            "score": round(self.score, 2),
            "half_width": finite_or_none(self.half_width),
            "by_benchmark": {name: round(score, 2) for name, score in self.by_benchmark.items()},
            "by_length": {str(length): round(score, 2) for length, score in self.by_length.items()},
            "wavg_increasing": None if self.weighted is None else round(self.weighted[0], 2),
            "wavg_decreasing": None if self.weighted is None else round(self.weighted[1], 2),
            "effective_length": None if self.effective is None else _bounds(self.effective),
            "effective_length_of": self.effective_of,
            "effective_length_as_published": self.as_published,
            "relative_effective_length": {name: _bounds(length) for name, length in self.relative.items()},
            "beside": {name: round(mean, 2) for name, mean in self.beside.items()},
            "guards": [asdict(guarded) for guarded in self.guards],
            "perplexity": {
                str(length): {str(position): finite_or_none(value) for position, value in blocks.items()}
                for length, blocks in self.perplexity.items()
            },
            "items": self.items,
            "note": self.note,
            "pass_at": {str(k): round(share, 2) for k, share in self.pass_at.items()},
            "tokens": {name: value for name, value in self.generated.items() if name in ("thought", "answer")},
            "token_cells": [*self.token_cells],
            "unanswered": {**self.unanswered.document(), "cells": [*self.unanswered_cells]},
        }


def _bounds(length: EffectiveLength) -> list[int]:
    return [length.low, length.length, length.high]


def leaderboard(result: EvaluationResult) -> list[Line]:
    """The points best first, then the parents. Only the benchmarks that rank make the score; the rest stands beside."""
    ranked = _by_point(result.ranked_rows())
    everything = _by_point(result.common_rows())
    parents = {name: samples(context_rows(ranked[label])) for name, label in result.parents.items() if label in ranked}
    answers = _by_point(result.common_answers())
    titles = {label: f"{name} (parent)" for name, label in result.parents.items() if label in result.baselines}
    notes = {departure.point: [f"left at {departure.items} items"] for departure in result.departures}
    for standing in result.standing:
        if standing.confirmed is not None:
            notes[standing.point] = [f"{100 * standing.confirmed:.1f} on fresh items"]
    for guarded in result.guards:
        if guarded.outcome == "broken":
            notes.setdefault(guarded.model, []).append(f"out: {guarded.words}")
    for twin, point in result.same.items():
        notes.setdefault(point, []).append(f"= {twin}")
    for parent, label in result.parents.items():
        if label not in titles:
            notes.setdefault(label, []).append(f"= parent {parent}")
    guards: dict[str, list[Guarded]] = defaultdict(list)
    for guarded in result.guards:
        guards[guarded.model].append(guarded)
    names = [*(standing.point for standing in result.standing), *result.baselines]
    return [
        replace(
            _line(name, titles.get(name), ranked[name], everything[name], answers[name], parents, notes.get(name, [])),
            guards=tuple(guards[name]),
        )
        for name in names
        if name in ranked
    ]


def _line(
    name: str,
    parent: str | None,
    ranked: Sequence[ScoreRow],
    everything: Sequence[ScoreRow],
    answers: Sequence[ScoreRow],
    parents: Mapping[str, Sequence[CellSample]],
    notes: Sequence[str],
) -> Line:
    reaching = context_rows(ranked)
    answered = samples(reaching)
    reached = score_by_length(answered)
    scored = samples(ranked)
    macro = macro_score(scored)
    beside = _beside(everything, {row.benchmark for row in ranked})
    broken = sum(not row.finite for row in everything)
    asked = {row.benchmark for row in ranked}
    passed = {k: 100 * share for k, share in pass_at(ranked_rows(answers, [*asked])).items()}
    return Line(
        kind="point" if parent is None else "parent",
        name=name,
        title=parent or name,
        score=100 * macro.mean,
        half_width=100 * (macro.high - macro.low) / 2,
        by_benchmark=_by_benchmark(ranked),
        by_length=score_by_length(scored) if all(BENCHMARKS[row.benchmark].retrieval for row in ranked) else {},
        weighted=_weighted(reached) if answered else None,
        effective=effective_length_interval(answered) if answered else None,
        effective_of=_tasks_of(reaching)[0],
        as_published=as_published(reaching),
        relative=_relative(answered, parents),
        beside={task: mean for task, (_, mean) in beside.items()},
        beside_of={task: benchmark for task, (benchmark, _) in beside.items()},
        perplexity=perplexity_by_position(everything),
        items=len(ranked),
        unanswered=unanswered(answers),
        generated={f"pass@{k}": share for k, share in [*passed.items()][-1:]} | median_tokens(answers),
        pass_at=passed,
        token_cells=token_cells(answers),
        unanswered_cells=unanswered_cells(answers),
        note=", ".join([*notes, *([f"{broken} answers had NaN or infinite logits"] if broken else [])]),
    )


def context_rows(ranked: Iterable[ScoreRow]) -> list[ScoreRow]:
    """The answers that tell how far a context reaches, of those that rank: none unless their length is known."""
    return [row for row in ranked if (of := BENCHMARKS[row.benchmark]).retrieval and of.reaches]


def as_published(rows: Sequence[ScoreRow]) -> bool:
    """Whether these answers are to the tasks of one published benchmark, all of them and no other."""
    asked = {(row.benchmark, row.task) for row in rows}
    return any(asked == {(name, task) for task in of.tasks} for name, of in BENCHMARKS.items() if of.tasks)


def _relative(
    answered: Sequence[CellSample], parents: Mapping[str, Sequence[CellSample]]
) -> dict[str, EffectiveLength]:
    found = {name: relative_length_interval(answered, theirs) for name, theirs in parents.items()}
    return {name: length for name, length in found.items() if length is not None}


def _weighted(reached: Mapping[int, float]) -> tuple[float, float]:
    return weighted_average(reached, increasing=True), weighted_average(reached, increasing=False)


def _by_benchmark(ranked: Sequence[ScoreRow]) -> dict[str, float]:
    parts: dict[str, list[ScoreRow]] = defaultdict(list)
    for row in ranked:
        parts[row.benchmark].append(row)
    if len(parts) == 1:
        return {}
    return {name: 100 * macro_mean(samples(rows)).mean for name, rows in parts.items()}


def _by_point(rows: Iterable[ScoreRow]) -> dict[str, list[ScoreRow]]:
    found: dict[str, list[ScoreRow]] = defaultdict(list)
    for row in rows:
        found[row.point].append(row)
    return found


def _beside(rows: Sequence[ScoreRow], ranked: set[str]) -> dict[str, tuple[str, float]]:
    """Benchmark and mean of each task that no other column shows: not by length, and not as perplexity."""
    scores: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        of = BENCHMARKS[row.benchmark]
        if not of.is_likelihood and not of.guard and not (of.retrieval and row.benchmark in ranked):
            scores[row.task, row.benchmark].append(100 * row.score)
    return {task: (benchmark, sum(values) / len(values)) for (task, benchmark), values in sorted(scores.items())}


def perplexity_by_position(rows: Iterable[ScoreRow]) -> dict[int, dict[int, float]]:
    """Perplexity by length and by the first position of each block, every token counting alike."""
    sums: dict[int, dict[int, list[float]]] = defaultdict(lambda: defaultdict(lambda: [0.0, 0.0]))
    for row in rows:
        if (position := BENCHMARKS[row.benchmark].position) is not None:
            entry = sums[row.length][position(row.task)]
            entry[0] += row.tokens * (math.log(row.score) if row.score > 0 else -math.inf)
            entry[1] += row.tokens
    return {
        length: {position: _exp(-total / tokens) for position, (total, tokens) in sorted(of.items())}
        for length, of in sorted(sums.items())
    }


def _exp(value: float) -> float:
    return math.exp(value) if value < LARGEST_EXPONENT else math.inf


def guard_names(lines: Iterable[Line]) -> list[str]:
    """The guards that any of these models answered, in the job's order."""
    return [*dict.fromkeys(guarded.guard for line in lines for guarded in line.guards)]


def context_note(result: EvaluationResult) -> str:
    """Whose scores tell how far a context reaches, with their verb; empty where none do."""
    tasks, verb = _tasks_of(context_rows(result.ranked_rows()))
    return f"{tasks} {verb}" if tasks else ""


def not_published(result: EvaluationResult) -> str:
    """A warning if effective lengths do not compare with those that RULER publishes; else empty."""
    rows = context_rows(result.ranked_rows())
    return "" if not rows or as_published(rows) else "not comparable with RULER's published lengths"


def _tasks_of(rows: Sequence[ScoreRow]) -> tuple[str, str]:
    """The tasks that these rows answer, as a subject and its verb; empty without rows.

    A task that the published benchmark has not is named: it counts, but not as one of its tasks.
    """
    subjects: list[str] = []
    single = True
    for name, benchmark in BENCHMARKS.items():
        asked = {row.task for row in rows if row.benchmark == name}
        ours = sorted(asked - {*benchmark.tasks}) if benchmark.tasks else []
        known = len(asked) - len(ours)
        if known:
            whole = not benchmark.tasks or known == len(benchmark.tasks)
            single = whole or known == 1
            subjects.append(
                benchmark.title if whole else f"{known} of {benchmark.title}'s {len(benchmark.tasks)} tasks"
            )
        subjects += ours
    *before, last = subjects or [""]
    listed = f"{', '.join(before)} and {last}" if before else last
    return listed, "is" if len(subjects) == 1 and single else "are"


def effective(length: EffectiveLength | None) -> str:
    """An effective length and its interval as people say them."""
    if length is None:
        return ""
    if length.low == length.high:
        return short_length(length.length)
    return f"{short_length(length.length)} ({short_length(length.low)}–{short_length(length.high)})"
