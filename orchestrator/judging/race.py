"""The race: all points answer the same items, rung by rung; a point leaves when it is significantly below the best.

A point stays while its haystacks are fewer than `LEAST_HAYSTACKS` a task, and while rare total losses of the leader,
too rare to have been observed, could explain the gap (`estimates.few_losses`). README.md here has the formulas.

A state machine without I/O. The driver evaluates `next_blocks`, passes the scores to `record`, and calls `eliminate`,
which returns the departures with the figures of each decision. Decisions depend on the recorded scores only, not on
their order, so a race resumes if its old scores are recorded again.

Racing on common instances: Maron & Moore 1994 (Hoeffding races), Birattari et al. 2002 (F-Race). Rungs of growing
budget: Jamieson & Talwalkar 2016 (successive halving), except that no fixed share leaves at a rung.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jobs.errors import BadInput, CorruptData
from orchestrator.judging.pairing import Gap, Pairing
from orchestrator.judging.samples import Cell, FloatArray, normal_tail, student_quantile

RUNGS = (10, 25, 60, 150, 500)

LEAST_HAYSTACKS = 5
"""Nobody leaves on fewer haystacks a task: the spread of so few says too little about others."""


@dataclass(frozen=True, slots=True)
class Block:
    """Work for an engine: these items of this cell, for this point. `cost` is in the units of the race's costs."""

    point: str
    cell: Cell
    items: range
    cost: float


@dataclass(frozen=True, slots=True)
class Departure:
    """Why a point left: after `items` items per cell its gaps to each of the `keep` best exceeded their bounds.

    `rival` is the one of these whose bound it exceeded by least.
    `gap`, `standard_error` and `bound` are shares of 1 of the macro score; `rung` counts from 0.
    """

    point: str
    rung: int
    rival: str
    gap: float
    standard_error: float
    bound: float
    items: int
    reason: str


def departure(point: str, rung: int, rival: str, gap: Gap, multiplier: float, items: int) -> Departure:
    """The departure of a point whose gap to the rival exceeds the multiplier times its standard error."""
    error, bound = gap.standard_error, multiplier * gap.standard_error
    reason = (
        f"{100 * gap.size:.2f} points behind {rival} after {items} items a cell; "
        f"{100 * bound:.2f} were allowed ({multiplier:.2f} standard errors of {100 * error:.2f})"
    )
    return Departure(point, rung, rival, gap.size, error, bound, items, reason)


@dataclass(frozen=True, slots=True)
class Standing:
    """A row of the table: macro score over the first `items` items of each cell, the most that all cells have.

    `confirmed` is the score on the fresh items only, free of the winner's curse; None for points that have none.
    """

    point: str
    score: float
    items: int
    departed_at_rung: int | None
    confirmed: float | None


def left_by_name(standing: Sequence[Standing], count: int) -> list[str]:
    """The points after the first `count` that have the score of the last of these: only their names decided."""
    last = standing[: max(count, 1)][-1:]
    return [
        entry.point
        for entry in standing[count:]
        if entry.departed_at_rung is None and math.isclose(entry.score, last[0].score, abs_tol=1e-9)
    ]


