"""Numbers as SVG for a page: text stays text, colours of lines and words follow the page, nothing is referred to.

Colours are cividis, PuOr and those of Okabe and Ito (2008), which people with any kind of colour vision tell apart;
lines differ by marker and dash too. A chart is as wide as a phone; on wider screens several stand side by side.
"""

from __future__ import annotations

import io
import itertools
import logging
import math
import re
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal
from xml.etree import ElementTree

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PolyCollection
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from orchestrator.report.axes import Importance, Profile, Surface
from orchestrator.report.figures import Curve, Map, Metric, StageCost, axis_values_are_numbers, value_word
from orchestrator.viewing.address import address
from orchestrator.words import short_length, shortened

WIDTH = 420
"""Pixels; a chart is never drawn wider, and shrinks a little on a narrow phone."""

INK, RULE, PAPER = "#010203", "#040506", "#070809"
"""Stand in for colours of the page while matplotlib draws."""

PAGE_COLOURS = {INK: "currentColor", RULE: "var(--rule)", PAPER: "var(--paper)"}

LETTER = 7.2
"""Pixels that a letter of a label takes, about."""

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C00", "#7F7F7F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1.5, 1)), (0, (4, 1, 1, 1)), "-", "-", "-", "-")

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 12,
    "axes.titlesize": 12,
    "axes.labelsize": 12,
    "text.color": INK,
    "text.parse_math": False,  # a name may hold any number of $
    "axes.labelcolor": INK,
    "axes.edgecolor": RULE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "grid.color": RULE,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 11.5,
    "ytick.labelsize": 11.5,
    "hatch.linewidth": 0.9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 11.5,
}

OVER = "over"
"""The id of what lies on tiles: their tooltips and links are reached through it."""

MOST_NUMBERED = 240
"""Cells of a map that have their number written into them."""

logging.getLogger("matplotlib").setLevel(logging.ERROR)

HIGHEST_MAP = 520
"""Pixels of a map: one of many rows has thin ones, whose numbers are in its table and tooltips."""

Scale = Literal["score", "difference"]


def _cut(name: str, low: float, high: float) -> Colormap:
    return LinearSegmentedColormap.from_list(name, matplotlib.colormaps[name](np.linspace(low, high, 256)))


SCALES: Mapping[Scale, Colormap] = {"score": _cut("cividis", 0.08, 1.0), "difference": _cut("PuOr", 0.08, 0.92)}


# ---- one chart -------------------------------------------------------------------------------------------------------


def heatmap(shown: Map, low: float, high: float, *, scale: Scale = "score", view: str = "") -> Markup:
    """A map with one rectangle a tile, hatched where its difference is not sure; the tile's text is its tooltip.

    A tile leads to its answers where there is a page of them (`view`).
    """
    rows, columns = shortened(shown.rows, 26), shortened(shown.columns, 16)
    left = 24 + LETTER * max(map(len, rows))
    wide = max(map(len, columns)) * LETTER > (WIDTH - left - 12) / len(columns) - 4
    bottom = 26 + (0.72 * LETTER * max(map(len, columns)) + 10 if wide else 16)
    row_height = max(4.0, min(26.0, HIGHEST_MAP / len(rows)))
    line = 0.6 if row_height > 10 else 0.0  # between thin rows it would be most of the map
    with new_figure(len(rows) * row_height, left, 28 if shown.title else 8, bottom) as (figure, axes):
        colours, places = SCALES[scale], list(shown.tiles)
        norm = Normalize(low, high)
        values = np.array([shown.tiles[place].value for place in places])
        corners = [[(x, y), (x + 1, y), (x + 1, y + 1), (x, y + 1)] for y, x in places]
        axes.add_collection(
            PolyCollection(corners, facecolors=colours(norm(values)), edgecolors=PAPER, linewidths=line, gid="tiles")
        )
        dark = _luminance(colours(norm(values))) < 0.47
        for is_dark, ink in ((True, "#ffffff"), (False, "#000000")):
            unsure = [
                corner
                for corner, place, of in zip(corners, places, dark, strict=True)
                if shown.tiles[place].sure is False and bool(of) is is_dark
            ]
            axes.add_collection(
                PolyCollection(
                    unsure, facecolors="none", edgecolors=ink, linewidths=0, hatch="//", alpha=0.55, gid=OVER
                )
            )
        if len(places) <= MOST_NUMBERED and row_height >= 14:
            for (y, x), value, of in zip(places, values.tolist(), dark.tolist(), strict=True):
                text = f"{value:.0f}" if scale == "score" else f"{value:+.0f}"
                ink = "#fff" if of else "#000"
                axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=11.5, color=ink, gid=OVER)
        axes.set(xlim=(0, len(columns)), ylim=(len(rows), 0), xlabel=shown.column_title, ylabel=shown.row_title)
        turned: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if wide else {}
        axes.set_xticks(np.arange(len(columns)) + 0.5, columns, **turned)
        every = math.ceil(13 / row_height)
        axes.set_yticks(np.arange(0, len(rows), every) + 0.5, rows[::every])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_title(shown.title, loc="left")
        tiles = [shown.tiles[place] for place in places]
        links = [view + address(**tile.answers) if view and tile.answers else "" for tile in tiles]
        return svg_of(figure, "tiles", [tile.text for tile in tiles], _described(shown), links)


