"""The page: the contents of a run in one HTML file."""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs.errors import ObjectMissing
from jobs.evaluation_tasks import ScoreRow
from jobs.job import Job
from jobs.sealing import stamped_text
from orchestrator.evaluating.pairing import question
from orchestrator.evaluating.results import RESULTS
from orchestrator.judging.effective_length import RULER_THRESHOLD
from orchestrator.report import axes, figures
from orchestrator.report.html import render
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
from orchestrator.report.recommendation import rows_by_point
from orchestrator.report.run import MOST_RECEIPTS, PAGE, Report
from orchestrator.report.searched import search_sections
from orchestrator.report.sections import Choice, Section, Table, bounds, importance_section, table_of
from orchestrator.viewing.address import EXPORT, address
from orchestrator.words import benchmark_words, short_length, size
from workers.benchmarks.registry import BENCHMARKS, asked_benchmarks
from workers.storage import open_store

HERE = Path(__file__).parent
MOST_FLIPS = 12
MOST_PAIRED_AXES = 4
MOST_WITHOUT_COLUMNS = 20
"""Points in a map that has one row per point because it has three axes or more: the best of them."""
MOST_FIRST = 10
"""Points in the leaderboard before the fold, the best of them; the parents stand before it too."""
MOST_MAPS = 8
"""Maps side by side; of more, one is shown at a time."""

REFRESH_SECONDS = 60


def write_page(report: Report) -> str:
    """Writes the page into the run and returns where it lies."""
    return put_page(report.run.url, page(report))


def put_page(run_url: str, text: str) -> str:
    """Puts a page into a run and returns where it lies."""
    open_store(run_url).write(PAGE, stamped_text(text, "<!-- {} -->"))
    return f"{run_url}/{PAGE}"


def page(report: Report) -> str:
    """The page as one HTML file that refers to nothing outside itself."""
    from markupsafe import Markup

    low, high = _scale(report.lines)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return render(
        HERE / "page.html.jinja",
        {"short": short_length, "bytes": size, "interval": partial(_interval_style, low, high)},
        **_context(report),
        score_of=benchmark_words(report.run.result.weights),
        scale=(low, high),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        refresh=None if report.run.result.finished else REFRESH_SECONDS,
    )


def _context(report: Report) -> dict[str, Any]:
    run, result = report.run, report.run.result
    everything = rows_by_point(result.rows)
    best = [line for line in report.lines if line.kind == "point"][:MOST_FIRST]
    first = [line for line in report.lines if line in best or line.kind == "parent" or len(report.lines) <= MOST_ROWS]
    return {
        "run": run,
        "result": result,
        "report": report,
        "lines": report.lines,
        "first": first,
        "folded": [line for line in report.lines if line not in first],
        "view": _view(run.url),
        "address": address,
        "parents": result.parent_labels,
        "lengths": sorted({length for line in report.lines for length in line.by_length}),
        "benchmarks": sorted({name for line in report.lines for name in line.by_benchmark}, reverse=True),
        "beside": sorted({name for line in report.lines for name in line.beside}),
        "guards": guard_names(report.lines),
        "marks": GUARD_MARKS,
        "guards_legend": GUARDS_LEGEND,
        "generated": [*dict.fromkeys(name for line in report.lines for name in line.generated)],
        "unanswered": any(line.unanswered.count for line in report.lines),
        "threshold": RULER_THRESHOLD,
        "reach": context_note(report.run.result),
        "not_published": not_published(report.run.result),
        "most_receipts": MOST_RECEIPTS,
        "sections": sections(report, _view(run.url)),
        "costs": _costs(report),
        "flips": _flips(report, everything),
        "provenance": _provenance(report),
    }


def sections(report: Report, view: str = "") -> list[Section]:
    """The figures of the page, in order; their tiles lead to the answers where there is a page of them (`view`)."""
    everything = rows_by_point(report.run.result.rows)
    found = [
        *_search_sections(report),
        *_grid_sections(report, view),
        *_axes_sections(report),
        _curve_section(report),
        _pareto_section(report, everything),
        _needle_section(report, everything, view),
        _perplexity_section(report),
    ]
    return [section for section in found if section is not None]


def _view(run_url: str) -> str:
    """The exported page with all answers, relative to this one; empty if there is none."""
    try:
        open_store(run_url).locate(f"{EXPORT}index.html")
    except ObjectMissing:
        return ""
    return EXPORT.removeprefix("report/") + "index.html"


