"""The leaderboard on a terminal, however narrow."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.evaluating.results import EvaluationResult
from orchestrator.judging.effective_length import (
    RULER_THRESHOLD,
)
from orchestrator.report.leaderboard import (
    GUARD_MARKS,
    GUARDS_LEGEND,
    MOST_ROWS,
    Line,
    context_note,
    effective,
    guard_names,
    not_published,
)
from orchestrator.words import benchmark_words, short_length, shortened


def print_leaderboard(lines: Sequence[Line], result: EvaluationResult) -> None:
    """The table on a terminal, as wide as the terminal is; perplexity in a table of its own.

    Where the terminal is too narrow, columns go: notes first, then single benchmarks, then the lengths between the
    shortest and the longest; at last names are cut in the middle.
    """
    from rich.console import Console

    console = Console()
    shown = [*lines[:MOST_ROWS], *(line for line in lines[MOST_ROWS:] if line.kind == "parent")]
    columns = _fitting(_columns(shown), console.width)
    console.print(_table(columns, console.width))
    if len(shown) < len(lines):
        console.print(f"… and {len(lines) - len(shown)} more points", highlight=False)
    if any(line.perplexity for line in lines):
        console.print(_perplexity_table(shown))
    console.print(_footnote(lines, result), highlight=False, style="dim")


def print_sentence(sentence: str, why: Sequence[str] = ()) -> None:
    """Words after the table, broken where the terminal ends; the reasons after them."""
    from rich.console import Console

    console = Console()
    console.print(f"\n{sentence}", highlight=False, markup=False)
    if why:
        console.print(f"\nWhy: {' '.join(why)}", highlight=False, markup=False, style="dim")


@dataclass(frozen=True, slots=True)
class _Column:
    """A column of the terminal's table; of those that do not fit, the one with the highest `spare` goes first."""

    title: str
    cells: tuple[str, ...]
    spare: int = 0
    left: bool = False

    @property
    def width(self) -> int:
        return max(map(len, (self.title, *self.cells))) + 2


def _columns(lines: Sequence[Line]) -> list[_Column]:
    lengths = sorted({length for line in lines for length in line.by_length})
    benchmarks = sorted({name for line in lines for name in line.by_benchmark}, reverse=True)
    beside = sorted({name for line in lines for name in line.beside})
    columns = [_Column("point", tuple(line.title for line in lines), left=True)]
    columns.append(_Column("score", tuple(map(_score, lines))))
    for name in benchmarks:
        cells = tuple(_rounded(line.by_benchmark.get(name)) for line in lines)
        columns.append(_Column(name, cells, spare=4))
    for length in lengths:
        inner = length not in (lengths[0], lengths[-1])
        cells = tuple(_rounded(line.by_length.get(length)) for line in lines)
        columns.append(_Column(short_length(length), cells, spare=3 if inner else 1))
    if any(line.effective is not None for line in lines):
        title = "effective" if all(line.as_published for line in lines) else "effective*"
        columns.append(_Column(title, tuple(effective(line.effective) for line in lines), spare=2))
        wavg = tuple("" if line.weighted is None else _rounded(line.weighted[0]) for line in lines)
        columns.append(_Column("wAvg", wavg, spare=4))
    for parent in dict.fromkeys(name for line in lines for name in line.relative):
        cells = tuple(effective(line.relative.get(parent)) for line in lines)
        columns.append(_Column(f"by {parent}", cells, spare=4))
    for name in guard_names(lines):
        columns.append(_Column(name, tuple(_guard(line, name) for line in lines), spare=1))
    for name in beside:
        columns.append(_Column(name, tuple(_rounded(line.beside.get(name)) for line in lines), spare=4))
    for name in dict.fromkeys(name for line in lines for name in line.generated):
        columns.append(_Column(name, tuple(_rounded(line.generated.get(name)) for line in lines), spare=3))
    if any(line.unanswered.count for line in lines):
        counts = [line.unanswered for line in lines]
        cells = tuple(f"{found.count}/{found.asked}" if found.count else "" for found in counts)
        columns.append(_Column("unanswered", cells, spare=1))
    columns.append(_Column("", tuple(line.note for line in lines), spare=5, left=True))
    return columns