def colour_bar(low: float, high: float, title: str, *, scale: Scale = "score") -> Markup:
    """The legend of a map's colours."""
    with new_figure(10, 14, 4, 38, width=260) as (figure, axes):
        edges = np.linspace(low, high, 49)  # rectangles: an image would be a picture in a page that holds none
        axes.bar(edges[:-1], 1, np.diff(edges) * 1.8, align="edge", color=SCALES[scale](np.linspace(0, 1, 48)))
        axes.set(yticks=[], xlim=(low, high), ylim=(0, 1), xlabel=title)
        axes.spines[:].set_visible(False)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        return svg_of(figure, "", [], f"colours from {low:g} to {high:g} {title}")


def curves(found: Sequence[Curve], x_title: str, y_title: str, *, threshold: float | None = None) -> Markup:
    """Lines over a doubling axis with 95 % intervals; a ring marks an effective length."""
    with new_figure(240, 54, 10, 54 + 16 * len(found)) as (figure, axes):
        spread = np.linspace(-1, 1, len(found)) * 0.02 if len(found) > 1 else [0.0]
        texts: list[str] = []
        names = shortened([curve.name for curve in found], 40)
        for number, (curve, shift) in enumerate(zip(found, spread, strict=True)):
            colour = OKABE_ITO[number % len(OKABE_ITO)]
            x = np.array(curve.x) * 2 ** float(shift) if curve.low else np.array(curve.x)
            axes.plot(
                x,
                curve.y,
                color=colour,
                linestyle=DASHES[number % len(DASHES)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                linewidth=1.6,
                label=names[number] + (" (parent)" if curve.parent else ""),
            )
            if curve.low:
                axes.vlines(x, curve.low, curve.high, color=colour, linewidth=1.2, alpha=0.8)
            if curve.mark is not None:
                at = curve.x.index(curve.mark)
                axes.plot(
                    x[at], curve.y[at], "o", markersize=13, markerfacecolor="none", markeredgecolor=colour, zorder=5
                )
            texts.append(f"{curve.name}: {', '.join(f'{y:.1f}' for y in curve.y)}")
        if threshold is not None:
            axes.axhline(threshold, color=INK, linewidth=0.8, linestyle=(0, (2, 3)))
        _doubling(axes, sorted({x for curve in found for x in curve.x}))
        axes.set(xlabel=x_title, ylabel=y_title)
        axes.grid(axis="y", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.margins(y=0.06)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="lower left", ncols=1, borderaxespad=0.2, labelspacing=0.35
        )
        return svg_of(figure, "", [], f"{y_title} by {x_title}. {'; '.join(texts)}")


def pareto(x: Metric, y: Metric, front: Sequence[str], noted: Mapping[str, str]) -> Markup:
    """Every point by two metrics, the front joined; `noted` marks a point as a parent, or as one that left the race."""
    names = [name for name in x.values if name in y.values]
    with new_figure(280, 58, 12, 80) as (figure, axes):
        shape = {"parent": ("s", OKABE_ITO[1], OKABE_ITO[1]), "left": ("o", "none", OKABE_ITO[7])}
        texts: list[str] = []
        for kind in ("", "left", "parent"):
            members = [name for name in names if noted.get(name, "") == kind]
            marker, face, edge = shape.get(kind, ("o", OKABE_ITO[0], OKABE_ITO[0]))
            axes.scatter(
                [x.values[name] for name in members],
                [y.values[name] for name in members],
                s=34,
                marker=marker,
                facecolors=face,
                edgecolors=edge,
                gid=f"dots-{kind}",
            )
            texts += [f"{name}: {x.name} {x.values[name]:.1f}, {y.name} {y.values[name]:.1f}" for name in members]
        axes.plot(
            [x.values[name] for name in front],
            [y.values[name] for name in front],
            color=INK,
            linewidth=1,
            linestyle=(0, (3, 2)),
        )
        axes.set(xlabel=_better(x), ylabel=_better(y))
        if not x.more_is_better:
            axes.invert_xaxis()
        if not y.more_is_better:
            axes.invert_yaxis()
        axes.grid(linewidth=0.5)
        axes.set_axisbelow(True)
        axes.margins(0.08)
        _name_front(axes, x, y, front)
        marks = {
            "": Line2D([], [], linestyle="", marker="o", color=OKABE_ITO[0], label="point"),
            "left": Line2D(
                [], [], linestyle="", marker="o", markerfacecolor="none", color=OKABE_ITO[7], label="left early"
            ),
            "parent": Line2D([], [], linestyle="", marker="s", color=OKABE_ITO[1], label="parent"),
        }
        handles = [mark for kind, mark in marks.items() if kind in {noted.get(name, "") for name in names}]
        handles.append(Line2D([], [], linestyle=(0, (3, 2)), color=INK, label="front"))
        figure.legend(
            handles=handles,
            loc="lower left",
            ncols=4,
            columnspacing=0.8,
            handletextpad=0.2,
            handlelength=1.4,
            borderaxespad=0.2,
        )
        return svg_of(figure, "dots-", texts, f"{y.name} against {x.name}; on the front: {', '.join(front)}")


def profile(axis: str, lines: Sequence[Profile]) -> Markup:
    """Scores along one axis; numbers stand at their distances, words at equal ones."""
    words = [*dict.fromkeys(value for line in lines for value in line.values)]
    numbers = axis_values_are_numbers(words)
    with new_figure(190, 54, 10, 50 + 16 * sum(bool(line.name) for line in lines)) as (figure, axes):
        texts: list[str] = []
        for number, line in enumerate(lines):
            colour = OKABE_ITO[number]
            x = [float(value) if numbers else float(words.index(value)) for value in line.values]
            style = DASHES[number] if numbers else ""
            axes.errorbar(
                x,
                line.scores,
                yerr=line.half,
                color=colour,
                linestyle=style,
                marker=MARKERS[number],
                markersize=5,
                linewidth=1.6,
                elinewidth=1.2,
                label=line.name,
            )
            told = zip(line.values, line.scores, strict=True)
            texts.append(f"{line.name} {', '.join(f'{value_word(value)}: {score:.1f}' for value, score in told)}")
        if not numbers:
            axes.set_xticks(range(len(words)), shortened([value_word(value) for value in words], 14))
            axes.margins(x=0.15)
        axes.set(xlabel=axis, ylabel="score")
        axes.grid(axis="y", linewidth=0.5)
        axes.set_axisbelow(True)
        if any(line.name for line in lines):
            figure.legend(loc="lower left", ncols=1, borderaxespad=0.2, labelspacing=0.35)
        return svg_of(figure, "", [], f"score by {axis}. {'; '.join(texts)}")


@dataclass(frozen=True, slots=True)
class Dot:
    """A measured value at a place of a chart, half of its 95 % interval (0 draws none), and its tooltip."""

    x: str
    y: float
    half: float
    text: str


def banded(
    x: Sequence[str], y: Sequence[float], half: Sequence[float], dots: Sequence[Dot], x_title: str, y_title: str
) -> Markup:
    """A line with its 95 % band, and measured dots; numbers stand at their distances, words at equal ones."""
    where = places([*x, *(dot.x for dot in dots)])
    with new_figure(200, 54, 10, 66 if dots else 50) as (figure, axes):
        at, middle, wide = [where[word] for word in x], np.array(y), np.array(half)
        if wide.any():
            axes.fill_between(at, middle - wide, middle + wide, color=OKABE_ITO[0], alpha=0.22, linewidth=0)
        axes.plot(at, y, color=OKABE_ITO[0], linewidth=1.6, marker="" if len(x) > 24 else "o", markersize=4)
        across = [where[dot.x] for dot in dots]
        axes.vlines(
            across,
            [dot.y - dot.half for dot in dots],
            [dot.y + dot.half for dot in dots],
            color=OKABE_ITO[1],
            linewidth=0.9,
            alpha=0.7,
        )
        axes.scatter(across, [dot.y for dot in dots], s=20, marker="s", color=OKABE_ITO[1], gid="dots-", zorder=3)
        if not all(map(_is_number, where)):
            axes.set_xticks(range(len(where)), shortened([*where], 14))
            axes.margins(x=0.15)
        axes.set(xlabel=x_title, ylabel=y_title)
        axes.grid(axis="y", linewidth=0.5)
        axes.set_axisbelow(True)
        if not wide.any():
            axes.set_ylim(bottom=0)
        if dots:
            handles = [
                Line2D([], [], color=OKABE_ITO[0], label="by the model, 95 %"),
                Line2D([], [], linestyle="", marker="s", color=OKABE_ITO[1], label="by its own items"),
            ]
            figure.legend(handles=handles, loc="lower left", ncols=2, borderaxespad=0.2)
        told = f"{y_title} by {x_title}, from {min(y):.1f} to {max(y):.1f}; the table below has the numbers"
        return svg_of(figure, "dots-", [dot.text for dot in dots], told)


def _is_number(word: str) -> bool:
    try:
        return math.isfinite(Fraction(word))
    except (ValueError, ZeroDivisionError):
        return False


def places(words: Sequence[str]) -> dict[str, float]:
    """Where each word stands: at its number, or at its index if one of them is no number."""
    distinct = [*dict.fromkeys(words)]
    if all(map(_is_number, distinct)):
        return {word: float(Fraction(word)) for word in distinct}
    return {word: float(index) for index, word in enumerate(distinct)}


def importances(found: Sequence[Importance]) -> Markup:
    """The share of each axis with its interval; no dot where the share is within noise."""
    labels = shortened([one.axis for one in found], 24)
    with new_figure(26 * len(found), 24 + LETTER * max(map(len, labels)), 8, 46) as (figure, axes):
        for row, one in enumerate(found):
            axes.plot([100 * one.low, 100 * one.high], [row, row], color=OKABE_ITO[0], linewidth=2)
            axes.plot(100 * one.share, row, "o", color=OKABE_ITO[0], markersize=7)
        axes.set_yticks(range(len(found)), labels)
        axes.set(xlim=(-2, 102), ylim=(len(found) - 0.5, -0.5), xlabel="share of the variance (%)")
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.5)
        axes.set_axisbelow(True)
        told = "; ".join(f"{one.axis}: {100 * one.low:.0f} to {100 * one.high:.0f} %" for one in found)
        return svg_of(figure, "", [], f"share of the variance: {told}")


