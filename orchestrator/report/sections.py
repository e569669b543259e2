"""The sections of the page as data: headings, words, charts and their numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.report import axes, figures


@dataclass(frozen=True, slots=True)
class Table:
    """The numbers of a chart, for those who cannot see it or want them."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str | Number, ...], ...]


@dataclass(frozen=True, slots=True)
class Number:
    """A number of a table, and the answers behind it as the arguments of `address`."""

    text: str
    answers: Mapping[str, Any]

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True, slots=True)
class Choice:
    """Charts that are shown together when this is chosen."""

    name: str
    charts: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, words, charts and their numbers. With several `choices`, one is shown at a time."""

    id: str
    title: str
    words: str
    legend: tuple[Any, ...]
    choosing: str
    choices: tuple[Choice, ...]
    tables: tuple[Table, ...]

    @property
    def half(self) -> bool:
        """Whether another may stand beside it: one chart at a time."""
        return all(len(choice.charts) == 1 for choice in self.choices) and len(self.legend) < 2


def importance_section(importance: Sequence[axes.Importance], words: str) -> Section:
    """The share of each axis with its interval."""
    from orchestrator.report import charts

    return Section(
        "importance",
        "Which axis matters",
        words,
        (),
        "",
        (Choice("", (charts.importances(importance),)),),
        (
            Table(
                "",
                ("axis", "share (%)", "95 % interval"),
                tuple(
                    (
                        one.axis,
                        "within noise" if math.isnan(one.share) else f"{100 * one.share:.0f}",
                        f"{100 * one.low:.0f} to {100 * one.high:.0f}",
                    )
                    for one in importance
                ),
            ),
        ),
    )


def bounds(values: Sequence[float], at_most: float = 100) -> tuple[float, float]:
    """Round limits of a scale, at least ten points apart."""
    low, high = 10 * math.floor(min(values) / 10), 10 * math.ceil(max(values) / 10)
    return (low, high) if high > low else (low, low + 10) if high < at_most else (high - 10, high)


def table_of(shown: figures.Map) -> Table:
    """The numbers of a map."""
    return Table(
        shown.title,
        (shown.row_title, *shown.columns),
        tuple(
            (name, *(_told(shown.tiles.get((row, column))) for column in range(len(shown.columns))))
            for row, name in enumerate(shown.rows)
        ),
    )


def _told(tile: figures.MapTile | None) -> str | Number:
    if tile is None:
        return ""
    return Number(f"{tile.value:.1f}{' (not sure)' if tile.sure is False else ''}", tile.answers)