class Race:
    """A race of points over the cells of a grid.

    Args:
        points: unique names.
        cells: every point answers items 0, 1, 2, … of each; item i is the same question for every point.
        rungs: items per cell at which departures are decided, ascending; rounded up to whole haystacks.
        keep: the number of best points to find. A point is compared with each of the `keep` best so far, and at least
            this many points stay. A comparison with the leader alone would lose the second and third best.
        z: a point leaves when its gap to each of them exceeds a Student quantile times the clustered standard error of
            the paired gap. The quantile has the tail probability of `z` standard normal errors, for each comparison.
            Its degrees of freedom are Satterthwaite's over the tasks: where one of 13 tasks tells the points apart,
            those of its haystacks alone.
        alpha: instead of `z`: the probability that any of the truly `keep` best points is ever dropped, split over
            these points, their rivals and the rungs (Bonferroni) and converted to a Student quantile too.
        costs: cost of one item in each cell, by default its length in tokens; costly blocks are handed out first.
        items_per_haystack: items k·m … k·m + m − 1 share a haystack.
        items_shared_across_lengths: item i of a task is the same question at every length, so that lengths are
            dependent.
        confirmation: fresh items per cell, numbered after the last rung's, for the `keep` winners at the end.
        shorter_stay: a point also stays while its answers have fewer tokens than those of one of the `keep` best.
    """

    def __init__(
        self,
        points: Sequence[str],
        cells: Sequence[Cell],
        *,
        rungs: Sequence[int] = RUNGS,
        keep: int = 1,
        z: float = 3.0,
        alpha: float | None = None,
        costs: Mapping[Cell, float] | None = None,
        items_per_haystack: int = 1,
        items_shared_across_lengths: bool = False,
        confirmation: int = 0,
        shorter_stay: bool = False,
    ) -> None:
        _refuse_nonsense(points, cells, rungs, keep, z, alpha)
        self.points = tuple(sorted(points))
        self.cells = tuple(cells)
        self.rungs = tuple(dict.fromkeys(_whole_haystacks(rung, items_per_haystack) for rung in rungs))
        self.keep = keep
        self.departures: list[Departure] = []
        self._z, self._alpha = z, alpha
        self._haystack = items_per_haystack
        self._costs = np.array([float(cell.length) if costs is None else costs[cell] for cell in cells])
        self._pairing = Pairing(cells, items_per_haystack, items_shared_across_lengths)
        self._point_index = {point: index for index, point in enumerate(self.points)}
        self._cell_index = {cell: index for index, cell in enumerate(self.cells)}
        self._items = self.rungs[-1] + _whole_haystacks(confirmation, items_per_haystack)
        self._scores = np.full((len(points), len(cells), self._items), np.nan)
        self.shorter_stay = shorter_stay
        self._tokens = np.full_like(self._scores, np.nan) if shorter_stay else None
        self._live = np.ones(len(points), dtype=np.bool_)
        self._barred = np.zeros(len(points), dtype=np.bool_)
        self._rung = 0

    @property
    def live(self) -> tuple[str, ...]:
        """Points that have not left, by name."""
        return tuple(point for point, live in zip(self.points, self._live, strict=True) if live)

    @property
    def finished(self) -> bool:
        """Whether every rung is decided and the confirmation items are recorded."""
        return self.decided and not self.next_blocks()

    @property
    def decided(self) -> bool:
        """Whether every rung is decided: what remains are the confirmation items of the winners."""
        return self._rung == len(self.rungs)

    @property
    def winners(self) -> tuple[str, ...]:
        """The best `keep` live points that are not barred, once every rung is decided."""
        return tuple(self.points[point] for point in self._winners().tolist())

    def bar(self, points: Collection[str]) -> None:
        """Bars points from winning, for a reason outside the race; the next best take their places."""
        self._barred[[self._point_index[point] for point in points if point in self._point_index]] = True

    def next_blocks(self) -> list[Block]:
        """The blocks that the next decision needs, costliest first; empty if all are recorded.

        Includes blocks that were returned before but are not recorded yet: the driver tracks blocks in progress.
        """
        if self._rung < len(self.rungs):
            missing = self._missing(np.flatnonzero(self._live), 0, self.rungs[self._rung])
        else:
            missing = self._missing(self._winners(), self.rungs[-1], self._items)
        return sorted(missing, key=lambda block: (-block.cost, block.cell, block.items.start, block.point))

    def record(
        self, point: str, cell: Cell, items: Sequence[int], scores: ArrayLike, tokens: ArrayLike | None = None
    ) -> None:
        """Records the scores, each in [0, 1], of these items, and the tokens of their answers, which `shorter_stay`
        needs, infinite for a question without an answer; in any order and any portions, also repeatedly.

        Raises `CorruptData` for a score out of range, or one that contradicts a recorded score.
        """
        values = np.asarray(scores, dtype=np.float64)
        row = self._scores[self._point_index[point], self._cell_index[cell]]
        index = np.asarray(items, dtype=np.intp)
        place = f"{point}, {cell.task} at {cell.length}"
        if values.shape != index.shape or not ((values >= 0) & (values <= 1)).all():
            raise CorruptData(f"{place}: expected {index.size} scores between 0 and 1; evaluate the items again")
        if index.size and not (index.min() >= 0 and index.max() < row.size):
            raise CorruptData(
                f"{place}: item {index.max()} is not one of this race's {row.size}; check the item numbers"
            )
        known = row[index]
        if (~np.isnan(known) & (known != values)).any():
            raise CorruptData(
                f"{place}: an item has two different scores; keep the first evaluation and drop the other"
            )
        row[index] = values
        if self._tokens is not None:
            self._tokens[self._point_index[point], self._cell_index[cell], index] = tokens

    def eliminate(self) -> list[Departure]:
        """Decides every rung whose scores are complete; returns the new departures, worst first."""
        already = len(self.departures)
        while self._rung < len(self.rungs) and self._complete(self.rungs[self._rung]):
            self.departures += self._decide(self.rungs[self._rung])
            self._rung += 1
        return self.departures[already:]

    def standing(self) -> tuple[Standing, ...]:
        """All points, best first: the live ones by score, then those that left, the latest first; ties by name."""
        left_at = {departure.point: departure.rung for departure in self.departures}
        rows = [self._standing(point, left_at.get(point)) for point in self.points]
        last = len(self.rungs)
        return tuple(
            sorted(
                rows,
                key=lambda row: (
                    -(last if row.departed_at_rung is None else row.departed_at_rung),
                    -row.score,
                    row.point,
                ),
            )
        )

    def spent(self) -> float:
        """Cost of all items recorded."""
        return float(np.sum(~np.isnan(self._scores), axis=(0, 2)) @ self._costs)

    def full_cost(self) -> float:
        """The cost if every point answered every item of the last rung."""
        return float(self._costs.sum() * len(self.points) * self.rungs[-1])

    def _missing(self, points: NDArray[np.intp], start: int, stop: int) -> list[Block]:
        gaps = np.isnan(self._scores[points, :, start:stop])
        edges = np.argwhere(np.diff(gaps.astype(np.int8), axis=2, prepend=0, append=0)).tolist()
        return [
            Block(
                self.points[points[row]],
                self.cells[column],
                range(start + first, start + last),
                float(self._costs[column]) * (last - first),
            )
            for (row, column, first), (_, _, last) in zip(edges[::2], edges[1::2], strict=True)
        ]

    def _complete(self, items: int) -> bool:
        return not np.isnan(self._scores[self._live, :, :items]).any()

    def _macro(self, points: NDArray[np.intp], start: int, stop: int) -> FloatArray:
        return np.asarray(self._scores[points, :, start:stop].mean(axis=2) @ self._pairing.weights, dtype=np.float64)

    def _ranked(self, items: int) -> tuple[NDArray[np.intp], FloatArray]:
        """Live points, best first and ties by name, and their macro scores over the first `items` items."""
        live = np.flatnonzero(self._live)
        macro = np.round(self._macro(live, 0, items), 12)  # equal scores summed in another order are still equal
        order = np.argsort(-macro, kind="stable")
        return live[order], macro[order]

    def _decide(self, items: int) -> list[Departure]:
        ranked = self._ranked(items)[0]
        if items // self._haystack < LEAST_HAYSTACKS:
            return []
        best, others = ranked[: self.keep].tolist(), ranked[self.keep :].tolist()
        found = [self._departure(point, best, items) for point in reversed(others)]
        departures = [departure for departure in found if departure is not None]
        self._live[[self._point_index[departure.point] for departure in departures]] = False
        return departures

    def _departure(self, point: int, best: Sequence[int], items: int) -> Departure | None:
        """The departure of a point that is significantly below each of the best; None for all others."""
        closest: Departure | None = None
        for rival in best:
            found = self._pairing.gap(self._scores[rival, :, :items], self._scores[point, :, :items])
            gap = found.size
            multiplier = student_quantile(1 - self._tail, found.degrees_of_freedom)
            bound = multiplier * found.standard_error
            if gap <= bound or found.rare > self._tail or self._is_shorter(point, rival, items):
                return None
            if closest is None or gap - bound < closest.gap - closest.bound:
                closest = departure(self.points[point], self._rung, self.points[rival], found, multiplier, items)
        return closest

    def _is_shorter(self, point: int, rival: int, items: int) -> bool:
        """Whether the answers of the point have fewer tokens, weighted as the score is."""
        if self._tokens is None:
            return False
        own, other = self._tokens[[point, rival], :, :items].mean(axis=2) @ self._pairing.weights
        return bool(own < other)

    @property
    def _tail(self) -> float:
        """The tail probability of one comparison at one rung."""
        if self._alpha is None:
            return normal_tail(self._z)
        return self._alpha / (self.keep * len(self.points) * len(self.rungs))

    def _winners(self) -> NDArray[np.intp]:
        ranked = self._ranked(self.rungs[-1])[0]
        return ranked[~self._barred[ranked]][: self.keep]

    def _standing(self, point: str, departed_at_rung: int | None) -> Standing:
        index = self._point_index[point]
        answered = ~np.isnan(self._scores[index, :, : self.rungs[-1]])
        items = int(answered.cumprod(axis=1).sum(axis=1).min())
        here = np.array([index])
        score = float(self._macro(here, 0, items)[0]) if items else 0.0
        confirmed = None
        if self._items > self.rungs[-1] and not np.isnan(self._scores[index, :, self.rungs[-1] :]).any():
            confirmed = float(self._macro(here, self.rungs[-1], self._items)[0])
        return Standing(point, score, items, departed_at_rung, confirmed)


def _refuse_nonsense(
    points: Sequence[str], cells: Sequence[Cell], rungs: Sequence[int], keep: int, z: float, alpha: float | None
) -> None:
    if not points or len(set(points)) < len(points):
        raise BadInput("race: points need names of their own; rename the doubled ones")
    if not cells or len(set(cells)) < len(cells):
        raise BadInput("race: no task and length to race over, or one of them twice; list each once")
    if not rungs or rungs[0] < 1 or any(later <= earlier for earlier, later in itertools.pairwise(rungs)):
        raise BadInput(f"race.rungs: {list(rungs)}; give growing numbers of items, such as {list(RUNGS)}")
    if keep < 1:
        raise BadInput(f"race.keep: {keep}; keep at least one point")
    if not z > 0:
        raise BadInput(f"race.z: {z}; give a positive number of standard errors, such as 3")
    if alpha is not None and not 0 < alpha < 1:
        raise BadInput(f"race.alpha: {alpha}; give a probability, such as 0.05")


def _whole_haystacks(items: int, items_per_haystack: int) -> int:
    return math.ceil(items / items_per_haystack) * items_per_haystack