def parallel(shown: Surface, low: float, high: float) -> Markup:
    """One line per point over all axes and the score, the best on top; the ten best are drawn strongly."""
    axes_shown = (*shown.axes, "score")
    heights = shown.at / np.maximum(1, [len(values) - 1 for values in shown.values])
    scores = (shown.scores - low) / (high - low)
    order = np.argsort(shown.scores, kind="stable")
    with new_figure(260, 40, 18, 52) as (figure, axes):
        colours = SCALES["score"](scores)
        texts: list[str] = []
        for rank, point in enumerate(order.tolist()):
            strong = rank >= len(order) - 10
            axes.plot(
                range(len(axes_shown)),
                [*heights[point], scores[point]],
                color=colours[point],
                linewidth=1.8 if strong else 0.7,
                alpha=1.0 if strong else 0.35,
                gid=f"lines-{rank}",
            )
            texts.append(f"{shown.names[point]}: {shown.scores[point]:.1f}")
        for number, values in enumerate(shown.values):
            axes.text(number, 1.04, shortened([value_word(values[-1])], 12)[0], ha="center", fontsize=11)
            axes.text(number, -0.09, shortened([value_word(values[0])], 12)[0], ha="center", fontsize=11)
        axes.text(len(shown.values), 1.04, f"{high:g}", ha="center", fontsize=11)
        axes.text(len(shown.values), -0.09, f"{low:g}", ha="center", fontsize=11)
        axes.vlines(range(len(axes_shown)), 0, 1, color=INK, linewidth=0.8)
        axes.set(xlim=(-0.2, len(axes_shown) - 0.8), ylim=(-0.02, 1.02), yticks=[])
        axes.set_xticks(range(len(axes_shown)), shortened(axes_shown, 14))
        axes.tick_params(length=0, pad=26)
        axes.spines[:].set_visible(False)
        return svg_of(figure, "lines-", texts, f"{len(order)} points by {', '.join(axes_shown)}")


