"""A comparison on a terminal, however narrow: the differences, then the items that flipped, letter by letter."""

from __future__ import annotations

import math
import os
import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.report.scored_models import ScoredModel
from orchestrator.report.two_models import Comparison, Difference, Flip
from orchestrator.words import short_length

WHITE = {"\n": "↵", "\t": "⇥", "\r": "␍"}
HIDDEN = ("C", "Zl", "Zp")
"""Categories of characters that are not printed: controls, formats such as right-to-left marks, surrogates."""

LEAST_TASK = 6
"""Letters of a task's name that are shown at the least."""

LEGEND = {
    "95 %": "interval of this one difference",
    "p": (
        "McNemar's exact test, or whole haystacks' signs flipped; of all tasks Student's; that of losses too rare to be"
        " seen where they could explain the difference; after Holm over the lines of its kind"
    ),
    "MDE": "the difference that so many items show 8 times in 10",
}


def print_comparison(comparison: Comparison, most_flips: int) -> None:
    """Everything but the JSON."""
    from rich.console import Console
    from rich.text import Text

    columns = _columns(comparison)
    console = Console()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(width=max(80, _width(columns)))  # a pipe has no width that a column had to be left out for

    def line(text: str, style: str = "") -> None:
        console.print(Text(text, style), no_wrap=True, overflow="ellipsis", crop=True)

    a, b = _labels(comparison)
    line(f"A  {a}")
    line(f"B  {b}")
    console.print(Text(f"{_finding(comparison)}\n"), soft_wrap=False)
    shown = _fitting(columns, console.width)
    _print_table(console, shown)
    for note in _notes(comparison, shown):
        console.print(Text(note, "dim"))
    console.print(Text(f"\n{_flip_count(comparison)}"))
    for flip in comparison.flips[:most_flips]:
        line(_flip_title(flip), "bold")
        for name, text in _flip_answers(flip):
            line(f"  {name:<8}  {text}")


# ---- who, and in one sentence


def _labels(comparison: Comparison) -> list[str]:
    """The models' names, with their run's where the runs are two."""
    both = (comparison.a, comparison.b)
    alone = comparison.a.run == comparison.b.run
    return [visible(model.name if alone else f"{model.run}/{model.name}") for model in both]


def _finding(comparison: Comparison) -> str:
    overall = comparison.overall
    found = f"B − A: {overall.difference:+.2f} points {_bounds(overall, 2)}, p {_p(overall.p)}"
    same = "; the same weights, so this is noise" if comparison.a.weights == comparison.b.weights else ""
    items = f" on {overall.items} items in {overall.haystacks} haystacks"
    if overall.p <= 0.05:
        return f"{found}{items}: B is {'better' if overall.difference > 0 else 'worse'}{same}"
    if math.isinf(overall.detectable):
        return f"{found}{items}: one haystack shows no spread; evaluate more items{same}"
    return f"{found}{items}: no difference shown; {overall.detectable:.1f} points or more would have been{same}"


def _bounds(line: Difference, digits: int = 1) -> str:
    return f"({line.low:+.{digits}f} to {line.high:+.{digits}f})"


def _p(p: float) -> str:
    return "<0.001" if p < 0.001 else f"{p:.3f}"


# ---- the table


@dataclass(frozen=True, slots=True)
class _Column:
    """Where there is no room, the column with the lowest `keep` is left out first; one with None never is."""

    title: str
    cells: Sequence[str]
    keep: int | None

    @property
    def width(self) -> int:
        from rich.cells import cell_len

        return max(cell_len(text) for text in (self.title, *self.cells))


def _columns(comparison: Comparison) -> list[_Column]:
    lines = [*comparison.cells, *comparison.lengths, comparison.overall]

    def column(title: str, text: Callable[[Difference], str], keep: int | None = None) -> _Column:
        return _Column(title, [text(line) for line in lines], keep)

    return [
        column("task", _task),
        column("length", lambda line: "" if not line.length else short_length(line.length)),
        column("n", lambda line: str(line.items), 2),
        column("A", lambda line: f"{line.a:.1f}", 4),
        column("B", lambda line: f"{line.b:.1f}", 5),
        column("B − A", lambda line: f"{line.difference:+.1f}"),
        column("95 %", lambda line: _bounds(line)),
        column("p", lambda line: _p(line.p_holm), 1),
        column("MDE", lambda line: "" if math.isinf(line.detectable) else f"{line.detectable:.1f}", 0),
    ]