def _fitting(columns: list[_Column], width: int) -> list[_Column]:
    """The columns that fit beside names of at most half the width."""
    names = min(columns[0].width, width // 2)
    while columns[-1].spare == 5 and names + sum(column.width for column in columns[1:-1]) + 12 > width:
        columns = columns[:-1]
    while names + sum(column.width for column in columns[1:] if column.spare < 5) > width:
        spare = max(columns[1:], key=lambda column: column.spare)
        if spare.spare == 0:
            break
        columns = [column for column in columns if column is not spare]
    return columns


def _table(columns: Sequence[_Column], width: int) -> Any:
    from rich.table import Table
    from rich.text import Text

    room = width - sum(column.width for column in columns[1:] if column.spare < 5)
    if columns[-1].spare == 5:
        room -= min(columns[-1].width, 12)
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for column in columns:
        justify = "left" if column.left else "right"
        least = None if column.left else column.width - 2  # where it is tight, notes are cut and never numbers
        table.add_column(column.title, no_wrap=True, justify=justify, overflow="ellipsis", min_width=least)
    names = shortened(columns[0].cells, max(8, room - 2))
    for name, *cells in zip(names, *(column.cells for column in columns[1:]), strict=True):
        table.add_row(Text(name), *map(Text, cells))
    return table


def _score(line: Line) -> str:
    return (
        f"{line.score:.1f} ±{min(100.0, line.half_width):.1f}"
        if math.isfinite(line.half_width)
        else f"{line.score:.1f}"
    )


def _guard(line: Line, name: str) -> str:
    found = next((guarded for guarded in line.guards if guarded.guard == name), None)
    return "" if found is None else f"{found.score:.1f}{GUARD_MARKS[found.outcome]}"


def _perplexity_table(lines: Sequence[Line]) -> Any:
    """Perplexity at the greatest length, by where in the context a token stands."""
    from rich.table import Table

    longest = max(length for line in lines for length in line.perplexity)
    positions = sorted({position for line in lines for position in line.perplexity.get(longest, {})})
    table = Table(box=None, padding=(0, 1), header_style="bold")
    table.add_column(f"perplexity at {short_length(longest)}", no_wrap=True)
    for position in positions:
        table.add_column(f"from {short_length(position)}", justify="right")
    for line in lines:
        values = line.perplexity.get(longest, {})
        table.add_row(line.title, *(f"{values[at]:.4g}" if at in values else "" for at in positions))
    return table


def _footnote(lines: Sequence[Line], result: EvaluationResult) -> str:
    of = benchmark_words(result.weights)
    notes = [f"score: mean over lengths, over {of}, and over their tasks, with its 95 % interval"]
    if result.search is not None:
        notes.append("points: in the order of the search's model, which draws scores of few items towards neighbours")
    if reach := context_note(result):
        notes.append(f"effective: longest length at which {reach} ≥ {RULER_THRESHOLD}")
    if warning := not_published(result):
        notes.append(f"* {warning}")
    if any(guarded.against for line in lines for guarded in line.guards):
        notes.append(f"guards: {GUARDS_LEGEND}")
    broken = Counter(row.point for row in result.common_rows() if not row.finite)
    if broken:  # said here as well: a narrow terminal has no room for the notes of the lines
        notes.append(
            "answers with NaN or infinite logits: " + ", ".join(f"{name} {n}" for name, n in broken.most_common(3))
        )
    lost = [(line.title, line.unanswered) for line in lines if line.unanswered.count]
    if lost:
        worst = sorted(lost, key=lambda entry: -entry[1].share)[:3]
        notes.append("unanswered: " + "; ".join(found.words(title) for title, found in worst))
    notes += [
        f"{label} is the parent {name}" for name, label in result.parents.items() if label not in result.baselines
    ]
    if result.race is not None:
        notes.append(f"the race cost {result.cost_share:.0%} of asking every point everything: {result.rule}")
    return "; ".join(notes)


def _rounded(score: float | None) -> str:
    return "" if score is None else f"{score:.0f}"