def bars(costs: Sequence[StageCost]) -> Markup:
    """Seconds of work by stage."""
    labels = shortened([cost.what for cost in costs], 24)
    with new_figure(22 * len(costs), 14 + LETTER * max(map(len, labels)), 8, 46) as (figure, axes):
        axes.barh(range(len(costs)), [cost.seconds for cost in costs], color=OKABE_ITO[0], height=0.7)
        axes.set_yticks(range(len(costs)), labels)
        axes.invert_yaxis()
        axes.set(xlabel="seconds of work, all workers together", xlim=(0, None))
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", linewidth=0.5)
        axes.set_axisbelow(True)
        axes.xaxis.set_major_locator(ticker.MaxNLocator(5))
        return svg_of(
            figure, "", [], f"seconds of work: {'; '.join(f'{cost.what}: {cost.seconds:.1f}' for cost in costs)}"
        )


def _better(metric: Metric) -> str:
    return f"{metric.name} ({'more' if metric.more_is_better else 'less'} is better)"


def _name_front(axes: Axes, x: Metric, y: Metric, front: Sequence[str]) -> None:
    """Names beside the first, the last and at most two more points of the front: more would lie on each other."""
    chosen = front if len(front) <= 4 else [front[index * (len(front) - 1) // 3] for index in range(4)]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    placed: list[float] = []
    names = list(dict.fromkeys(chosen))
    for name, label in zip(names, shortened(names, 26), strict=True):
        across, up = (x.values[name] - left) / (right - left), (y.values[name] - low) / (high - low)
        if any(abs(up - other) < 0.06 for other in placed):
            continue
        placed.append(up)
        axes.annotate(
            label,
            (x.values[name], y.values[name]),
            xytext=(0, 7),  # no dot is better in both, so that most of them lie below
            textcoords="offset points",
            ha="right" if across > 0.5 else "left",
            fontsize=11.5,
        )


def _doubling(axes: Axes, places: Sequence[float]) -> None:
    """Lengths stand at equal distances where each is twice the one before; a length of 0 has a place too."""
    if places[0] > 0:
        axes.set_xscale("log", base=2)
    else:
        axes.set_xscale("symlog", base=2, linthresh=places[1] if len(places) > 1 else 1)
    axes.xaxis.set_minor_locator(ticker.NullLocator())
    axes.set_xticks(places, [short_length(int(place)) for place in places])


def _luminance(colours: Any) -> Any:
    return np.atleast_2d(colours)[:, :3] @ np.array([0.2126, 0.7152, 0.0722])


def _described(shown: Map) -> str:
    values = [tile.value for tile in shown.tiles.values()]
    around = f"from {min(values):.1f} to {max(values):.1f}" if values else "empty"
    return f"Heatmap {shown.title} of {shown.row_title} by {shown.column_title}, {around}; the table below has it all."


# ---- matplotlib to SVG -----------------------------------------------------------------------------------------------

_salts: Callable[[], int] = itertools.count().__next__


@contextmanager
def new_figure(
    height: float, left: float, top: float, bottom: float, width: int = WIDTH
) -> Generator[tuple[Figure, Axes]]:
    """A figure with one pair of axes, `height` tall between its margins; all of it in pixels."""
    total = height + top + bottom
    style: dict[Any, Any] = {**STYLE, "svg.hashsalt": f"chart{_salts()}"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width / 72, total / 72))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((left / width, bottom / total, (width - left - 12) / width, height / total))
        yield figure, axes


def svg_of(figure: Figure, group: str, texts: Sequence[str], label: str, links: Sequence[str] = ()) -> Markup:
    """The figure as an element for a page; the marks in groups whose id begins so get these tooltips, in order.

    They also get these links, where there are some; an empty one is none.
    """
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None})
    root = ElementTree.fromstring(sink.getvalue())
    waiting = zip(texts, links or itertools.repeat(""), strict=False)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
    for child in [child for child in root if child.tag == "metadata" or child.find("style") is not None]:
        root.remove(child)
    for element in root.iter():
        _plain(element)
        if texts and element.tag == "g" and (name := element.attrib.pop("id", "")):
            if name.startswith(group):
                _tell(element, waiting)
            elif name == OVER:
                element.attrib["pointer-events"] = "none"
        else:
            _drop_id(element)
    _shorten(root)
    width, height = root.attrib["viewBox"].split()[2:]
    root.attrib.update({"width": width, "height": height, "role": "img", "aria-label": label})
    root.attrib.pop("version", None)
    text = ElementTree.tostring(root, encoding="unicode")
    for stand_in, colour in PAGE_COLOURS.items():
        text = text.replace(stand_in, colour)
    return Markup(re.sub(r"; font-family: [^;\"]*", "", text))