def _scale(lines: Sequence[Line]) -> tuple[float, float]:
    """The scale of the leaderboard's intervals: round limits around all of them."""
    finite = [line for line in lines if math.isfinite(line.half_width)]
    ends = [line.score + side * line.half_width for line in finite for side in (-1, 1)]
    return bounds([min(100.0, max(0.0, end)) for end in ends] or [0.0, 100.0])


def _interval_style(low: float, high: float, line: Any) -> str:
    def share(score: float) -> float:
        return round(100 * (min(high, max(low, score)) - low) / (high - low), 2)

    ends = share(line.score - line.half_width), share(line.score + line.half_width)
    return f"--low: {ends[0]}; --high: {ends[1]}; --at: {share(line.score)}"


# ---- figures ---------------------------------------------------------------------------------------------------------


def _grid_sections(report: Report, view: str) -> list[Section | None]:
    run, result = report.run, report.run.result
    rows = rows_by_point(result.ranked_rows())
    names = [standing.point for standing in result.standing if standing.point in rows][: figures.MOST_ROWS]
    twins = [] if run.job is None else [point.name for point in run.job.points if result.same.get(point.name) in names]
    if len(names) + len(twins) < 2:
        return []
    points = () if run.job is None else run.job.points
    grid = figures.grid_of(points, [*names, *twins])
    best = ""
    if not grid.columns and grid.row_title not in (points[0].bindings if points else ()):
        if len(grid.rows) > MOST_WITHOUT_COLUMNS:
            best = f" The {MOST_WITHOUT_COLUMNS} best of {len(grid.rows)} points."
        grid = figures.grid_of(points, names[:MOST_WITHOUT_COLUMNS])
    compared = report.comparisons
    by_length = {} if compared is None else figures.titled(compared.by_length)
    by_task = {} if compared is None else compared.by_task
    asked = result.ranked_rows()
    lengths = {short_length(length): {"length": length} for length in sorted({row.length for row in asked}) if length}
    tasks = {task: {"task": task} for task in sorted({row.task for row in asked})}
    of_length, of_task = figures.scores_by_length(rows), figures.scores_by_task(rows)
    return [
        _grid_section(report, view, grid, best, "length", "context length (tokens)", lengths, of_length, by_length),
        _grid_section(report, view, grid, best, "task", "task", tasks, of_task, by_task),
    ]


def _grid_section(
    report: Report,
    view: str,
    grid: figures.MapGrid,
    best: str,
    what: str,
    column_title: str,
    titles: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, float]],
    found: Mapping[tuple[str, str], Any],
) -> Section | None:
    from orchestrator.report import charts

    maps = figures.grid_maps(grid, scores, titles, column_title, found, report.baseline, report.run.result.same)
    values = [tile.value for shown in maps for tile in shown.tiles.values()]
    if not values:
        return None
    low, high = bounds(values)
    drawn = [(shown.title, charts.heatmap(shown, low, high, view=view)) for shown in maps if shown.tiles]
    if len(drawn) > MOST_MAPS:
        choices = tuple(Choice(title, (chart,)) for title, chart in drawn)
    else:
        choices = (Choice("", tuple(chart for _, chart in drawn)),)
    hatched = (
        f" Hatched: the difference from {report.baseline} is not sure, at 5 % after Benjamini and Hochberg over all"
        " cells of this map."
        if report.baseline is not None
        else " Nothing is hatched, as no parent was asked to compare with."
    )
    return Section(
        f"grid-{what}",
        f"The {'points' if report.run.asked else 'grid'} by {what}",
        f"Scores from 0 to 100.{best}{hatched}",
        (charts.colour_bar(low, high, "score"),),
        what,
        choices,
        tuple(table_of(shown) for shown in maps),
    )


