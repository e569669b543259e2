"""Evaluate every point, or race them: the same items for all, in blocks whose scores stay in the store.

A block that has its file of scores is done: nothing is asked twice, in this run or the next.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from jobs.errors import BadInput
from jobs.evaluation import EvaluationTask, ItemSet, ModelSpec, ScoreRow
from jobs.job import Evaluation, RaceSpec
from jobs.tasks import FORMAT, digest
from orchestrator.compatibility import context_fields
from orchestrator.ledger import Lease, Ledger
from orchestrator.planning import Plan, PlannedPoint, parents_as_points
from orchestrator.racing import RUNGS, Departure, Race, Standing
from orchestrator.statistics import Cell, FlipRate, flip_rate, macro_weights
from orchestrator.watching import Watcher
from workers.benchmarks.building import PlannedSet, planned_sets, stored
from workers.benchmarks.tokens import Tokenizer
from workers.scores import read_scores
from workers.storage import open_store

BLOCK_TOKENS = 1 << 20
"""A block of items is cut at about this many context tokens: minutes of work, so that little is lost or waited for."""

NOISE_ITEMS = 25
"""Items of each set that one point answers a second time, to see how often an answer flips by itself."""


class Evaluators(Protocol):
    """Workers that hold a model each and answer blocks."""

    @property
    def workers(self) -> int:
        """How many blocks are answered at once."""
        ...

    def submit(self, worker: int, task: EvaluationTask) -> None:
        """Gives a block to an idle worker."""
        ...

    def next_done(self) -> tuple[int, EvaluationTask, list[ScoreRow]]:
        """Waits for any worker; raises what no retry mended."""
        ...

    def close(self) -> None:
        """Lets go of the workers."""
        ...


class OpenEvaluators(Protocol):
    """Starts evaluators for a model."""

    def __call__(self, model: ModelSpec) -> Evaluators: ...


@dataclass(frozen=True)
class EvaluationResult:
    """All scores of a run, and what the race made of them; `standing` is best first, baselines apart."""

    rows: list[ScoreRow]
    cells: tuple[Cell, ...]
    standing: tuple[Standing, ...]
    departures: tuple[Departure, ...]
    baselines: tuple[str, ...]
    noise: FlipRate | None
    cost_share: float


def evaluate(plan: Plan, open_evaluators: OpenEvaluators, watcher: Watcher) -> EvaluationResult:
    """Every point's scores, or as many as the race needs; parents answer everything, as baselines."""
    evaluation = plan.job.evaluate
    if evaluation is None:
        raise BadInput(f"{plan.job.source}: nothing to evaluate; add `evaluate:`")
    ledger = Ledger(plan.run_url, plan.places)
    with Lease(ledger.store, plan.places.record("lease.json")) as lease:
        ledger.claim(plan.job.text, plan.document())
        layout = _one_layout(plan)
        tokenizer = _tokenizer(plan, layout)
        fresh = _fresh_items(evaluation)
        planned = planned_sets(evaluation, tokenizer, plan.job.seed, extra=fresh)
        _check_lengths(planned, layout, evaluation)
        sets = {Cell(entry.task, entry.length): stored(entry, ledger.store) for entry in planned}
        session = _Session(plan, layout, ledger, lease, open_evaluators, watcher)
        try:
            return session.run(evaluation, sets, fresh)
        finally:
            session.close()