def _plain(element: ElementTree.Element) -> None:
    """Attributes without their namespace, and nothing between the elements."""
    if element.tag not in ("text", "tspan", "title"):
        element.text = None
    element.tail = None
    for name in [name for name in element.attrib if "}" in name]:
        element.attrib[name.split("}")[-1]] = element.attrib.pop(name)


NUMBER = re.compile(r"-?\d+\.\d+")
RECTANGLE = re.compile(r"^M(\S+) (\S+)L(\S+) \2L\3 (\S+)L\1 \4z$")
MARKS = ("path", "use")


def _shorten(root: ElementTree.Element) -> None:
    """The same drawing in fewer characters: tenths of pixels, and a group has the declarations that all marks share."""
    shapes = {part for defined in root.iter("defs") for part in defined.iter()}  # markers are too small for tenths
    for element in root.iter():
        if element not in shapes:
            for name in element.attrib.keys() & {"d", "x", "y"}:
                element.attrib[name] = _path(element.attrib[name])
        if element.tag == "g" and "style" not in element.attrib:
            _share(element, [mark for mark in element if mark.tag != "defs"])


def _path(text: str) -> str:
    shorter = NUMBER.sub(lambda found: f"{float(found[0]):.1f}".removesuffix(".0"), text)
    shorter = re.sub(r"\s*([A-Za-z])\s*", r"\1", shorter).strip()
    return RECTANGLE.sub(r"M\1 \2H\3V\4H\1z", shorter)


