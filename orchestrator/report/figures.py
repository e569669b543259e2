"""The numbers and words of each figure of the page; `charts` draws them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, TypeGuard

from jobs.evaluation_tasks import ScoreRow
from jobs.expressions import Value, format_number
from jobs.grid import Point
from jobs.merge_tasks import Receipt
from orchestrator.evaluating.pairing import samples
from orchestrator.judging.effective_length import score_by_length
from orchestrator.judging.estimates import macro_mean, macro_score
from orchestrator.judging.samples import CellSample, paired_sample
from orchestrator.report.against_baseline import ComparedCell, cells
from orchestrator.report.leaderboard import Line, context_rows, guard_names
from orchestrator.words import short_length
from workers.benchmarks.registry import BENCHMARKS

MOST_CURVES = 6
MOST_NEEDLE_MAPS = 6
MOST_METRICS = 6
MOST_ROWS = 400
"""Points in a map, the best of them; a page with more rows is not readable."""


@dataclass(frozen=True, slots=True)
class MapTile:
    """One cell of a map: its score or difference in points, whether a difference from the baseline is sure, its story.

    `sure` is None where nothing was compared; such a cell is not hatched. `answers` chooses the answers that the viewer
    shows of it, as the arguments of `address`; empty where no such choice is all of them.
    """

    value: float
    sure: bool | None
    text: str
    answers: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Map:
    """A heatmap: `tiles` by row and column, both counted from 0; missing where nothing was asked."""

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    row_title: str
    column_title: str
    tiles: Mapping[tuple[int, int], MapTile]


@dataclass(frozen=True, slots=True)
class Curve:
    """A line of a chart; `low` and `high` are its 95 % interval, `mark` the x of its effective length, if any."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    mark: float | None = None
    parent: bool = False


@dataclass(frozen=True, slots=True)
class Metric:
    """One axis of the Pareto chart: a value for each point that has one."""

    name: str
    values: Mapping[str, float]
    more_is_better: bool = True


@dataclass(frozen=True, slots=True)
class StageCost:
    """The cost of a stage: seconds of work summed over workers, and tokens or bytes."""

    what: str
    seconds: float
    items: int
    tokens: int


@dataclass(frozen=True, slots=True)
class MergeCost:
    """The cost of merging, by the receipts: the parents' bytes are counted once per task."""

    shards: int
    seconds: float
    bytes_read: int
    bytes_written: int


# ---- maps over the grid ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MapGrid:
    """The points of a job on at most two axes; `places` says where each name stands, by row and column.

    With one axis, or with more than two, every point is a row and `columns` is empty.
    """

    row_title: str
    rows: tuple[str, ...]
    column_title: str
    columns: tuple[str, ...]
    places: Mapping[str, tuple[int, int]]


def grid_of(points: Sequence[Point], names: Sequence[str]) -> MapGrid:
    """The layout of these points: by one or two axes if that separates them, else one per row."""
    known = [point for point in points if point.name in set(names)]
    if not known or len(known) < len(names):
        return MapGrid("point", tuple(names), "", (), {name: (index, 0) for index, name in enumerate(names)})
    axes = _telling_axes(known)
    if len(axes) == 2:
        first, second = (axis_values(known, axis) for axis in axes)
        places = {
            point.name: (first.index(point.bindings[axes[0]]), second.index(point.bindings[axes[1]])) for point in known
        }
        return MapGrid(axes[0], tuple(map(value_word, first)), axes[1], tuple(map(value_word, second)), places)
    if len(axes) == 1:
        first = axis_values(known, axes[0])
        places = {point.name: (first.index(point.bindings[axes[0]]), 0) for point in known}
        return MapGrid(axes[0], tuple(map(value_word, first)), "", (), places)
    rows = [", ".join(f"{axis}={value_word(point.bindings[axis])}" for axis in axes) or point.name for point in known]
    places = {point.name: (index, 0) for index, point in enumerate(known)}
    return MapGrid(", ".join(axes) or "point", tuple(rows), "", (), places)