def _task(line: Difference) -> str:
    if line.task is not None:
        return visible(line.task)
    return "all" if line.length is None else "all tasks"


def _width(columns: Sequence[_Column]) -> int:
    return sum(column.width + 1 for column in columns) - 1


def _fitting(columns: Sequence[_Column], width: int) -> list[_Column]:
    """The columns that there is room for, names of tasks cut at the last."""
    from rich.cells import cell_len, set_cell_size

    kept = list(columns)
    while _width(kept) > width and any(column.keep is not None for column in kept):
        kept.remove(min((column for column in kept if column.keep is not None), key=lambda column: column.keep or 0))
    room = max(LEAST_TASK, width - _width(kept[1:]) - 1)
    tasks = [name if cell_len(name) <= room else f"{set_cell_size(name, room - 1)}…" for name in kept[0].cells]
    return [replace(kept[0], cells=tasks), *kept[1:]]


def _print_table(console: Any, columns: Sequence[_Column]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.title, no_wrap=True, justify="right" if column is not columns[0] else "left")
    for row in zip(*(column.cells for column in columns), strict=True):
        table.add_row(*(Text(text) for text in row))
    console.print(table)


def _notes(comparison: Comparison, columns: Sequence[_Column]) -> list[str]:
    notes = ["; ".join(f"{column.title}: {LEGEND[column.title]}" for column in columns if column.title in LEGEND)]
    notes += _perplexity(comparison)
    models = {model.run: model for model in (comparison.a, comparison.b)}
    return [*notes, *(_noise(model, alone=len(models) == 1) for model in models.values() if model.noise is not None)]


def _perplexity(comparison: Comparison) -> list[str]:
    """A line a length: A's and B's perplexity, by the first position of a block."""
    return [
        f"perplexity at {short_length(length)}: "
        + ", ".join(f"{a:.4g} and {b:.4g} from {short_length(at)}" for at, (a, b) in blocks.items())
        for length, blocks in comparison.perplexity.items()
    ]


def _noise(model: ScoredModel, *, alone: bool) -> str:
    assert model.noise is not None
    where = "" if alone else f"{visible(model.run)}: "
    return f"{where}{model.noise.words}"


# ---- flips


def _flip_count(comparison: Comparison) -> str:
    lost = sum(flip.score_b < flip.score_a for flip in comparison.flips)
    asked = sum(line.items for line in comparison.cells)
    return (
        f"{len(comparison.flips)} of {asked} answers differ in score: {lost} lost, {len(comparison.flips) - lost} won"
    )


def _flip_title(flip: Flip) -> str:
    at = f" at {short_length(flip.length)}" if flip.length else ""
    depth = "" if flip.depth is None else f", depth {flip.depth:.0%}"
    return f"{visible(flip.task)}{at}, item {flip.item}{depth}: {100 * flip.score_a:.0f} → {100 * flip.score_b:.0f}"


def _flip_answers(flip: Flip) -> list[tuple[str, str]]:
    expected = [] if flip.expected is None else [("expected", " | ".join(visible(text) for text in flip.expected))]
    return [*expected, ("A", visible(flip.answer_a) or "∅"), ("B", visible(flip.answer_b) or "∅")]


def visible(text: str) -> str:
    """The text on one line with its white space seen, and nothing in it that a terminal would obey."""
    edges = re.sub(r"^ +| +$| {2,}", lambda spaces: "·" * len(spaces[0]), text)
    return "".join(WHITE.get(letter) or _plain(letter) for letter in edges)


def _plain(letter: str) -> str:
    if not unicodedata.category(letter).startswith(HIDDEN):
        return letter
    return letter.encode("unicode_escape").decode("ascii")