class _Session:
    """One evaluation at work: which blocks are known, which are running, and what they said."""

    def __init__(
        self,
        plan: Plan,
        layout: PlannedPoint,
        ledger: Ledger,
        lease: Lease,
        open_evaluators: OpenEvaluators,
        watcher: Watcher,
    ) -> None:
        self._plan, self._ledger, self._lease, self._watcher = plan, ledger, lease, watcher
        self._model = _model_spec(plan, layout)
        self._open = open_evaluators
        self._evaluators: Evaluators | None = None
        self._files = {info.key for info in ledger.store.list("scores/")}
        self._rows: dict[str, list[ScoreRow]] = {}
        self.baselines = {planned.name: planned for planned in parents_as_points(plan, layout.layout)}
        self.points = {planned.name: planned for planned in plan.merges}

    def run(self, evaluation: Evaluation, sets: Mapping[Cell, ItemSet], fresh: int) -> EvaluationResult:
        """The race or the whole grid, then the parents, then the noise floor. `fresh` items are for winners alone."""
        raced = {cell: items for cell, items in sets.items() if items.benchmark != "perplexity"}
        race = _race(evaluation.race, tuple(self.points), raced, fresh) if evaluation.race and raced else None
        if race is not None:
            self._run_race(race, raced)
        full = {cell: items if cell not in raced else _without(items, fresh) for cell, items in sets.items()}
        stayed = race.live if race is not None else tuple(self.points)
        rest = {cell: items for cell, items in full.items() if race is None or cell not in raced}
        self._ask([(self.points[name], items) for name in stayed for items in rest.values()], "evaluating")
        self._ask([(planned, items) for planned in self.baselines.values() for items in full.values()], "parents")
        standing = race.standing() if race is not None else _standing(self._every_row(), tuple(self.points))
        return EvaluationResult(
            rows=self._every_row(),
            cells=tuple(raced),
            standing=standing,
            departures=tuple(race.departures) if race is not None else (),
            baselines=tuple(self.baselines),
            noise=self._noise(self.points[standing[0].point], raced) if standing else None,
            cost_share=race.spent() / race.full_cost() if race is not None else 1.0,
        )

    def _run_race(self, race: Race, sets: Mapping[Cell, ItemSet]) -> None:
        while not race.finished:
            tasks = [
                task
                for block in race.next_blocks()
                for task in self._tasks(self.points[block.point], sets[block.cell], block.items)
            ]
            for task, rows in self._answers(tasks, f"racing {len(race.live)} points"):
                scores = {row.item: row.score for row in rows}
                cell = Cell(task.items.task, task.items.length)
                race.record(task.point, cell, list(scores), list(scores.values()))
            for departure in race.eliminate():
                self._watcher.departed(departure)

    def _ask(self, wanted: Sequence[tuple[PlannedPoint, ItemSet]], text: str) -> None:
        tasks = [task for planned, items in wanted for task in self._tasks(planned, items, range(items.count))]
        for _ in self._answers(tasks, text):
            pass

    def _noise(self, leader: PlannedPoint, sets: Mapping[Cell, ItemSet]) -> FlipRate | None:
        """How often the leader's own answers flip when it is asked the same again."""
        tasks = [
            task
            for items in sets.values()
            for task in self._tasks(leader, items, range(min(NOISE_ITEMS, items.count)), repeat=1)
        ]
        second = {_place(row): row.score for _, rows in self._answers(tasks, "asking again") for row in rows}
        first = {_place(row): row.score for row in self._every_row() if row.point == leader.name}
        pairs = [(first[place], score) for place, score in sorted(second.items()) if place in first]
        return flip_rate([before for before, _ in pairs], [after for _, after in pairs]) if pairs else None

    def _tasks(
        self, planned: PlannedPoint, items: ItemSet, wanted: range, *, repeat: int = 0
    ) -> Iterator[EvaluationTask]:
        """Blocks of a fixed grid that cover the wanted items: however a run was cut, its blocks are the same."""
        step = max(1, min(64, BLOCK_TOKENS // items.length) // items.share) * items.share
        for start in range(wanted.start // step * step, wanted.stop, step):
            first, last = max(start, wanted.start), min(start + step, wanted.stop)
            unit = digest(
                [FORMAT, planned.digest, items.key, first, last, self._model.engine, dict(self._model.options), repeat]
            )
            key = f"scores/{planned.name}/{items.task}-{items.length}-{first:05d}-{unit[:16]}.parquet"
            yield EvaluationTask(planned.name, planned.digest, planned.settings, items, first, last, repeat, key)

    def _answers(self, tasks: Iterable[EvaluationTask], text: str) -> Iterator[tuple[EvaluationTask, list[ScoreRow]]]:
        """Each block's scores as they come: first those that lie in the store, then those that workers answer."""
        waiting: dict[str, list[EvaluationTask]] = defaultdict(list)
        for task in tasks:
            if task.key in self._rows:
                yield task, self._rows[task.key]
            elif task.key in self._files:
                self._rows[task.key] = read_scores(bytes(self._ledger.store.read(task.key)), task.key)
                yield task, self._rows[task.key]
            else:
                waiting[task.point].append(task)
        if not waiting:
            return
        self._watcher.begin_stage(sum(task.tokens for queue in waiting.values() for task in queue), text)
        for task, rows in self._dispatch(waiting):
            self._lease.check()
            self._rows[task.key] = rows
            self._watcher.answered(task)
            yield task, rows

    def _dispatch(self, waiting: dict[str, list[EvaluationTask]]) -> Iterator[tuple[EvaluationTask, list[ScoreRow]]]:
        """Longest first; a worker stays with its point while that has blocks, for becoming another one costs time."""
        if self._evaluators is None:
            self._evaluators = self._open(self._model)
        for queue in waiting.values():
            queue.sort(key=lambda task: task.tokens)
        holds: dict[int, str] = {}
        idle = set(range(self._evaluators.workers))
        while waiting or len(idle) < self._evaluators.workers:
            for worker in sorted(idle):
                point = _next_point(waiting, holds.get(worker), set(holds.values()))
                if point is None:
                    break
                self._evaluators.submit(worker, waiting[point].pop())
                if not waiting[point]:
                    del waiting[point]
                holds[worker] = point
                idle.discard(worker)
            worker, task, rows = self._evaluators.next_done()
            idle.add(worker)
            yield task, rows

    def _every_row(self) -> list[ScoreRow]:
        rows = [row for block in self._rows.values() for row in block if row.repeat == 0]
        return sorted(rows, key=lambda row: (row.point, row.benchmark, row.task, row.length, row.item))

    def close(self) -> None:
        """Lets go of the workers."""
        if self._evaluators is not None:
            self._evaluators.close()


def _next_point(waiting: Mapping[str, Sequence[EvaluationTask]], held: str | None, taken: set[str]) -> str | None:
    """The point a worker should answer for next: its own, else the costliest that nobody holds, else the costliest."""
    if held is not None and held in waiting:
        return held
    free = [point for point in waiting if point not in taken] or list(waiting)
    return max(free, key=lambda point: (sum(task.tokens for task in waiting[point]), point), default=None)


def _place(row: ScoreRow) -> tuple[str, int, int]:
    return row.task, row.length, row.item


def _without(items: ItemSet, fresh: int) -> ItemSet:
    return replace(items, count=items.count - -(-fresh // items.share) * items.share)


def _race(spec: RaceSpec, points: Sequence[str], sets: Mapping[Cell, ItemSet], fresh: int) -> Race:
    """The race of a job: rungs up to the fewest items that any set has, winners confirmed on fresh ones."""
    share = math.lcm(*(items.share for items in sets.values()))
    items = min(_without(items, fresh).count for items in sets.values()) // share * share
    if items == 0:
        raise BadInput(f"{spec.place}: a race needs at least {share} items in every set, whole haystacks; ask for more")
    return Race(
        points,
        list(sets),
        rungs=[rung for rung in RUNGS if -(-rung // share) * share < items] + [items],
        keep=min(spec.keep, len(points)),
        alpha=spec.alpha,
        items_per_haystack=share,
        items_shared_across_lengths=True,
        confirmation=fresh // share * share,
    )


def _fresh_items(evaluation: Evaluation) -> int:
    """Items that only the winners of a race answer: half as many as the race has."""
    if evaluation.race is None:
        return 0
    counts = [spec.items for spec in (evaluation.ruler,) if spec is not None]
    counts += [spec.items * spec.depths for spec in (evaluation.needle,) if spec is not None]
    return min(counts, default=0) // 2


def _standing(rows: Sequence[ScoreRow], points: Sequence[str]) -> tuple[Standing, ...]:
    """Every point's macro score, best first: tasks count alike within a length, lengths alike."""
    by_point: dict[str, dict[Cell, list[float]]] = {point: defaultdict(list) for point in points}
    for row in rows:
        if row.point in by_point and row.benchmark != "perplexity":
            by_point[row.point][Cell(row.task, row.length)].append(row.score)
    found: list[Standing] = []
    for point, cells in by_point.items():
        if cells:
            means = [sum(scores) / len(scores) for scores in cells.values()]
            score = float(macro_weights(list(cells)) @ means)
            found.append(Standing(point, score, min(len(scores) for scores in cells.values()), None, None))
    return tuple(sorted(found, key=lambda standing: (-standing.score, standing.point)))


def _one_layout(plan: Plan) -> PlannedPoint:
    layouts = {id(planned.layout) for planned in plan.merges}
    if len(layouts) > 1:
        raise BadInput(
            f"{plan.job.source}: the points have {len(layouts)} different layouts (parents or dtypes);"
            " evaluate them as separate jobs"
        )
    return plan.merges[0]


def _tokenizer(plan: Plan, layout: PlannedPoint) -> Tokenizer:
    parent = plan.parents[layout.layout.tokenizer_from]
    info = parent.side_files.get("tokenizer.json")
    if info is None:
        raise BadInput(f"parent {parent.name} ({parent.url}): no tokenizer.json; benchmarks need a fast tokenizer")
    return Tokenizer(bytes(open_store(parent.url).read(info.key, etag=info.etag)), place=f"{parent.url}/tokenizer.json")


def _check_lengths(planned: Sequence[PlannedSet], layout: PlannedPoint, evaluation: Evaluation) -> None:
    most = context_fields(layout.layout.config).get("max_position_embeddings")
    longest = max(planned, key=lambda entry: entry.length)
    if isinstance(most, int) and longest.length > most:
        raise BadInput(
            f"{evaluation.place}: {longest.task} at {longest.length} tokens is beyond the model's {most};"
            " take that length out, or raise max_position_embeddings in the parents' config"
        )


def _model_spec(plan: Plan, layout: PlannedPoint) -> ModelSpec:
    tensors = tuple(tensor for shard in layout.layout.shards for tensor in shard.tensors)
    tokenizer = plan.parents[layout.layout.tokenizer_from]
    names = [name for name in tokenizer.side_files if name != "generation_config.json"]
    return ModelSpec(
        run=plan.run_url,
        tensors=tensors,
        parents={name: plan.parents[name].parent for name in layout.layout.parents},
        seed=plan.job.seed,
        numerics=plan.job.numerics,
        config=layout.layout.config,
        tokenizer=(tokenizer.url, {name: tokenizer.side_files[name].etag for name in names}),
        engine=plan.job.engine.name,
        options=plan.job.engine.options,
        threads=max(1, int(plan.job.workers.cpus)),
    )