def _share(group: ElementTree.Element, marks: Sequence[ElementTree.Element]) -> None:
    """Moves the clip path and the inherited declarations that all marks have to the group."""
    if len(marks) < 3:
        return
    clips = {mark.get("clip-path") for mark in marks}
    shared = None not in clips and len(clips) == 1
    if shared and all([part.tag for part in mark] == ["use"] and len(mark.attrib) == 1 for mark in marks):
        for dot in marks:  # which needs no group of its own; the clip path of a `use` would move with it
            group[[*group].index(dot)] = dot[0]
            dot[0].attrib |= dot.attrib
        marks = [mark for mark in group if mark.tag != "defs"]
    if any(mark.tag not in MARKS for mark in marks):
        return
    if shared:
        group.attrib["clip-path"] = clips.pop() or ""
        for mark in marks:
            del mark.attrib["clip-path"]
    styles = [mark.attrib.get("style", "").split("; ") for mark in marks]
    common = set(styles[0]).intersection(*styles[1:])
    kept = [each for each in styles[0] if each in common and each and not each.startswith("opacity")]
    if not kept:
        return
    group.attrib["style"] = "; ".join(kept)
    for mark, style in zip(marks, styles, strict=True):
        mark.attrib["style"] = "; ".join(each for each in style if each not in kept)
        if not mark.attrib["style"]:
            del mark.attrib["style"]


def _drop_id(element: ElementTree.Element) -> None:
    """Ids of groups only number them, and would be double on a page of many charts."""
    if element.tag == "g":
        element.attrib.pop("id", None)


def _tell(group: ElementTree.Element, waiting: Iterator[tuple[str, str]]) -> None:
    parents = {mark: parent for parent in group.iter() for mark in parent}
    marks = [mark for mark in parents if mark.tag == "use" or (mark.tag == "path" and "clip-path" in mark.attrib)]
    for mark, (text, link) in zip(marks, waiting, strict=False):
        title = ElementTree.SubElement(mark, "title")
        title.text = text
        if link:
            place = [*parents[mark]].index(mark)
            parents[mark].remove(mark)
            around = ElementTree.Element("a", {"href": link, "tabindex": "-1"})  # the table has the same links
            around.append(mark)
            parents[mark].insert(place, around)
