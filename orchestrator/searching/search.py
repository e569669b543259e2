"""The search: batches of new points that race with the older ones on the same items, a state machine without I/O.

A batch has new points, which answer the items of the first rung, and promotions: older points that answer those of the
next one. The driver adds a batch whenever one is `due`, evaluates `next_blocks`, passes the scores to `record`, and
calls `close`. Two batches are open at a time, so that workers never wait. Batch n is due when the batches up to n − 2
are closed, and it is made from their scores alone: the order in which answers arrive changes nothing.

`propose` makes the batch that is due. Its last bits may depend on the machine: the driver writes the batch once, and
adds the one that was written.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jobs.errors import CorruptData
from jobs.search import Choice, SearchSpec
from orchestrator.judging.estimates import macro_weights
from orchestrator.judging.pairing import Pairing
from orchestrator.judging.race import LEAST_HAYSTACKS, Block, Departure, departure
from orchestrator.judging.samples import Cell, FloatArray, student_quantile
from orchestrator.searching import greedy
from orchestrator.searching.encoding import all_choices
from orchestrator.searching.figures import Figures, figures
from orchestrator.searching.proposing import LISTED, Evidence, Proposal, Verdict, judge, means_of, propose, resolved

RUNGS = (5, 10, 20, 40, 80, 160, 320, 640, 1280, 2560)
FIRST_ITEMS_BEFORE = 10
"""Items a cell of a new point in batches that do not say it: their rungs began here. Greedy soups still begin here."""
PROMOTED = 0.5
"""Share of the cost that goes to promotions while there are new points to ask."""
SETTLED = 0.25
"""The share of a limit that is kept for promotions after the last new point: the best point then has many items."""
SURE = 0.95
"""A point is the best where the posterior says so with this probability."""
UNLIKELY = 0.05
"""A point with a smaller probability to be the best is not promoted."""
ALPHA = 0.05


@dataclass(frozen=True, slots=True)
class Promotion:
    """A point that was asked before, and the number of items of each cell that it has answered afterwards."""

    choice: Choice
    items: int


@dataclass(frozen=True, slots=True)
class Batch:
    """What is asked together. `seen` is the digest of the earlier batches and of the scores that it was made from.

    `items` is the number of items of each cell that a new point answers, None in batches of older versions.
    A batch without proposals and promotions waits for the one before it; two of them, or the first, end the search.
    """

    number: int
    proposals: tuple[Proposal, ...]
    promotions: tuple[Promotion, ...]
    seen: str
    items: int | None = None


@dataclass(frozen=True, slots=True)
class Found:
    """A row of the table. `score` and `spread` are the model's mean and standard deviation of the first objective.

    Of the best points, `score` is at most the average of the likely winners (`Verdict.shown`), and so no lucky one.
    `observed` is the plain mean of its items. `best` is the probability to be the best point that keeps the
    constraints, `feasible` that of keeping them; `batch` is the one that proposed it.
    """

    point: str
    choice: Choice
    score: float
    spread: float
    observed: float
    items: int
    best: float
    feasible: float
    batch: int
    left: Departure | None


@dataclass(frozen=True, slots=True)
class _Work:
    """Items start … stop − 1 of every cell, for a point or a parent."""

    point: str
    start: int
    stop: int


class Search:
    """A search over a space.

    Args:
        spec: the section of the job. Of its budget, `points` counts here; `limit` stands for tokens or hours.
        cells: every point answers items 0, 1, 2, … of each; item i is the same question for every point.
        items: items per cell that a point answers at the most, the last rung.
        parents: labels of models that answer all items that any point answers.
        ranked: the benchmarks of the objective `score`, by default all.
        costs: cost of one item in each cell, by default its length in tokens.
        limit: the most that may be spent on points and parents, in units of the costs.
        name: the name of a point, unique.
        items_per_haystack, items_shared_across_lengths: as in `Race`.
        mergeable: whether a point is a merge; the search proposes no other, but for `start` and greedy soups. A call
            may take milliseconds, and points are asked for again: it should keep its answers.
    """

    def __init__(
        self,
        spec: SearchSpec,
        cells: Sequence[Cell],
        *,
        items: int,
        seed: int,
        parents: Sequence[str] = (),
        ranked: Sequence[str] = (),
        costs: Mapping[Cell, float] | None = None,
        limit: float | None = None,
        name: Callable[[Choice], str] | None = None,
        rungs: Sequence[int] = RUNGS,
        items_per_haystack: int = 1,
        items_shared_across_lengths: bool = False,
        mergeable: Callable[[Choice], bool] = lambda choice: True,
    ) -> None:
        self.spec, self.cells, self.parents = spec, tuple(cells), tuple(parents)
        self.batches: list[Batch] = []
        self.departures: list[Departure] = []
        """The points that are not promoted again; each is significantly below its rival on the same items."""
        self.choices: dict[str, Choice] = {}
        whole = [math.ceil(rung / items_per_haystack) * items_per_haystack for rung in (*rungs, items)]
        self.rungs = tuple(dict.fromkeys(rung for rung in whole if rung <= whole[-1]))
        self._before = min((rung for rung in self.rungs if rung >= FIRST_ITEMS_BEFORE), default=self.rungs[-1])
        if spec.by == "greedy":
            self.rungs = self.rungs[self.rungs.index(self._before) :]
        self._seed, self._limit, self._name = seed, limit, name or spec.space.described
        self._unit = float(sum(cell.length if costs is None else costs[cell] for cell in cells))
        self._costs = {cell: float(cell.length) if costs is None else costs[cell] for cell in cells}
        self._haystack, self._shared = items_per_haystack, items_shared_across_lengths
        self.mergeable = mergeable
        self._column = {cell: index for index, cell in enumerate(self.cells)}
        self._ranked = tuple(ranked)
        self._work: list[list[_Work]] = []
        self._items: dict[str, list[tuple[int, int]]] = {}  # of each point: batch, and items after it
        self._scores: dict[str, FloatArray] = {}
        self._tokens: dict[str, FloatArray] = {}
        self.closed = 0
        """Batches whose scores are complete."""
        self._free: set[str] = set()  # points whose answers are those of a parent
        self._left_in: dict[str, int] = {}  # the batch that was closed when a point left
        self._judged: dict[int, tuple[tuple[str, ...], Evidence, Verdict]] = {}
        self._spent_on_new = self._spent_on_promotions = self._spent_on_parents = 0.0

    @property
    def due(self) -> int | None:
        """The number of the batch that must be added now, or None."""
        number = len(self.batches)
        return None if self._ended or number > self.closed + 1 else number

    @property
    def finished(self) -> bool:
        """Whether the last batch is closed."""
        return self._ended and self.closed == len(self.batches)

    @property
    def committed(self) -> float:
        """Cost of everything that the batches ask, in units of the costs."""
        return self._spent_on_new + self._spent_on_promotions + self._spent_on_parents

    def propose(self) -> Batch:
        """The batch that is due, from the closed batches before the last one. At most a second for 300 points."""
        number = len(self.batches)
        if self.spec.by == "greedy":
            return self._greedy(number)
        spec, room = self.spec, self._room()
        proposals: tuple[Proposal, ...] = ()
        promotions = self._promotions(number, room, more=self._wants_new(room))
        room -= self._promotions_cost(promotions)
        room -= self._parents_cost([promotion.items for promotion in promotions])
        count = spec.batch
        if spec.budget.points is not None:
            count = min(count, spec.budget.points - len(self.choices))
        while count > 0 and self._cost([self.rungs[0]] * count) + self._first_parents_cost() > self._room_for_new(room):
            count -= 1
        if count > 0:
            proposals = self._first(count) if number == 0 else ()
        if count > len(proposals):
            _, evidence, _ = self.evidence(number - 2)
            asked = (*self.choices.values(), *(each.choice for each in proposals))
            pending = [choice for choice in asked if choice not in evidence.choices]
            proposals += propose(
                spec.space,
                evidence,
                pending,
                by=spec.by,
                count=count - len(proposals),
                number=number,
                seed=self._seed,
                first=spec.maximize[0],
                start=spec.start,
                batch=spec.batch,
                mergeable=self.mergeable,
            )
            if not proposals:  # a large space without another point that can be merged, as far as was looked
                promotions = self._promotions(number, self._room(), more=False)
        return Batch(number, proposals, promotions, self._digest(number), self.rungs[0])

    def add(self, batch: Batch, free: Collection[str] = ()) -> None:
        """Adds the batch that is due, as it was written.

        `free` names points of it that are parents: the cost of their answers counts once, with the parents.

        Raises `CorruptData` for another number, or a batch that was made from other scores or batches.
        """
        number = len(self.batches)
        if batch.number != self.due:
            raise CorruptData(f"batch {batch.number}: batch {self.due} is due; remove the files of later batches")
        if batch.seen != self._digest(number):
            raise CorruptData(
                f"batch {number}: made from other scores than those in the store; restore them, or begin a new run"
            )
        self._free |= {*free}
        self._spent_on_promotions += self._promotions_cost(batch.promotions)
        items = self._before if batch.items is None else batch.items
        work: list[_Work] = []
        for proposal in batch.proposals:
            name = self._name(proposal.choice)
            self.choices[name] = proposal.choice
            self._items[name] = []
            work.append(_Work(name, 0, items))
        for promotion in batch.promotions:
            name = self._name(promotion.choice)
            work.append(_Work(name, self._known(promotion.choice), promotion.items))
        most = max((each.stop for each in work), default=0)
        first = max((items for _, items in self._items.get("", ())), default=0)
        if self.parents and most > first:
            self._items.setdefault("", []).append((number, most))
            work += [_Work(parent, first, most) for parent in self.parents]
            self._spent_on_parents += len(self.parents) * (most - first) * self._unit
        for each in work:
            if each.point not in self.parents:
                self._items[each.point].append((number, each.stop))
            for known in (self._scores, self._tokens):
                old = known.get(each.point, np.empty((len(self.cells), 0)))
                known[each.point] = np.pad(old, ((0, 0), (0, each.stop - old.shape[1])), constant_values=np.nan)
        new = [proposal for proposal in batch.proposals if self._name(proposal.choice) not in self._free]
        self._spent_on_new += self._cost([items] * len(new))
        self.batches.append(batch)
        self._work.append(work)

    def next_blocks(self) -> list[Block]:
        """The blocks that are not recorded yet: the older batch first, in it the costliest.

        Includes blocks that were returned before: the driver tracks blocks in progress.
        """
        found: list[Block] = []
        for work in self._work[self.closed :]:
            blocks = [block for each in work for block in self._missing(each)]
            found += sorted(blocks, key=lambda block: (-block.cost, block.cell, block.items.start, block.point))
        return found

    def record(
        self, point: str, cell: Cell, items: Sequence[int], scores: ArrayLike, tokens: ArrayLike | None = None
    ) -> None:
        """Records the scores, each in [0, 1], of these items, and the tokens of their answers; in any order.

        Raises `CorruptData` for a score out of range, or one that contradicts a recorded score.
        """
        values = np.asarray(scores, dtype=np.float64)
        index = np.asarray(items, dtype=np.intp)
        row = self._scores[point][self._column[cell]]
        place = f"{point}, {cell.task} at {cell.length}"
        if values.shape != index.shape or not np.all((values >= 0) & (values <= 1)):
            raise CorruptData(f"{place}: expected {index.size} scores between 0 and 1; evaluate the items again")
        if index.size and not (index.min() >= 0 and index.max() < row.size):
            raise CorruptData(f"{place}: item {index.max()} was not asked; check the item numbers")
        known = row[index]
        if np.any(~np.isnan(known) & (known != values)):
            raise CorruptData(f"{place}: an item has two different scores; keep the first and drop the other")
        row[index] = values
        if tokens is not None:
            self._tokens[point][self._column[cell]][index] = np.asarray(tokens, dtype=np.float64)

    def close(self) -> list[Departure]:
        """Closes every batch whose scores are complete, in order; returns the new departures."""
        before = len(self.departures)
        while self.closed < len(self.batches) and not any(
            True for work in self._work[self.closed] for _ in self._missing(work)
        ):
            self.closed += 1
            leaving = self._leaving(self.closed - 1)
            self.departures += leaving
            self._left_in |= {each.point: self.closed - 1 for each in leaving}
        return self.departures[before:]

    def standing(self) -> tuple[Found, ...]:
        """All points of closed batches: those that keep the constraints first, by the model's score; ties by name."""
        names, evidence, verdict = self.evidence(self.closed - 1)
        left = {each.point: each for each in self.departures}
        sign = self.spec.maximize[0].sign
        rows = [
            Found(
                name,
                choice,
                sign * float(verdict.shown[index]),
                float(verdict.spread[index]),
                sign * self._observed(name, self.closed - 1),
                self._answered(name, self.closed - 1),
                float(verdict.best[index]),
                float(verdict.feasible[index]),
                self._items[name][0][0],
                left.get(name),
            )
            for index, (name, choice) in enumerate(zip(names, evidence.choices, strict=True))
        ]
        means = dict(zip(names, verdict.mean.tolist(), strict=True))
        soup = self.soup(self.closed - 1).choice if self.spec.by == "greedy" else None
        return tuple(
            sorted(rows, key=lambda row: (row.choice != soup, row.feasible < 0.5, -means[row.point], row.point))
        )

    def front(self) -> tuple[Found, ...]:
        """With several objectives: the points that no other one exceeds in all of them, by the model's means."""
        _, evidence, _ = self.evidence(self.closed - 1)
        means = means_of(self.spec.space, evidence, by=self.spec.by)
        rows = {row.choice: row for row in self.standing()}
        kept: list[Found] = []
        for index, choice in enumerate(evidence.choices):
            exceeded = np.all(means >= means[:, [index]], axis=0) & np.any(means > means[:, [index]], axis=0)
            if not exceeded.any() and rows[choice].feasible >= 0.5:
                kept.append(rows[choice])
        return tuple(kept)

    def soup(self, batch: int) -> greedy.Soup:
        """The greedy soup by the scores up to this batch."""
        columns, weights = self._weighted(self.spec.maximize[0].metric)
        pairing = Pairing([self.cells[column] for column in columns], self._haystack, self._shared, weights)
        scores = {
            choice: self._scores[name][columns, : self._answered(name, batch)] for name, choice in self.choices.items()
        }
        return greedy.soup(self.spec.space, scores, pairing, self.rungs, haystack=self._haystack)

    def leader(self, batch: int) -> int | None:
        """The index of the best point when this batch is closed: the soup, or the one with the highest mean."""
        names, _, verdict = self.evidence(batch)
        if not names:
            return None
        if self.spec.by == "greedy" and (soup := self.soup(batch).choice) is not None:
            return names.index(self._name(soup))
        return int(np.argmax(np.where(verdict.feasible >= 0.5, verdict.mean, verdict.mean - 1e6)))

    @property
    def sure(self) -> bool:
        """Whether the first point of the table is the best of those asked with a probability of 95 %."""
        standing = self.standing()
        return bool(standing) and standing[0].best >= SURE

    def _greedy(self, number: int) -> Batch:
        """Each model alone on all items; then one model after the other joins the soup, or does not."""
        alone, room = greedy.singles(self.spec.space), self._room()
        most = self.spec.budget.points
        missing = [choice for choice in alone if choice not in self.choices.values()][: self.spec.batch]
        new = [Proposal(choice, "a model alone: greedy tries the best of them first") for choice in missing]
        wanted = {choice: self.rungs[-1] for choice in self.choices.values() if choice in alone}
        soup = self.soup(number - 2)
        if soup.choice is not None and soup.tried is not None:
            if soup.tried not in self.choices.values():
                described = self.spec.space.described
                new = [Proposal(soup.tried, f"is {described(soup.choice)} as good with one more model?")]
            else:
                wanted = dict.fromkeys((soup.choice, soup.tried), soup.items)
        promotions: list[Promotion] = []
        for choice, items in wanted.items():
            asked = [*(each.items for each in promotions), items]
            promotion = Promotion(choice, items)
            cost = self._promotions_cost([promotion])
            if self._known(choice) < items and cost + self._parents_cost(asked) <= room:
                promotions.append(promotion)
                room -= cost
        room -= self._parents_cost([each.items for each in promotions] or [0])
        if most is not None:
            new = new[: max(0, most - len(self.choices))]
        while new and self._cost([self.rungs[0]] * len(new)) + self._first_parents_cost() > room:
            new.pop()
        return Batch(number, tuple(new), tuple(promotions), self._digest(number), self.rungs[0])

    def _first(self, count: int) -> tuple[Proposal, ...]:
        """The points of `start`; without them, `gp` begins in the middle of the space and at its ends."""
        spec = self.spec
        if spec.start or resolved(spec.space, spec.by) != "gp":
            return tuple(Proposal(choice, "asked for by `start`") for choice in spec.start[:count])
        found = {spec.space.middle(): "the middle of the space"}
        for reason, choice in spec.space.ends().items():
            found.setdefault(choice, reason)
        return tuple(Proposal(*each) for each in found.items() if self.mergeable(each[0]))[:count]

    @property
    def _ended(self) -> bool:
        asked = [bool(batch.proposals or batch.promotions) for batch in self.batches]
        return asked == [False] or asked[-2:] == [False, False]  # the second has seen all that was asked

    def _missing(self, work: _Work) -> list[Block]:
        gaps = np.isnan(self._scores[work.point][:, work.start : work.stop])
        blocks: list[Block] = []
        for column in np.flatnonzero(gaps.any(axis=1)).tolist():
            edges = np.flatnonzero(np.diff(gaps[column].astype(np.int8), prepend=0, append=0)) + work.start
            cell = self.cells[column]
            for first, last in edges.reshape(-1, 2).tolist():
                blocks.append(Block(work.point, cell, range(first, last), self._costs[cell] * (last - first)))
        return blocks

    def _cost(self, items: Sequence[int]) -> float:
        return float(sum(items)) * self._unit

    def _promotions_cost(self, promotions: Sequence[Promotion]) -> float:
        asked = [each for each in promotions if self._name(each.choice) not in self._free]
        return self._cost([each.items - self._known(each.choice) for each in asked])

    def _room(self) -> float:
        return math.inf if self._limit is None else self._limit - self.committed

    def _room_for_new(self, room: float) -> float:
        """What new points may cost of this room; all of it in the first batch."""
        return room if self._limit is None or not self.batches else room - SETTLED * self._limit

    def _parents_cost(self, items: Sequence[int]) -> float:
        known = max((count for _, count in self._items.get("", ())), default=0)
        return len(self.parents) * self._cost([max(0, max(items, default=0) - known)])

    def _first_parents_cost(self) -> float:
        return self._parents_cost([self.rungs[0]])

    def _wants_new(self, room: float) -> bool:
        """Whether the budget has room for a new point and there is one; in large spaces one is taken for granted."""
        space, asked, most = self.spec.space, {*self.choices.values()}, self.spec.budget.points
        if (most is not None and len(asked) >= most) or self._cost([self.rungs[0]]) > self._room_for_new(room):
            return False
        if space.size > LISTED + len(asked):
            return True
        return any(choice not in asked and self.mergeable(choice) for choice in all_choices(space))

    def _known(self, choice: Choice) -> int:
        return self._items[self._name(choice)][-1][1]

    def _answered(self, name: str, batch: int) -> int:
        """Items a cell that the point has answered when this batch is closed."""
        return max((items for number, items in self._items[name] if number <= batch), default=0)

    def _promotions(self, number: int, room: float, *, more: bool) -> tuple[Promotion, ...]:
        """The likeliest best points, one rung each: within the share of the cost while `more` points are to be new."""
        names, _, verdict = self.evidence(number - 2)
        if not names:
            return ()
        left = {name for name, batch in self._left_in.items() if batch <= number - 2}
        allowed = PROMOTED / (1 - PROMOTED) * self._spent_on_new - self._spent_on_promotions if more else math.inf
        top = [name for name in names if self._items[name][-1][1] == self.rungs[-1]]
        settled = sum(float(verdict.best[names.index(name)]) for name in top)
        if not more and settled >= SURE:
            return ()
        found: list[Promotion] = []
        order = np.argsort(-verdict.best, kind="stable").tolist()
        for index in order:
            name = names[index]
            items = self._items[name][-1][1]
            if verdict.best[index] < UNLIKELY or len(found) == self.spec.batch:
                break
            if name in left or items == self.rungs[-1] or items != self._answered(name, number - 2):
                continue
            target = self.rungs[self.rungs.index(items) + 1]
            wanted = [*found, Promotion(self.choices[name], target)]
            spent = self._promotions_cost(wanted)
            if spent > allowed or spent + self._parents_cost([each.items for each in wanted]) > room:
                break
            found = wanted
        return tuple(found)

    def evidence(self, batch: int) -> tuple[tuple[str, ...], Evidence, Verdict]:
        """The points that batches up to this one have asked, their figures, and the verdict on them."""
        if batch in self._judged:
            return self._judged[batch]
        names = tuple(name for name in self.choices if self._items[name][0][0] <= batch)
        if not names:
            nothing = np.empty(0)
            return (), Evidence((), ()), Verdict(nothing, nothing, nothing, nothing, nothing)
        counts = np.array([self._answered(name, batch) for name in names], dtype=np.intp)
        parents = max((items for number, items in self._items.get("", ()) if number <= batch), default=0)
        found: list[Figures] = []
        spec = self.spec
        for metric, sign in [(each.metric, each.sign) for each in spec.maximize]:
            parts, controls = self._parts(metric, names, counts, self.parents, parents)
            found.append(figures(sign * parts, counts // self._haystack, sign * controls))
        for constraint in spec.at_least:
            parts, controls = self._parts(constraint.metric, names, counts, self.parents, parents)
            reference = controls[self.parents.index(constraint.of)][None, :, : parts.shape[2]]
            margin = constraint.margin / 100 / parts.shape[1]
            inside = np.arange(parts.shape[2]) < (counts // self._haystack)[:, None]
            apart = np.where(inside[:, None, :], parts - reference + margin, 0.0)
            found.append(figures(apart, counts // self._haystack, controls))
        objectives = len(spec.maximize)
        evidence = Evidence(
            tuple(self.choices[name] for name in names), tuple(found[:objectives]), tuple(found[objectives:])
        )
        verdict = judge(spec.space, evidence, by=spec.by, seed=self._seed)
        self._judged = {key: value for key, value in self._judged.items() if key >= batch - 2}
        self._judged[batch] = names, evidence, verdict
        return self._judged[batch]

    def _parts(
        self, metric: str, names: Sequence[str], counts: NDArray[np.intp], parents: Sequence[str], most: int
    ) -> tuple[FloatArray, FloatArray]:
        """Parts of a figure, as `figures` wants them, of points and of parents."""
        columns, weights = self._weighted(metric)
        known = self._tokens if metric.partition("@")[0] == "output_tokens" else self._scores
        pairing = Pairing([self.cells[column] for column in columns], self._haystack, self._shared, weights)

        def of(name: str, count: int) -> FloatArray:
            parts = pairing.parts(known[name][columns, :count])
            return parts * parts.shape[1]

        height = int(counts.max()) // self._haystack
        made = [of(name, count) for name, count in zip(names, counts.tolist(), strict=True)]
        padded = np.stack([np.pad(parts, ((0, 0), (0, height - parts.shape[1]))) for parts in made])
        if not parents:
            return padded, np.empty((0, *padded.shape[1:]))
        return padded, np.stack([of(parent, most) for parent in parents])

    def _weighted(self, metric: str) -> tuple[list[int], FloatArray]:
        """The cells of a figure, and their weights."""
        name, _, length = metric.partition("@")
        columns = [
            column
            for column, cell in enumerate(self.cells)
            if (not length or cell.length == int(length))
            and (name == cell.benchmark or name == "output_tokens" or (name == "score" and self._ranks(cell)))
        ]
        return columns, macro_weights([self.cells[column] for column in columns])

    def _ranks(self, cell: Cell) -> bool:
        return not self._ranked or cell.benchmark in self._ranked

    def _observed(self, name: str, batch: int) -> float:
        columns, weights = self._weighted(self.spec.maximize[0].metric)
        known = self._tokens if self.spec.maximize[0].metric.startswith("output_tokens") else self._scores
        sign = self.spec.maximize[0].sign
        return sign * float(weights @ known[name][columns, : self._answered(name, batch)].mean(axis=1))

    def _leaving(self, batch: int) -> list[Departure]:
        """The points that are significantly below the leader when this batch is closed; none with several objectives.

        The level is split over all points that the budget allows, and the rungs: a truly best point leaves with
        probability `ALPHA` at the most, as in the race.
        """
        objective = self.spec.maximize[0]
        if self.spec.by == "greedy" or len(self.spec.maximize) > 1 or objective.metric.startswith("output_tokens"):
            return []
        names, _, verdict = self.evidence(batch)
        if not names:
            return []
        gone = {*self._left_in}
        ranked = [index for index in np.argsort(-verdict.mean, kind="stable").tolist() if names[index] not in gone]
        likely = [index for index in ranked if verdict.feasible[index] >= 0.5]
        if not likely:
            return []
        leader = names[likely[0]]
        columns, weights = self._weighted(objective.metric)
        pairing = Pairing([self.cells[column] for column in columns], self._haystack, self._shared, weights)
        tail = ALPHA / (self._most_points() * len(self.rungs))
        found: list[Departure] = []
        for name in (names[index] for index in ranked if names[index] != leader):
            items = min(self._answered(name, batch), self._answered(leader, batch))
            if items // self._haystack < LEAST_HAYSTACKS:
                continue
            higher, lower = (leader, name) if objective.sign > 0 else (name, leader)
            gap = pairing.gap(self._scores[higher][columns, :items], self._scores[lower][columns, :items])
            multiplier = student_quantile(1 - tail, gap.degrees_of_freedom)
            if gap.size > multiplier * gap.standard_error and gap.rare <= tail:
                found.append(departure(name, self.rungs.index(items), leader, gap, multiplier, items))
        return found

    def _most_points(self) -> int:
        limits = [self.spec.space.size]
        if self.spec.budget.points is not None:
            limits.append(self.spec.budget.points)
        if self._limit is not None:
            limits.append(int(self._limit / self._cost([self.rungs[0]])))
        return max(2, min(limits))

    def _digest(self, number: int) -> str:
        """Of the earlier batches, and of the scores and tokens of those before the last one."""
        found = hashlib.sha256()
        for batch in self.batches:
            choices = [[*proposal.choice] for proposal in batch.proposals]
            promoted = [[*promotion.choice, promotion.items] for promotion in batch.promotions]
            found.update(json.dumps([batch.number, choices, promoted, batch.seen]).encode())
        for work in itertools.chain.from_iterable(self._work[: max(0, number - 1)]):
            for known in (self._scores, self._tokens):
                found.update(np.ascontiguousarray(known[work.point][:, work.start : work.stop]).tobytes())
        return found.hexdigest()
