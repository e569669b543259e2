"""A search in the report: its sections of the page, and the same facts in a few lines for terminals and cards."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

from orchestrator.report import axes, figures
from orchestrator.report.sections import Choice, Section, Table, bounds, importance_section, table_of
from orchestrator.searching.findings import Findings, Measured
from orchestrator.searching.greedy import ALPHA, MARGIN

MOST_NAMED_AXES = 4


def facts(found: Findings, gate: Mapping[str, Any] | None) -> list[str]:
    """The facts of a search, one sentence each; the last one compares with fresh items if a gate asked some."""
    last = found.steps[-1]
    unit = _unit(found)
    best = next(each for each in found.points if each.point == last.best)
    lines = [
        f"The search asked {len(found.points)} of {found.size:,} points, {best.items} items of each cell for"
        f" {last.best}, the best by its model: {last.score:.1f} ± {_half(last.low, last.high):.1f}{unit}."
        f" The best {_looked_at(found)} is better by at most {last.regret:.1f}{unit or ' points'}"
        " (95 %, by the model)."
    ]
    if found.importance:
        shares = [
            f"{each.axis} {100 * each.share:.0f} % ({100 * each.low:.0f} to {100 * each.high:.0f})"
            for each in found.importance[:MOST_NAMED_AXES]
        ]
        lines.append(f"Of the variance over the space, one axis alone explains: {', '.join(shares)}.")
    if found.ingredients:
        stay = [each.model for each in found.ingredients if each.stays]
        lines.append(
            f"The greedy soup is {' + '.join(stay)}, {len(stay)} of {len(found.ingredients)} models that were tried."
        )
    if len(found.objectives) > 1:
        lines.append(f"The front of {' and '.join(found.objectives)} has {len(found.front)} points.")
    return [*lines, *_fresh(found, gate)]


def _fresh(found: Findings, gate: Mapping[str, Any] | None) -> list[str]:
    """The score in the search, the score on fresh items, and the drop; empty if no gate asked fresh items."""
    fresh = {} if gate is None or not gate["fresh"] else gate["scores"].get(gate["new"])
    point = next((each for each in found.points if gate is not None and each.point == gate["new"]), None)
    if not fresh or point is None or found.objectives[0] != "score":
        return []
    last = found.steps[-1]
    half = _half(last.low, last.high) if point.point == last.best else point.half
    score, other = point.figures[0], fresh["score"]
    if fresh["half"] is None:
        return [f"{point.point}: {score:.1f} in the search, {other:.1f} on fresh items: a drop of {score - other:.1f}."]
    return [
        f"{point.point}: {score:.1f} ± {half:.1f} in the search, {other:.1f} ± {fresh['half']:.1f} on fresh items:"
        f" a drop of {score - other:.1f} ± {math.hypot(half, fresh['half']):.1f}."
    ]


def _half(low: float, high: float) -> float:
    return (high - low) / 2


def _looked_at(found: Findings) -> str:
    """The points that the regret bound is over: without a model of the surface, points say nothing of others."""
    return "point of the space" if found.axes else "of the points asked"


def _unit(found: Findings) -> str:
    return " tokens" if "output_tokens" in found.objectives[0] else ""


def search_sections(
    found: Findings, asked: tuple[tuple[int, str, str], ...], gate: Mapping[str, Any] | None
) -> list[Section]:
    """The trace, the surface, the importance of the axes and the front."""
    made = [_trace(found, asked, gate)]
    if found.ingredients:
        made.append(_ingredients(found))
    if found.surface:
        made.append(_surface(found))
    if found.importance:
        made.append(
            importance_section(
                [axes.Importance(each.axis, each.share, each.low, each.high) for each in found.importance],
                "The share of the variance over the space that one axis alone explains, by draws of the model, with its"
                " 95 % interval (first-order index, Sobol' 1993).",
            )
        )
    if len(found.objectives) > 1:
        made.append(_front(found))
    return made


def _trace(found: Findings, asked: tuple[tuple[int, str, str], ...], gate: Mapping[str, Any] | None) -> Section:
    from orchestrator.report import charts

    points = {each.point: each for each in found.points}
    order = [(batch, points[name], reason) for batch, name, reason in asked if name in points]
    dots = [
        charts.Dot(str(number), each.value, 0.0, f"{each.point}: {each.value:.1f} on {each.items} items a cell")
        for number, (_, each, _) in enumerate(order, start=1)
    ]
    x, steps, objective = [str(step.points) for step in found.steps], found.steps, found.objectives[0].removeprefix("-")
    halves = [_half(step.low, step.high) for step in steps]
    return Section(
        "search",
        "The search",
        f"{' '.join(facts(found, gate))} First chart: the best point so far by the model, and each point in the order"
        " of asking. Points with few items are lucky or unlucky; the model draws them towards their neighbours. Second"
        " chart: the bound of the regret, the 95 % quantile of max f(x) − f(best) over draws f of the model, x over the"
        f" {'space' if found.axes else 'points asked'}. After few points the model is too sure, and the bound too low.",
        (),
        "",
        (
            Choice(
                "",
                (
                    charts.banded(x, [step.score for step in steps], halves, dots, "points asked", objective),
                    charts.banded(
                        x, [step.regret for step in steps], [0.0] * len(x), [], "points asked", "regret bound"
                    ),
                ),
            ),
        ),
        (
            Table(
                "The best point when a batch was closed",
                ("batch", "points", "best", objective, "regret bound"),
                tuple(
                    (
                        str(step.batch),
                        str(step.points),
                        step.best,
                        f"{step.score:.1f} ± {half:.1f}",
                        f"{step.regret:.1f}",
                    )
                    for step, half in zip(steps, halves, strict=True)
                ),
            ),
            Table(
                "The points in the order of asking",
                (
                    "batch",
                    "point",
                    *(f"{each} by the model" for each in found.objectives),
                    f"{objective} by its items",
                    "items a cell",
                    "why it was asked",
                ),
                tuple(
                    (
                        str(batch),
                        each.point,
                        *(f"{value:.1f}" for value in each.figures),
                        f"{each.value:.1f} ± {each.half:.1f}",
                        str(each.items),
                        reason,
                    )
                    for batch, each, reason in order
                ),
            ),
        ),
    )


def _ingredients(found: Findings) -> Section:
    """The verdict on each model of a greedy soup."""
    return Section(
        "ingredients",
        "The ingredients of the soup",
        "The models in the order of trying, the best alone first. A model stays if the soup is surely not worse with it"
        f" by {MARGIN:.1f} points, on the same items, at {100 * ALPHA:g} % over all models and rungs.",
        (),
        "",
        (),
        (
            Table(
                "",
                ("model", "stays", "gain", "items a cell", "why"),
                tuple(
                    (
                        each.model,
                        "yes" if each.stays else "no",
                        f"{each.gain:+.1f} ± {each.allowed:.1f}" if each.allowed else "",
                        str(each.items),
                        each.reason,
                    )
                    for each in found.ingredients
                ),
            ),
        ),
    )


def _surface(found: Findings) -> Section:
    from orchestrator.report import charts

    points = {each.point: each for each in found.points}
    objective, others = (
        found.objectives[0].removeprefix("-"),
        f" The other axes stand at {found.others}." if found.others else "",
    )
    if len(found.axes) == 1:
        x = [place.at[0] for place in found.surface]
        dots = [
            charts.Dot(place.at[0], of.value, of.half, f"{of.point}: {of.value:.1f} ± {of.half:.1f}, {of.items} items")
            for place in found.surface
            if place.point is not None
            for of in [points[place.point]]
        ]
        means, halves = [place.mean for place in found.surface], [place.half for place in found.surface]
        return Section(
            "surface",
            "The surface of the model",
            "The posterior of the Gaussian process that chose the points, with its 95 % band, and each point with the"
            f" 95 % interval of its own items.{others}",
            (),
            "",
            (Choice("", (charts.banded(x, means, halves, dots, found.axes[0], objective),)),),
            (
                Table(
                    "",
                    (found.axes[0], f"{objective} by the model", "by its items", "items a cell"),
                    tuple(
                        (place.at[0], f"{place.mean:.1f} ± {place.half:.1f}", *_measured(points.get(place.point or "")))
                        for place in found.surface
                    ),
                ),
            ),
        )
    rows, columns = ([*dict.fromkeys(place.at[axis] for place in found.surface)] for axis in (0, 1))
    rows, columns = (
        sorted(rows, key=charts.places(rows).__getitem__),
        sorted(columns, key=charts.places(columns).__getitem__),
    )
    sign = -1 if found.objectives[0].startswith("-") else 1
    best = max(sign * place.mean for place in found.surface)
    tiles: dict[tuple[int, int], figures.MapTile] = {}
    widths: dict[tuple[int, int], figures.MapTile] = {}
    for place in found.surface:
        of = points.get(place.point or "")
        text = f"{found.axes[0]} {place.at[0]}, {found.axes[1]} {place.at[1]}: {place.mean:.1f} ± {place.half:.1f}"
        behind = best - sign * place.mean
        if behind > 0:
            text += f"; {behind:.1f} ± {place.behind:.1f} behind the best"
        if of is not None:
            text += f"; asked, {of.items} items a cell"
        at = rows.index(place.at[0]), columns.index(place.at[1])
        tiles[at] = figures.MapTile(place.mean, behind == 0 or behind > place.behind, text)
        widths[at] = figures.MapTile(place.half, None, text)
    shown = [
        figures.Map(title, tuple(rows), tuple(columns), found.axes[0], found.axes[1], of)
        for title, of in ((objective, tiles), ("half of its 95 % interval", widths))
    ]
    low, high = bounds([tile.value for tile in tiles.values()], at_most=math.inf)
    most = max(1.0, math.ceil(max(tile.value for tile in widths.values())))
    return Section(
        "surface",
        "The surface of the model",
        "The posterior of the Gaussian process that chose the points, over the two axes that matter most. Hatched: the"
        f" difference from the best cell is within noise (95 %, each cell by itself).{others}",
        (charts.colour_bar(low, high, objective), charts.colour_bar(0, most, "±")),
        "",
        (Choice("", (charts.heatmap(shown[0], low, high), charts.heatmap(shown[1], 0, most))),),
        tuple(table_of(each) for each in shown),
    )


def _measured(point: Measured | None) -> tuple[str, str]:
    return ("", "") if point is None else (f"{point.value:.1f} ± {point.half:.1f}", str(point.items))


def _front(found: Findings) -> Section:
    from orchestrator.report import charts

    metrics = [
        figures.Metric(
            name.removeprefix("-"),
            {each.point: each.figures[index] for each in found.points},
            more_is_better=not name.startswith("-"),
        )
        for index, name in enumerate(found.objectives)
    ]
    return Section(
        "front",
        "The front",
        "Every point by the model's means. A point of the front is exceeded by no other point in all figures.",
        (),
        "figures",
        tuple(
            Choice(f"{x.name} and {y.name}", (charts.pareto(x, y, figures.front(x, y), {}),))
            for x, y in itertools.combinations(metrics, 2)
        ),
        (
            Table(
                "",
                ("point of the front", *found.objectives, "items a cell"),
                tuple(
                    (each.point, *(f"{value:.1f}" for value in each.figures), str(each.items))
                    for each in found.points
                    if each.point in found.front
                ),
            ),
        ),
    )