def _telling_axes(points: Sequence[Point]) -> list[str]:
    """The axes that are needed to tell the points apart: of a simplex's axes, one follows from the others."""
    axes = [axis for axis in points[0].bindings if len({point.bindings[axis] for point in points}) > 1]
    for axis in reversed(axes):
        others = [other for other in axes if other != axis]
        if others and len({tuple(point.bindings[other] for other in others) for point in points}) == len(points):
            axes = others
    return axes


def axis_values(points: Iterable[Point], axis: str) -> list[Value]:
    """The values of an axis: numbers ascending, words in the job's order."""
    found = list(dict.fromkeys(point.bindings[axis] for point in points))
    return sorted(found) if axis_values_are_numbers(found) else found


def axis_values_are_numbers(values: Sequence[Value]) -> TypeGuard[Sequence[Fraction]]:
    """Whether no value is a word."""
    return all(isinstance(value, Fraction) for value in values)


def value_word(value: Value) -> str:
    """A value as it stands in the names of points."""
    return value if isinstance(value, str) else format_number(value)


def grid_maps(
    grid: MapGrid,
    scores: Mapping[str, Mapping[str, float]],
    titles: Mapping[str, Mapping[str, Any]],
    column_title: str,
    found: Mapping[tuple[str, str], ComparedCell],
    baseline: str | None,
    same: Mapping[str, str],
) -> list[Map]:
    """One map with a column a title (a length, a task), or with two axes one map a title.

    `titles` has the answers of each title, as arguments of `address`. `scores` is by point and title, `found` the
    differences from the baseline; points that are the same merge as another show that one's.
    """

    def tile(name: str, title: str) -> MapTile | None:
        of = same.get(name, name)
        if title not in scores.get(of, {}):
            return None
        made = _tile(name, title, scores[of][title], found.get((of, title)), baseline, of == baseline)
        return replace(made, answers={"point": of, **titles[title]})

    if not grid.columns:
        tiles = {
            (row, column): made
            for name, (row, _) in grid.places.items()
            for column, title in enumerate(titles)
            if (made := tile(name, title)) is not None
        }
        return [Map("", grid.rows, tuple(titles), grid.row_title, column_title, tiles)]
    return [
        Map(
            title,
            grid.rows,
            grid.columns,
            grid.row_title,
            grid.column_title,
            {place: made for name, place in grid.places.items() if (made := tile(name, title)) is not None},
        )
        for title in titles
    ]


def _tile(
    name: str, title: str, score: float, cell: ComparedCell | None, baseline: str | None, itself: bool
) -> MapTile:
    if itself:
        return MapTile(score, None, f"{name}, {title}: {score:.1f}, the baseline itself")
    if cell is None:
        return MapTile(score, None, f"{name}, {title}: {score:.1f}")
    told = f"{cell.difference:+.1f} against {baseline}, p = {cell.p:.2g}, {'sure' if cell.sure else 'not sure'}"
    return MapTile(score, cell.sure, f"{name}, {title}: {score:.1f}; {told}")


def scores_by_length(rows: Mapping[str, Sequence[ScoreRow]]) -> dict[str, dict[str, float]]:
    """Scores in points of each model, by length as people say it."""
    return {
        name: {short_length(length): score for length, score in score_by_length(samples(of)).items() if length}
        for name, of in rows.items()
    }


def scores_by_task(rows: Mapping[str, Sequence[ScoreRow]]) -> dict[str, dict[str, float]]:
    """Scores in points of each model, by task; lengths alike."""
    found: dict[str, dict[str, float]] = {}
    for name, of in rows.items():
        at: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for row in of:
            at[row.task][row.length].append(row.score)
        found[name] = {
            task: 100 * sum(sum(scores) / len(scores) for scores in lengths.values()) / len(lengths)
            for task, lengths in at.items()
        }
    return found