def _axes_sections(report: Report) -> list[Section]:
    """Profiles, importance, maps and lines over the axes; only at the end, as intervals hold for a fixed number."""
    from orchestrator.report import charts

    run, result = report.run, report.run.result
    if run.job is None or not result.finished or run.asked:  # a search has sections of its own
        return []
    found = axes.surface(run.job.points, rows_by_point(result.ranked_rows()), result.same)
    if found is None:
        return []
    profiles = {axis: found.profiles(number) for number, axis in enumerate(found.axes)}
    difference = "A bar is the 95 % interval of the difference from the line's best, which has none."
    made = [
        Section(
            "profiles",
            "Score along each axis",
            f"On the questions that every point answered. {difference}",
            (),
            "axis",
            (Choice("", tuple(charts.profile(axis, lines) for axis, lines in profiles.items())),),
            tuple(_profile_table(axis, line) for axis, lines in profiles.items() for line in lines),
        )
    ]
    if len(found.axes) < 2:
        return made
    importance = found.importance()
    overlap = "" if found.full else " Not every combination is a point: shares overlap, and axes may stand for others."
    words = (
        "The share of the variance between points that one axis alone explains, without noise, with its 95 % interval."
        f" An interval from 0 to 100: the differences between all points are within noise.{overlap}"
    )
    made += [importance_section(importance, words), _pairs_section(found, importance)]
    return [*made, _parallel_section(found)] if len(found.axes) > 2 else made


def _pairs_section(found: axes.Surface, importance: Sequence[axes.Importance]) -> Section:
    from orchestrator.report import charts

    maps = found.maps([one.axis for one in importance[:MOST_PAIRED_AXES]])
    low, high = bounds(found.scores.tolist())
    return Section(
        "pairs",
        "Two axes at a time",
        "Hatched: the difference from the best cell of this map is within noise (95 %, each cell by itself).",
        (charts.colour_bar(low, high, "score"),),
        "axes",
        tuple(Choice(shown.title, (charts.heatmap(replace(shown, title=""), low, high),)) for shown in maps),
        tuple(table_of(shown) for shown in maps),
    )


def _parallel_section(found: axes.Surface) -> Section:
    from orchestrator.report import charts

    low, high = bounds(found.scores.tolist())
    best = sorted(range(len(found.names)), key=lambda point: -found.scores[point])[:MOST_WITHOUT_COLUMNS]
    return Section(
        "parallel",
        "All axes at once",
        "A line per point; the ten best are drawn strongly. The numbers have the best points.",
        (charts.colour_bar(low, high, "score"),),
        "",
        (Choice("", (charts.parallel(found, low, high),)),),
        (
            Table(
                "",
                ("point", *found.axes, "score"),
                tuple(
                    (
                        found.names[point],
                        *(
                            figures.value_word(values[at])
                            for values, at in zip(found.values, found.at[point].tolist(), strict=True)
                        ),
                        f"{found.scores[point]:.1f}",
                    )
                    for point in best
                ),
            ),
        ),
    )


def _search_sections(report: Report) -> list[Section | None]:
    """The sections of a search; before its end, and of a run of an older version, the points in the order of asking."""
    found = report.run.result.search
    return [_asked_section(report)] if found is None else [*search_sections(found, report.run.asked, report.run.gate)]


def _asked_section(report: Report) -> Section | None:
    """The scores of a search's points in the order of asking, and why each was asked."""
    from orchestrator.report import charts

    lines = {line.name: line for line in report.lines}
    asked = [each for each in report.run.asked if each[1] in lines]
    if not asked:
        return None
    scores = [lines[point].score for _, point, _ in asked]
    numbers, none = tuple(Fraction(number) for number in range(1, len(asked) + 1)), (0.0,) * len(asked)
    traces = [
        axes.Profile("highest so far", numbers, tuple(itertools.accumulate(scores, max)), none),
        axes.Profile("each point", numbers, tuple(scores), none),
    ]
    return Section(
        "search",
        "The points in the order of asking",
        "The score of each point at the end, and the highest so far. Points that left the search early answered fewer"
        " items, so the highest is partly luck: the first of the leaderboard is chosen by items and neighbours too.",
        (),
        "",
        (Choice("", (charts.profile("points asked", traces),)),),
        (
            Table(
                "",
                ("batch", "point", "score", "why it was asked"),
                tuple(
                    (str(batch), point, f"{score:.1f}", reason)
                    for (batch, point, reason), score in zip(asked, scores, strict=True)
                ),
            ),
        ),
    )


def _profile_table(axis: str, line: axes.Profile) -> Table:
    rows = zip(line.values, line.scores, line.half, strict=True)
    return Table(
        line.name,
        (axis, "score", "± of the difference from the best"),
        tuple(
            (figures.value_word(value), f"{score:.1f}", f"{half:.1f}" if half else "") for value, score, half in rows
        ),
    )


