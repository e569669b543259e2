"""The page of a nightly job: index.html, how its candidate, the blessed merge and the anchor scored night by night."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.nightly.book import Blessed, Night
from orchestrator.nightly.words import headline
from orchestrator.report.html import render
from orchestrator.words import short_length

PAGE = "index.html"
MOST_NIGHTS = 60
"""Nights that are shown, the last of them: two months are as much as a chart on a phone can tell apart."""


def nights_page(name: str, history: Sequence[Night], blessed: Blessed | None) -> str:
    """The page as one HTML file that refers to nothing outside the job's folder; needs at least one night."""
    from orchestrator.nightly.chart import trend

    shown = history[-MOST_NIGHTS:]
    return render(
        Path(__file__).with_name("nights.html.jinja"),
        {"difference": _difference},
        name=name,
        headline=_sentence(shown[-1], blessed),
        nights=shown,
        older=len(history) - len(shown),
        blessed=blessed,
        charts=[(_title(what), trend(shown, what, _lowest(shown))) for what in _scores_of(shown)],
    )


def _sentence(night: Night, blessed: Blessed | None) -> str:
    text = headline(night, blessed)
    return f"{text[0].upper()}{text[1:]}."


def _scores_of(nights: Sequence[Night]) -> list[str]:
    """The scored parts: overall, then every length, short ones first."""
    found = {what for night in nights for what in night.scores["candidate"]} - {"overall"}
    return ["overall", *sorted(found, key=int)]


def _lowest(nights: Sequence[Night]) -> float:
    """Where all charts begin, so that they can be compared: a round number below everything, 90 at most."""
    scores = [score for night in nights for of in night.scores.values() for score in of.values()]
    return min(90, 10 * math.floor(min(score.mean if score.low is None else score.low for score in scores) / 10))


def _title(what: str) -> str:
    return "All lengths alike" if what == "overall" else f"{short_length(int(what))} tokens"


def _difference(verdict: Mapping[str, Any]) -> str:
    """The difference of the whole score with its bounds, and the outcome if it is not a pass."""
    line = verdict["lines"][0]
    bounds = "" if line["low"] is None else f" ({line['low']:+.1f} to {line['high']:+.1f})"
    judged = "" if verdict["outcome"] == "pass" else f", {verdict['outcome']}"
    return f"{line['difference']:+.1f}{bounds}{judged}"