def titled(found: Mapping[tuple[str, int], ComparedCell]) -> dict[tuple[str, str], ComparedCell]:
    """Cells by length, under the names that lengths have in maps."""
    return {(name, short_length(length)): cell for (name, length), cell in found.items()}


# ---- curves ----------------------------------------------------------------------------------------------------------


def shown(lines: Sequence[Line], parents: Sequence[str], most: int) -> list[Line]:
    """The best points, and the parents."""
    best = [line for line in lines if line.name not in parents][: max(1, most - len(parents))]
    return [line for line in lines if line in best or line.name in parents][:most]


def length_curves(rows: Mapping[str, Sequence[ScoreRow]], lines: Sequence[Line], parents: Sequence[str]) -> list[Curve]:
    """The score by length of the tasks that measure the context; empty without two lengths."""
    curves: list[Curve] = []
    for line in shown(lines, parents, MOST_CURVES):
        by_length: dict[int, list[CellSample]] = defaultdict(list)
        for sample in samples(context_rows(rows.get(line.name, ()))):
            by_length[sample.cell.length].append(sample)
        estimates = {length: macro_score(found) for length, found in sorted(by_length.items()) if length}
        if len(estimates) < 2:
            continue
        curves.append(
            Curve(
                line.name,
                tuple(float(length) for length in estimates),
                tuple(100 * estimate.mean for estimate in estimates.values()),
                tuple(100 * max(0.0, estimate.low) for estimate in estimates.values()),
                tuple(100 * min(1.0, estimate.high) for estimate in estimates.values()),
                float(line.effective.length) if line.effective is not None and line.effective.length else None,
                line.name in parents,
            )
        )
    return curves


def perplexity_curves(lines: Sequence[Line], parents: Sequence[str]) -> tuple[int, list[Curve]]:
    """Perplexity by the first position of a block, at the longest length asked; (0, []) where none was."""
    longest = max((length for line in lines for length in line.perplexity), default=0)
    curves = [
        Curve(line.name, tuple(map(float, blocks)), tuple(blocks.values()), (), (), None, line.name in parents)
        for line in shown(lines, parents, MOST_CURVES)
        if (blocks := {at: value for at, value in line.perplexity.get(longest, {}).items() if math.isfinite(value)})
    ]
    return (longest, curves) if curves else (0, [])


# ---- needles ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class NeedleMaps:
    """A point's score by depth and length, and its difference from the baseline; None for the baseline itself."""

    name: str
    scores: Map
    differences: Map | None


def needle_maps(
    rows: Mapping[str, Sequence[ScoreRow]],
    lines: Sequence[Line],
    parents: Sequence[str],
    baseline: str | None,
    depths: Mapping[str, int],
) -> list[NeedleMaps]:
    """Length × depth of the best points and the parents; `depths` is the number of depths of a benchmark with a grid.

    Where no benchmark with a grid was asked, others whose questions have a depth stand in, gathered into tenths.
    """
    named = [line.name for line in shown(lines, parents, MOST_NEEDLE_MAPS)]
    if baseline is not None and baseline not in named and baseline in rows:
        named.append(baseline)
    asked = {name: _needles(rows[name]) for name in named if name in rows}
    asked = {name: of for name, of in asked.items() if of}
    if not asked:
        return []
    depth_of = _Depths.of([row for of in asked.values() for row in of], depths)
    lengths = sorted({row.length for of in asked.values() for row in of})
    before = asked.get(baseline, []) if baseline is not None else []
    return [
        NeedleMaps(
            name,
            _needle_scores(name, of, lengths, depth_of),
            None if name == baseline or not before else _needle_differences(name, of, before, lengths, depth_of),
        )
        for name, of in asked.items()
    ]


def _needles(rows: Sequence[ScoreRow]) -> list[ScoreRow]:
    deep = [row for row in rows if BENCHMARKS[row.benchmark].retrieval and not math.isnan(row.depth)]
    grids = (key for key, row in BENCHMARKS.items() if row.depths is not None)
    return next((found for key in grids if (found := [row for row in deep if row.benchmark == key])), deep)


