"""Evaluate every point, or race them: the same items for all, in blocks whose scores stay in the store.

A block that has its file of scores is done: nothing is asked twice, in this run or the next.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from jobs.evaluation import EvaluationTask, ItemSet, ModelSpec, ScoreRow
from jobs.tasks import FORMAT, digest
from orchestrator.dispatching import Evaluators, dispatch
from orchestrator.ledger import Lease, Ledger
from orchestrator.planning import Plan
from orchestrator.questions import Questions, RacePlan, Subject, questions
from orchestrator.racing import RUNGS, Departure, Race, Standing
from orchestrator.statistics import Cell, FlipRate, flip_rate, macro_weights
from orchestrator.watching import Watcher
from workers.benchmarks.building import PlannedSet, stored
from workers.benchmarks.lm_eval_adapter import OVER_LONG
from workers.scores import read_scores, write_scores

BLOCK_TOKENS = 1 << 20
"""A block of items is cut at about this many context tokens: minutes of work, so that little is lost or waited for."""

BLOCK_ITEMS = 64

NOISE_ITEMS = 25
"""Items of each set that the leader answers a second time, to see how often an answer flips by itself."""

READS_AT_ONCE = 32


class OpenEvaluators(Protocol):
    """Starts workers that can hold any of these models."""

    def __call__(self, models: Mapping[str, ModelSpec]) -> Evaluators: ...


@dataclass(frozen=True)
class EvaluationResult:
    """All scores of a run, and what the race made of them; `standing` is best first, baselines apart.

    `ranked` names the benchmarks that points are ranked by; `race` is None where every point answered everything.
    `baselines`, `parents` and `same` are as in `Questions`.
    """

    rows: list[ScoreRow]
    ranked: tuple[str, ...]
    standing: tuple[Standing, ...]
    departures: tuple[Departure, ...]
    baselines: tuple[str, ...]
    parents: tuple[str, ...]
    same: Mapping[str, str]
    noise: FlipRate | None
    cost_share: float
    race: RacePlan | None

    def ranked_rows(self) -> list[ScoreRow]:
        """The rows that the ranking counts."""
        return ranked_rows(self.rows, self.ranked)

    def race_document(self) -> dict[str, Any]:
        """The audit trail: who left when and why, who stayed, and how sure the noise lets one be."""
        return {
            "race": None if self.race is None else {**asdict(self.race.spec), "items": self.race.items},
            "departures": [asdict(departure) for departure in self.departures],
            "standing": [asdict(standing) for standing in self.standing],
            "noise": None if self.noise is None else asdict(self.noise),
            "cost_share": self.cost_share,
        }


def evaluate(
    plan: Plan, open_evaluators: OpenEvaluators, watcher: Watcher, asked: Questions | None = None
) -> EvaluationResult:
    """Every point's scores, or as many as the race needs; parents answer everything, as baselines.

    Leaves `report/results.parquet` and `report/race.json` in the run. `asked` is what `questions` says of the plan.
    """
    asked = asked or questions(plan)
    ledger = Ledger(plan.run_url, plan.places)
    with Lease(ledger.store, plan.places.record("lease.json")) as lease:
        ledger.claim(plan.job.text, plan.document())
        session = _Session(asked, ledger, lease, open_evaluators, watcher)
        try:
            result = session.run()
        finally:
            session.close()
        lease.check()
        ledger.store.write("report/results.parquet", write_scores(result.rows))
        ledger.store.write("report/race.json", json.dumps(result.race_document(), indent=1).encode())
        return result


class _Session:
    """One evaluation at work: which blocks are known, and what they said."""

    def __init__(
        self, asked: Questions, ledger: Ledger, lease: Lease, open_evaluators: OpenEvaluators, watcher: Watcher
    ) -> None:
        self._asked, self._ledger, self._lease, self._watcher = asked, ledger, lease, watcher
        self._open = open_evaluators
        self._evaluators: Evaluators | None = None
        self._files = {info.key for info in ledger.store.list("scores/")}
        self._rows: dict[str, list[ScoreRow]] = {}
        self._sets: dict[str, ItemSet] = {}

    def run(self) -> EvaluationResult:
        """The race or the whole grid, then the parents, then the noise floor."""
        asked = self._asked
        self._build()
        race = None if asked.race is None else self._raced(asked.race)
        stayed = [asked.points[name] for name in (asked.points if race is None else race.live)]
        self._ask(stayed, f"evaluating {len(stayed)} points")
        self._ask([*asked.baselines.values()], "evaluating the parents")
        counted = ranked_rows(self._every_row(), asked.ranked)
        standing = _standing(counted, [*asked.points]) if race is None else race.standing()
        return EvaluationResult(
            noise=self._noise(asked.points[standing[0].point]),
            rows=self._every_row(),
            ranked=asked.ranked,
            standing=standing,
            departures=() if race is None else tuple(race.departures),
            baselines=tuple(asked.baselines),
            parents=asked.parents,
            same=asked.same,
            cost_share=1.0 if race is None else race.spent() / race.full_cost(),
            race=asked.race,
        )

    def close(self) -> None:
        """Lets go of the workers."""
        if self._evaluators is not None:
            self._evaluators.close()

    def _build(self) -> None:
        """Every set of items, in the store."""
        subjects = (*self._asked.points.values(), *self._asked.baselines.values())
        planned = {entry.key: entry for subject in subjects for entry in subject.sets.values()}
        self._watcher.begin_stage(sum(entry.count * entry.length for entry in planned.values()), "making items")
        for key, entry in planned.items():
            self._sets[key] = stored(entry, self._ledger.store)
            self._lease.check()
            self._watcher.advance(entry.count * entry.length)

    def _raced(self, planned: RacePlan) -> Race:
        """The race, run to its end; departures are told as they happen."""
        points, share = self._asked.points, planned.share
        sets = next(iter(points.values())).sets
        race = Race(
            [*points],
            [cell for cell, entry in sets.items() if entry.benchmark == planned.benchmark],
            rungs=[*(rung for rung in RUNGS if -(-rung // share) * share < planned.items), planned.items],
            keep=min(planned.spec.keep, len(points)),
            alpha=planned.spec.alpha,
            items_per_haystack=share,
            items_shared_across_lengths=True,
            confirmation=planned.fresh,
        )
        while not race.finished:
            tasks = [
                task
                for block in race.next_blocks()
                for task in self._tasks(points[block.point], block.cell, block.items)
            ]
            for task, rows in self._answers(tasks, f"racing {len(race.live)} points"):
                cell = Cell(task.items.task, task.items.length)
                race.record(task.point, cell, [row.item for row in rows], [row.score for row in rows])
            for departure in race.eliminate():
                self._watcher.departed(departure)
        return race

    def _ask(self, subjects: Sequence[Subject], text: str) -> None:
        """Everything that everyone is asked and these have not answered yet."""
        answered: dict[tuple[str, str, int], set[int]] = defaultdict(set)
        for row in self._every_row():
            answered[row.point, row.task, row.length].add(row.item)
        tasks = [
            task
            for subject in subjects
            for cell, planned in subject.sets.items()
            for wanted in _gaps(range(planned.count), answered[subject.name, cell.task, cell.length])
            for task in self._tasks(subject, cell, wanted)
        ]
        for _ in self._answers(tasks, text):
            pass

    def _noise(self, leader: Subject) -> FlipRate | None:
        """How often the leader's own answers flip when it is asked the same again; None without answers."""
        sets = {cell: planned for cell, planned in leader.sets.items() if planned.benchmark in ("ruler", "needle")}
        tasks = [
            task
            for cell, planned in sets.items()
            for task in self._tasks(leader, cell, _first_items(planned, NOISE_ITEMS), repeat=1)
        ]
        second = {_place(row): row.score for _, rows in self._answers(tasks, "asking again") for row in rows}
        first = {_place(row): row.score for row in self._every_row() if row.point == leader.name}
        places = sorted(second.keys() & first.keys())
        if not places:
            return None
        return flip_rate([first[place] for place in places], [second[place] for place in places])

    def _tasks(self, subject: Subject, cell: Cell, wanted: range, *, repeat: int = 0) -> Iterator[EvaluationTask]:
        """Blocks of a fixed grid that cover the wanted items: however a run was cut, its blocks are the same."""
        planned = subject.planned
        items = self._sets[subject.sets[cell].key]
        spec = self._asked.models[subject.model]
        step = max(1, min(BLOCK_ITEMS, BLOCK_TOKENS // items.tokens) // items.share) * items.share
        for start in range(wanted.start // step * step, wanted.stop, step):
            first, last = max(start, wanted.start), min(start + step, wanted.stop)
            asked_with = [spec.engine, spec.url, dict(spec.options)]
            unit = digest([FORMAT, planned.digest, planned.layout.beside, items.key, first, last, asked_with, repeat])
            key = f"scores/{planned.name}/{items.task}-{items.length}-{first:05d}-{unit[:16]}.parquet"
            yield EvaluationTask(
                subject.model, planned.name, planned.digest, planned.settings, items, first, last, repeat, key
            )

    def _answers(self, tasks: Iterable[EvaluationTask], text: str) -> Iterator[tuple[EvaluationTask, list[ScoreRow]]]:
        """Each block's scores as they come: first those that lie in the store, then those that workers answer."""
        wanted = list(tasks)
        self._recall([task.key for task in wanted if task.key in self._files and task.key not in self._rows])
        yield from ((task, self._rows[task.key]) for task in wanted if task.key in self._rows)
        waiting = [task for task in wanted if task.key not in self._rows]
        if not waiting:
            return
        self._watcher.begin_stage(sum(task.tokens for task in waiting), text)
        if self._evaluators is None:
            self._evaluators = self._open(self._asked.models)
        for task, rows in dispatch(waiting, self._evaluators):
            self._lease.check()
            self._rows[task.key] = rows
            self._watcher.advance(task.tokens)
            yield task, rows

    def _recall(self, keys: Sequence[str]) -> None:
        """The scores in these files; a resumed run may have a hundred thousand."""

        def read(key: str) -> list[ScoreRow]:
            return read_scores(bytes(self._ledger.store.read(key)), key)

        with ThreadPoolExecutor(READS_AT_ONCE, "scores") as pool:
            self._rows.update(zip(keys, pool.map(read, keys), strict=True))

    def _every_row(self) -> list[ScoreRow]:
        rows = [row for block in self._rows.values() for row in block if row.repeat == 0]
        return sorted(rows, key=lambda row: (row.point, row.benchmark, row.task, row.length, row.item))


def ranked_rows(rows: Iterable[ScoreRow], benchmarks: Sequence[str]) -> list[ScoreRow]:
    """The rows of these benchmarks, but for what only counts unasked items."""
    return [row for row in rows if row.benchmark in benchmarks and not row.task.endswith(f":{OVER_LONG}")]


def _gaps(wanted: range, known: set[int]) -> Iterator[range]:
    """The stretches of `wanted` that are not known."""
    start: int | None = None
    for item in wanted:
        if item not in known and start is None:
            start = item
        elif item in known and start is not None:
            yield range(start, item)
            start = None
    if start is not None:
        yield range(start, wanted.stop)


def _first_items(planned: PlannedSet, least: int) -> range:
    """The first items of a set, whole haystacks."""
    return range(min(-(-least // planned.share) * planned.share, planned.count))


def _place(row: ScoreRow) -> tuple[str, int, int]:
    return row.task, row.length, row.item


def _standing(rows: Iterable[ScoreRow], points: Sequence[str]) -> tuple[Standing, ...]:
    """Every point's macro score, best first: tasks count alike within a length, lengths alike."""
    by_point: dict[str, dict[Cell, list[float]]] = {point: defaultdict(list) for point in points}
    for row in rows:
        if row.point in by_point:
            by_point[row.point][Cell(row.task, row.length)].append(row.score)
    found: list[Standing] = []
    for point, cells in by_point.items():
        if cells:
            means = [sum(scores) / len(scores) for scores in cells.values()]
            score = float(macro_weights(list(cells)) @ means)
            found.append(Standing(point, score, min(len(scores) for scores in cells.values()), None, None))
    return tuple(sorted(found, key=lambda standing: (-standing.score, standing.point)))