def _curve_section(report: Report) -> Section | None:
    from orchestrator.report import charts

    parents = report.run.result.parent_labels
    found = figures.length_curves(rows_by_point(report.run.result.ranked_rows()), report.lines, parents)
    if not found:
        return None
    lengths = sorted({x for curve in found for x in curve.x})
    lines = {line.name: line for line in report.lines}
    bars = dict.fromkeys(parent for line in report.lines for parent in line.relative)
    return Section(
        "by-length",
        "Score by length",
        "The best points and the parents, with 95 % intervals that count shared haystacks. A ring marks the"
        f" effective length: the longest up to which {context_note(report.run.result)} ≥ {RULER_THRESHOLD}, the dotted"
        " line; below also with 85 % of a parent's score at its shortest length for a threshold.",
        (),
        "",
        (Choice("", (charts.curves(found, "context length (tokens)", "score", threshold=RULER_THRESHOLD),)),),
        (
            Table(
                "",
                (
                    "point",
                    *(short_length(int(length)) for length in lengths),
                    *("wAvg (inc)", "wAvg (dec)", "effective"),
                    *(f"by {parent}" for parent in bars),
                ),
                tuple(
                    (
                        curve.name,
                        *(_interval_at(curve, length) for length in lengths),
                        *(f"{average:.1f}" for average in lines[curve.name].weighted or ()),
                        effective(lines[curve.name].effective),
                        *(effective(lines[curve.name].relative.get(parent)) for parent in bars),
                    )
                    for curve in found
                ),
            ),
        ),
    )


def _interval_at(curve: figures.Curve, x: float) -> str:
    if x not in curve.x:
        return ""
    at = curve.x.index(x)
    return f"{curve.y[at]:.1f} ({curve.low[at]:.1f}–{curve.high[at]:.1f})" if curve.low else f"{curve.y[at]:.4g}"


def _needle_section(report: Report, rows: Mapping[str, Sequence[ScoreRow]], view: str) -> Section | None:
    from orchestrator.report import charts

    baseline = report.baseline if report.comparisons is not None else None  # as for all differences
    found = figures.needle_maps(
        rows, report.lines, report.run.result.parent_labels, baseline, _depth_grids(report.run.job)
    )
    if not found:
        return None
    difference = f"; beside it the difference from {baseline} on the same needles, hatched where it is not sure"
    most = max(
        (abs(tile.value) for maps in found if maps.differences for tile in maps.differences.tiles.values()), default=0.0
    )
    limit = float(max(10, 10 * math.ceil(most / 10)))
    return Section(
        "needles",
        "Needles by depth and length",
        f"How often the needle was found, by how deep it lay in the context{difference if baseline else ''}.",
        (
            charts.colour_bar(0, 100, "score"),
            charts.colour_bar(-limit, limit, "difference in points", scale="difference"),
        ),
        "point",
        tuple(
            Choice(
                maps.name,
                (
                    charts.heatmap(maps.scores, 0, 100, view=view),
                    *(
                        [charts.heatmap(maps.differences, -limit, limit, scale="difference", view=view)]
                        if maps.differences is not None
                        else []
                    ),
                ),
            )
            for maps in found
        ),
        tuple(
            Table(f"{maps.name}: {shown.title}", table.head, table.rows)
            for maps in found
            for shown in (maps.scores, maps.differences)
            if shown is not None
            for table in [table_of(shown)]
        ),
    )


def _depth_grids(job: Job | None) -> dict[str, int]:
    """The number of depths of each benchmark of the job that asks at a grid of them."""
    asked = [] if job is None or job.evaluate is None else asked_benchmarks(job.evaluate)
    return {key: depths(spec) for key, spec in asked if (depths := BENCHMARKS[key].depths) is not None}


def _pareto_section(report: Report, rows: Mapping[str, Sequence[ScoreRow]]) -> Section | None:
    from orchestrator.report import charts

    found = figures.metrics(rows, report.lines)
    if len(found) < 2 or len(report.lines) < 2:
        return None
    result = report.run.result
    noted = {departure.point: "left" for departure in result.departures} | dict.fromkeys(result.parent_labels, "parent")
    pairs = list(itertools.combinations(found, 2))
    drawn = [
        Choice(f"{x.name} and {y.name}", (charts.pareto(x, y, figures.front(x, y), noted),))
        for x, y in sorted(pairs, key=lambda pair: _least_alike(found, *pair))
        if set(x.values) & set(y.values)
    ]
    return Section(
        "pareto",
        "Cost against score",
        "Every point by two metrics; the dashed line joins those that none beats in one without losing in the other.",
        (),
        "metrics",
        tuple(drawn),
        (
            Table(
                "",
                ("point", *(metric.name for metric in found)),
                tuple((line.name, *(_value(metric, line.name) for metric in found)) for line in report.lines),
            ),
        ),
    )