@dataclass(frozen=True, slots=True)
class _Depths:
    """Rows of a needle map: the depths of a grid, item i at depth i mod `count`, or tenths of the context."""

    count: int | None
    labels: tuple[str, ...]

    @classmethod
    def of(cls, rows: Sequence[ScoreRow], depths: Mapping[str, int]) -> _Depths:
        benchmark, *others = {row.benchmark for row in rows}
        if others or benchmark not in depths:
            return cls(None, tuple(f"{10 * tenth}–{10 * tenth + 10}" for tenth in range(10)))
        count = depths[benchmark]
        at: dict[int, list[float]] = defaultdict(list)
        for row in rows:
            at[row.item % count].append(row.depth)
        means = [sum(at[number]) / len(at[number]) if at[number] else math.nan for number in range(count)]
        return cls(count, tuple("" if math.isnan(mean) else f"{100 * mean:.0f}" for mean in means))

    def row(self, row: ScoreRow) -> int:
        return min(9, int(10 * row.depth)) if self.count is None else row.item % self.count


def _needle_scores(name: str, rows: Sequence[ScoreRow], lengths: Sequence[int], depths: _Depths) -> Map:
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for row in rows:
        found[depths.row(row), lengths.index(row.length)].append(row.score)
    chosen = _of_one_benchmark(name, rows)
    tiles = {
        (at, column): MapTile(
            100 * sum(scores) / len(scores),
            None,
            f"{name}, {depths.labels[at]} % deep, {short_length(lengths[column])}:"
            f" {100 * sum(scores) / len(scores):.1f} of 100 on {len(scores)} items",
            chosen | {"length": lengths[column]},
        )
        for (at, column), scores in found.items()
    }
    return _needle_map("score", lengths, depths, tiles)


def _needle_differences(
    name: str, new: Sequence[ScoreRow], old: Sequence[ScoreRow], lengths: Sequence[int], depths: _Depths
) -> Map:
    earlier = {(row.items, row.task, row.length, row.item): row for row in old}
    common: dict[tuple[int, int], list[tuple[ScoreRow, ScoreRow]]] = defaultdict(list)
    for row in new:
        if (other := earlier.get((row.items, row.task, row.length, row.item))) is not None:
            common[depths.row(row), lengths.index(row.length)].append((row, other))
    compared = cells(
        {
            place: [
                paired_sample(
                    both[0][0].task,
                    place[1],
                    [row.score for row, _ in both],
                    [other.score for _, other in both],
                    [row.haystack for row, _ in both],
                )
            ]
            for place, both in common.items()
        }
    )
    chosen = _of_one_benchmark(name, new) | {"beside": old[0].point, "outcome": ""}
    tiles = {
        (at, column): MapTile(
            cell.difference,
            cell.sure,
            f"{name}, {depths.labels[at]} % deep, {short_length(lengths[column])}: {cell.difference:+.1f} points,"
            f" p = {cell.p:.2g}, {'sure' if cell.sure else 'not sure'}",
            chosen | {"length": lengths[column]},
        )
        for (at, column), cell in compared.items()
    }
    return _needle_map("difference", lengths, depths, tiles)


def _of_one_benchmark(name: str, rows: Sequence[ScoreRow]) -> dict[str, Any]:
    """The answers of a point to the benchmark of these rows, if they are of one."""
    benchmark, *others = {row.benchmark for row in rows}
    return {"point": name} if others else {"point": name, "benchmark": benchmark}


def _needle_map(title: str, lengths: Sequence[int], depths: _Depths, tiles: Mapping[tuple[int, int], MapTile]) -> Map:
    columns = tuple(short_length(length) for length in lengths)
    return Map(title, depths.labels, columns, "depth of the needle (%)", "context length (tokens)", tiles)


# ---- Pareto ----------------------------------------------------------------------------------------------------------


TOKENS = ("thought", "answer")


