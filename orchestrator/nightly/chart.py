"""The scores of many nights as one chart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from markupsafe import Markup
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from orchestrator.judging.gate import Outcome
from orchestrator.nightly.book import Night, Score, reweighed
from orchestrator.report.charts import DASHES, OKABE_ITO, new_figure, svg_of

OUTCOME_MARKS: Mapping[Outcome, tuple[str, str, str]] = {
    "pass": ("o", OKABE_ITO[0], OKABE_ITO[0]),
    "fail": ("X", OKABE_ITO[1], OKABE_ITO[1]),
    "inconclusive": ("o", "none", OKABE_ITO[0]),
}
"""Marker, face and edge of a night's candidate."""

WEIGHTS_LINE: Mapping[str, Any] = {"color": "#808080", "linestyle": ":", "linewidth": 1.2}


def trend(nights: Sequence[Night], what: str, low: float) -> Markup:
    """A chart of candidate, blessed merge and anchor by night, with 95 % intervals: overall, or at one length.

    The y axis runs from `low` to 100. The marker of a candidate shows the night's verdict. A line stands between two
    nights whose scores weigh benchmarks otherwise.
    """
    told = [night for night in nights if what in night.scores["candidate"]]
    with new_figure(190, 44, 10, 92) as (figure, axes):
        for who, colour, dash, shift in (("anchor", 2, DASHES[2], 0.14), ("blessed", 4, DASHES[1], -0.14)):
            found = [(night.number + shift, night.scores[who][what]) for night in told if who in night.scores]
            if found:
                _scores(axes, found, OKABE_ITO[colour])
                places = [place for place, _ in found]
                axes.plot(
                    places, [score.mean for _, score in found], color=OKABE_ITO[colour], linestyle=dash, linewidth=1.6
                )
        _scores(axes, [(night.number, night.scores["candidate"][what]) for night in told], OKABE_ITO[0])
        for outcome, (marker, face, edge) in OUTCOME_MARKS.items():
            of = [night for night in told if night.outcome == outcome]
            axes.scatter(
                [night.number for night in of],
                [night.scores["candidate"][what].mean for night in of],
                s=46 if outcome == "fail" else 30,
                marker=marker,
                facecolors=face,
                edgecolors=edge,
                linewidths=1.6,
                zorder=5,
                gid=f"nights-{outcome}",
            )
        changes = [night.number - 0.5 for one, night in pairwise(nights) if reweighed(one, night)]
        for place in changes:
            axes.axvline(place, **WEIGHTS_LINE)
        axes.set(xlabel="night", ylabel="score")
        axes.xaxis.set_major_locator(ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
        axes.grid(axis="y", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.set(xlim=(nights[0].number - 0.6, nights[-1].number + 0.6), ylim=(low - 1, 102))
        figure.legend(
            handles=_trend_legend(weights=bool(changes)),
            loc="lower left",
            ncols=2,
            borderaxespad=0.2,
            labelspacing=0.35,
        )
        texts = [
            f"night {night.night}: {night.outcome}, {night.scores['candidate'][what].mean:.1f}"
            for outcome in OUTCOME_MARKS
            for night in told
            if night.outcome == outcome
        ]
        return svg_of(figure, "nights-", texts, f"scores by night, {what}; {'; '.join(texts)}")


def _scores(axes: Axes, found: Sequence[tuple[float, Score]], colour: str) -> None:
    """Draws the intervals of the scores."""
    sure = [(place, score.low, score.high) for place, score in found if score.low is not None]
    places, lows, highs = zip(*sure, strict=True) if sure else ((), (), ())
    axes.vlines(places, lows, highs, color=colour, linewidth=1.2, alpha=0.7)


def _trend_legend(*, weights: bool) -> list[Line2D]:
    meanings = {
        "pass": "candidate: passed",
        "fail": "candidate: failed",
        "inconclusive": "candidate: no verdict",
    }
    handles = [
        Line2D([], [], linestyle="", marker=marker, color=edge, markerfacecolor=face, label=meanings[outcome])
        for outcome, (marker, face, edge) in OUTCOME_MARKS.items()
    ]
    return [
        *handles,
        Line2D([], [], linestyle=DASHES[1], color=OKABE_ITO[4], label="blessed merge"),
        Line2D([], [], linestyle=DASHES[2], color=OKABE_ITO[2], label="anchor"),
        *([Line2D([], [], **WEIGHTS_LINE, label="other weights from here")] if weights else []),
    ]