def _least_alike(found: Sequence[figures.Metric], x: figures.Metric, y: figures.Metric) -> tuple[bool, int, int]:
    """The pair to show first: shortest against longest, or two benchmarks; the score itself is in all of them."""
    return (x is found[0] or y is found[0], found.index(x), found.index(y))


def _value(metric: figures.Metric, name: str) -> str:
    return f"{metric.values[name]:.1f}" if name in metric.values else ""


def _perplexity_section(report: Report) -> Section | None:
    from orchestrator.report import charts

    longest, found = figures.perplexity_curves(report.lines, report.run.result.parent_labels)
    if not found:
        return None
    positions = sorted({x for curve in found for x in curve.x})
    return Section(
        "perplexity",
        "Perplexity by position",
        f"In texts of {longest:,} tokens, by where a token stands; less is better. A model whose context ends early"
        " rises to the right.",
        (),
        "",
        (Choice("", (charts.curves(found, "position in the text (tokens)", "perplexity"),)),),
        (
            Table(
                "",
                ("point", *(f"from {short_length(int(at))}" for at in positions)),
                tuple((curve.name, *(_interval_at(curve, at) for at in positions)) for curve in found),
            ),
        ),
    )


# ---- words -----------------------------------------------------------------------------------------------------------


def _costs(report: Report) -> dict[str, Any]:
    from orchestrator.report import charts

    answers = figures.answer_costs(report.run.result.rows)
    merged = figures.merge_cost(report.run.receipts)
    bars = [figures.StageCost("merging", merged.seconds, merged.shards, 0)] if merged is not None else []
    return {"answers": answers, "merged": merged, "chart": charts.bars([*bars, *answers])}


@dataclass(frozen=True, slots=True)
class FlippedAnswer:
    """A question that the leader and the baseline answered with different success."""

    question: str
    new: ScoreRow
    old: ScoreRow


def _flips(report: Report, rows: Mapping[str, Sequence[ScoreRow]]) -> list[FlippedAnswer]:
    """The questions whose scores differ most, half of them lost and half of them won, longest first."""
    if not report.lines or report.baseline is None or report.lines[0].name == report.baseline:
        return []
    earlier = {question(row): row for row in rows[report.baseline]}
    both = [(row, earlier[question(row)]) for row in rows[report.lines[0].name] if question(row) in earlier]
    both = [(new, old) for new, old in both if new.score != old.score and not BENCHMARKS[new.benchmark].is_likelihood]
    both.sort(key=lambda pair: (-abs(pair[0].score - pair[1].score), -pair[0].length, pair[0].task, pair[0].item))
    lost = [pair for pair in both if pair[0].score < pair[1].score][: MOST_FLIPS // 2]
    won = [pair for pair in both if pair[0].score > pair[1].score][: MOST_FLIPS - len(lost)]
    return [
        FlippedAnswer(f"{new.task} at {short_length(new.length)}, item {new.item}", new, old)
        for new, old in [*lost, *won]
    ]


def _provenance(report: Report) -> list[tuple[str, str]]:
    run, result = report.run, report.run.result
    weights = {row.point: row.weights for row in result.rows}
    noise = result.noise
    facts = [
        ("run", run.url),
        ("answers", f"{run.url}/{RESULTS}, {len(result.rows):,} rows"),
        ("mergeyard", version("mergeyard")),
        ("plan", str(run.plan.get("digest", ""))),
        ("arithmetic", f"{run.plan.get('numerics', '?')}, version {run.plan.get('numerics_version', '?')}"),
        ("seed", str(result.seed)),
        ("points", f"{len(run.plan.get('points', ())):,} in the plan, {len(run.written):,} written"),
    ]
    if report.lines:
        facts.append((f"weights of {report.lines[0].name}", weights.get(report.lines[0].name, "")))
    if noise is not None:
        facts.append(
            (
                "noise floor",
                f"{noise.flips} of {noise.items} answers changed their score when asked again"
                f" ({100 * noise.rate:.1f} %, 95 % interval {100 * noise.low:.1f} to {100 * noise.high:.1f} %)",
            )
        )
    if result.race is not None:
        cost = f"{100 * result.cost_share:.0f} % of the cost of asking every point every item"
        facts.append(("race", f"{result.rule}; {cost}"))
    return facts