def metrics(rows: Mapping[str, Sequence[ScoreRow]], lines: Sequence[Line]) -> list[Metric]:
    """The metrics of points: the score, at the shortest and at the longest length, benchmarks, perplexity, tokens."""
    lengths = sorted({length for line in lines for length in line.by_length})
    found = [Metric("score", {line.name: line.score for line in lines})]
    for length in (lengths[0], lengths[-1]) if len(lengths) > 1 else ():
        at = {line.name: line.by_length[length] for line in lines if length in line.by_length}
        found.append(Metric(f"score at {short_length(length)}", at))
    asked = {row.benchmark for of in rows.values() for row in of}
    benchmarks = [name for name in asked if BENCHMARKS[name].retrieval]
    if len(benchmarks) > 1:
        for benchmark in sorted(benchmarks):
            of = {name: [row for row in points if row.benchmark == benchmark] for name, points in rows.items()}
            found.append(
                Metric(benchmark, {name: 100 * macro_mean(samples(kept)).mean for name, kept in of.items() if kept})
            )
    if any(line.perplexity for line in lines):
        found.append(Metric("perplexity", _last_perplexity(lines), more_is_better=False))
    written = {line.name: sum(line.generated[name] for name in TOKENS) for line in lines if "thought" in line.generated}
    if written:
        found.append(Metric("output tokens", written, more_is_better=False))
    for guard in guard_names(lines):
        scores = {line.name: of.score for line in lines for of in line.guards if of.guard == guard}
        found.append(Metric(guard, scores))
    for task in sorted({task for line in lines for task in line.beside}):
        found.append(Metric(task, {line.name: line.beside[task] for line in lines if task in line.beside}))
    return found[:MOST_METRICS]


def _last_perplexity(lines: Sequence[Line]) -> dict[str, float]:
    """Perplexity of the last block at the longest length: where a context fails first."""
    found: dict[str, float] = {}
    for line in lines:
        if line.perplexity:
            blocks = line.perplexity[max(line.perplexity)]
            value = blocks[max(blocks)]
            if math.isfinite(value):
                found[line.name] = value
    return found


def front(x: Metric, y: Metric) -> list[str]:
    """The points that no other beats in one metric without losing in the other, from the best in `y` to that in `x`.

    Of points that are equal in both, all are there or none.
    """
    names = [name for name in x.values if name in y.values]
    value = {name: (_goodness(x, name), _goodness(y, name)) for name in names}
    kept: list[str] = []
    for name in sorted(names, key=lambda name: (-value[name][0], -value[name][1], name)):
        if not kept or value[name][1] > value[kept[-1]][1] or value[name] == value[kept[-1]]:
            kept.append(name)
    return kept[::-1]


def _goodness(metric: Metric, name: str) -> float:
    return metric.values[name] if metric.more_is_better else -metric.values[name]


# ---- costs -----------------------------------------------------------------------------------------------------------


def answer_costs(rows: Iterable[ScoreRow]) -> list[StageCost]:
    """Where the evaluation's time went: by benchmark and length, over all points."""
    found: dict[tuple[str, int], list[ScoreRow]] = defaultdict(list)
    for row in rows:
        found[row.benchmark, row.length].append(row)
    return [
        StageCost(
            f"{benchmark} at {short_length(length)}" if length else benchmark,
            sum(row.seconds for row in of),
            len(of),
            sum(row.tokens for row in of),
        )
        for (benchmark, length), of in sorted(found.items())
    ]


def merge_cost(receipts: Sequence[Receipt]) -> MergeCost | None:
    """The cost of merging; the receipts of one task carry that task's time and bytes, which count once."""
    if not receipts:
        return None
    tasks = {
        (receipt.worker, receipt.key.rsplit("/", 1)[-1], receipt.seconds, receipt.bytes_read) for receipt in receipts
    }
    return MergeCost(
        len(receipts),
        sum(seconds for _, _, seconds, _ in tasks),
        sum(read for *_, read in tasks),
        sum(receipt.size for receipt in receipts),
    )
