"""The table people look at first: every point's score by length, how far its context reaches, and who left the race."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.evaluation import ScoreRow
from orchestrator.evaluation import EvaluationResult
from orchestrator.statistics import CellSample, cell_sample, macro_mean
from workers.benchmarks.scores import (
    RULER_THRESHOLD,
    EffectiveLength,
    Outcome,
    effective_length_interval,
    relative_threshold,
    score_by_length,
    weighted_average,
)

MOST_ROWS = 20


@dataclass(frozen=True, slots=True)
class Line:
    """One model's line: scores from 0 to 100, half width of the 95 % interval, effective lengths in tokens.

    `relative` is the effective length by 85 % of the best parent's score at the shortest length.
    """

    name: str
    score: float
    half_width: float
    by_length: Mapping[int, float]
    weighted_increasing: float
    effective: EffectiveLength
    relative: EffectiveLength | None
    items: int
    note: str

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "name": self.name,
            "score": round(self.score, 2),
            "half_width": round(self.half_width, 2),
            "by_length": {str(length): round(score, 2) for length, score in self.by_length.items()},
            "wavg_increasing": round(self.weighted_increasing, 2),
            "effective_length": [self.effective.low, self.effective.length, self.effective.high],
            "relative_effective_length": None
            if self.relative is None
            else [self.relative.low, self.relative.length, self.relative.high],
            "items": self.items,
            "note": self.note,
        }


def leaderboard(result: EvaluationResult, seed: int) -> list[Line]:
    """The points best first, then the parents; only benchmarks with answers count, perplexity stands apart."""
    answered: dict[str, list[ScoreRow]] = {}
    for row in result.rows:
        if row.benchmark != "perplexity":
            answered.setdefault(row.point, []).append(row)
    parents = [score_by_length(_outcomes(answered[name])) for name in result.baselines if name in answered]
    threshold = max((relative_threshold(scores) for scores in parents), default=None)
    left = {departure.point: f"left at {departure.items} items" for departure in result.departures}
    confirmed = {row.point: row.confirmed for row in result.standing if row.confirmed is not None}
    lines: list[Line] = []
    for standing in result.standing:
        note = left.get(standing.point, "")
        if standing.point in confirmed:
            note = f"{100 * confirmed[standing.point]:.1f} on fresh items"
        lines.append(_line(standing.point, answered[standing.point], threshold, seed, note))
    lines += [_line(name, answered[name], threshold, seed, "parent") for name in result.baselines if name in answered]
    return lines


def _line(name: str, rows: Sequence[ScoreRow], threshold: float | None, seed: int, note: str) -> Line:
    outcomes = _outcomes(rows)
    by_length = score_by_length(outcomes)
    macro = macro_mean(samples(rows))
    return Line(
        name=name,
        score=100 * macro.mean,
        half_width=100 * (macro.high - macro.low) / 2,
        by_length=by_length,
        weighted_increasing=weighted_average(by_length, increasing=True),
        effective=effective_length_interval(outcomes, RULER_THRESHOLD, seed=seed),
        relative=None if threshold is None else effective_length_interval(outcomes, threshold, seed=seed),
        items=len(rows),
        note=note,
    )


def _outcomes(rows: Sequence[ScoreRow]) -> list[Outcome]:
    return [Outcome(row.task, row.length, row.haystack, row.score) for row in rows]


def samples(rows: Sequence[ScoreRow]) -> list[CellSample]:
    """One model's scores as the statistics take them: a sample for each task and length."""
    cells: dict[tuple[str, int], list[ScoreRow]] = {}
    for row in rows:
        cells.setdefault((row.task, row.length), []).append(row)
    return [
        cell_sample(task, length, [row.score for row in members], [row.haystack for row in members])
        for (task, length), members in sorted(cells.items())
    ]


def print_leaderboard(lines: Sequence[Line], result: EvaluationResult) -> None:
    """The table on a terminal, as wide as the terminal is."""
    from rich.console import Console
    from rich.table import Table

    lengths = sorted({length for line in lines for length in line.by_length})
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column("point", no_wrap=True)
    table.add_column("score", justify="right")
    for length in lengths:
        table.add_column(short_length(length), justify="right")
    table.add_column("effective", justify="right")
    table.add_column("", overflow="ellipsis", no_wrap=True)
    shown = [*lines[:MOST_ROWS], *(line for line in lines[MOST_ROWS:] if line.note == "parent")]
    for line in shown:
        table.add_row(
            line.name,
            f"{line.score:.1f} ±{line.half_width:.1f}",
            *(f"{line.by_length[length]:.0f}" if length in line.by_length else "" for length in lengths),
            _effective(line.effective),
            line.note,
        )
    console = Console()
    console.print(table)
    if len(shown) < len(lines):
        console.print(f"… and {len(lines) - len(shown)} more points", highlight=False)
    console.print(_footnote(result), highlight=False, style="dim")


def _footnote(result: EvaluationResult) -> str:
    notes = ["score: mean over tasks and lengths with its 95 % interval; effective: longest length at ≥ 85.6"]
    if result.departures:
        notes.append(f"the race cost {result.cost_share:.0%} of asking every point everything")
    if result.noise is not None:
        noise = result.noise
        notes.append(f"asked the same again, {noise.rate:.1%} of the leader's answers changed their score")
    return "; ".join(notes)


def _effective(length: EffectiveLength) -> str:
    if length.low == length.high:
        return short_length(length.length)
    return f"{short_length(length.length)} ({short_length(length.low)}–{short_length(length.high)})"


def short_length(length: int) -> str:
    """A length in tokens as people say it: 512, 4K, 128K."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)
