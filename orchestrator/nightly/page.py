"""The page of a nightly job, index.html: the scores of candidate, blessed merge and anchor by night."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from orchestrator.nightly.book import Blessed, Night, reweighed
from orchestrator.nightly.words import headline
from orchestrator.report.html import render
from orchestrator.words import short_length

PAGE = "index.html"
MOST_NIGHTS = 60
"""The page shows this many of the latest nights: more than two months are unreadable in a chart on a phone."""


def nights_page(name: str, history: Sequence[Night], blessed: Blessed | None) -> str:
    """The page as one HTML file without references outside the job's folder; `history` must not be empty."""
    from orchestrator.nightly.chart import trend

    shown = history[-MOST_NIGHTS:]
    return render(
        Path(__file__).with_name("nights.html.jinja"),
        {"difference": _difference},
        name=name,
        headline=_sentence(shown[-1], blessed),
        nights=shown,
        older=len(history) - len(shown),
        reweighed={night.night for one, night in pairwise(history) if reweighed(one, night)},
        blessed=blessed,
        charts=[(_title(what), trend(shown, what, _lowest(shown))) for what in _scores_of(shown)],
    )


def _sentence(night: Night, blessed: Blessed | None) -> str:
    text = headline(night, blessed)
    return f"{text[0].upper()}{text[1:]}."


def _scores_of(nights: Sequence[Night]) -> list[str]:
    """The keys of the scores: overall, then every length, ascending."""
    found = {what for night in nights for what in night.scores["candidate"]} - {"overall"}
    return ["overall", *sorted(found, key=int)]


def _lowest(nights: Sequence[Night]) -> float:
    """The common lower end of all charts, so that they compare: a multiple of 10 below all scores, at most 90."""
    scores = [score for night in nights for of in night.scores.values() for score in of.values()]
    return min(90, 10 * math.floor(min(score.mean if score.low is None else score.low for score in scores) / 10))


def _title(what: str) -> str:
    return "All lengths alike" if what == "overall" else f"{short_length(int(what))} tokens"


def _difference(verdict: Mapping[str, Any]) -> str:
    """The difference of the overall score with its bounds, and the outcome unless it is a pass."""
    line = verdict["lines"][0]
    bounds = "" if line["low"] is None else f" ({line['low']:+.1f} to {line['high']:+.1f})"
    judged = "" if verdict["outcome"] == "pass" else f", {verdict['outcome']}"
    return f"{line['difference']:+.1f}{bounds}{judged}"
