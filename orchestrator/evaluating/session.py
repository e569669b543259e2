"""Evaluate every point, or race them: the same items for all, in blocks whose scores stay in the store.

A block that has its file of scores is done: nothing is asked twice, in this run or the next.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

from jobs.errors import writing
from jobs.evaluate import GuardsSpec
from jobs.evaluation_tasks import EvaluationTask, ItemSet, ModelSpec, ScoreRow
from jobs.merge_tasks import FORMAT, digest
from jobs.sealing import sealed
from orchestrator.cluster.dispatching import Pace, dispatch
from orchestrator.cluster.pool import Evaluators
from orchestrator.evaluating.blocks import Blocks, Request, first_items
from orchestrator.evaluating.guarding import GUARDS, judged
from orchestrator.evaluating.results import VERDICT, EvaluationResult, ranked_rows, write_results
from orchestrator.evaluating.subjects import Questions, RacePlan, Subject
from orchestrator.judging.estimates import macro_weights
from orchestrator.judging.guards import Guarded, broken
from orchestrator.judging.race import RUNGS, Race, Standing
from orchestrator.judging.sampled import by_item
from orchestrator.judging.samples import Cell
from orchestrator.judging.significance import FlipRate, flip_rate
from orchestrator.planning.plan import Plan
from orchestrator.records.lease import Lease
from orchestrator.records.ledger import Ledger
from orchestrator.watching import Watcher
from workers.benchmarks.registry import BENCHMARKS
from workers.benchmarks.sets import stored

BLOCK_TOKENS = 1 << 20
"""A block of items is cut at about this many context tokens: minutes of work, so that little is lost or waited for."""

BLOCK_ITEMS = 64

NOISE_ITEMS = 25
"""Items of each set that the leader answers a second time, to see how often an answer flips by itself."""

RENEW_SECONDS = 30.0
"""The visible results of a running evaluation are at most this old."""


class OpenEvaluators(Protocol):
    """Starts workers that can hold any of these models."""

    def __call__(self, models: Mapping[str, ModelSpec]) -> Evaluators: ...


class Session:
    """An evaluation in progress: holds the run's lease and collects answers, which stay in the store."""

    def __init__(
        self,
        plan: Plan,
        asked: Questions,
        ledger: Ledger,
        lease: Lease,
        open_evaluators: OpenEvaluators,
        watcher: Watcher,
        renewed: Callable[[], None],
    ) -> None:
        self._asked, self._ledger, self._lease, self._watcher = asked, ledger, lease, watcher
        self._open = open_evaluators
        self._evaluators: Evaluators | None = None
        self._blocks = Blocks(ledger.store)
        self._sets: dict[str, ItemSet] = {}
        self._race: Race | None = None
        self._guards: list[Guarded] = []
        self.noise: FlipRate | None = None
        """How often the leader answered otherwise when asked the same again; None before `run` asked."""
        self._pace = Pace()
        self._told: set[str] = set()
        self._running = False
        self._renewed, self._pause = time.monotonic(), RENEW_SECONDS
        self._tell_renewed = renewed

    @classmethod
    @contextmanager
    def of(
        cls,
        plan: Plan,
        asked: Questions,
        open_evaluators: OpenEvaluators,
        watcher: Watcher,
        renewed: Callable[[], None] = lambda: None,
    ) -> Generator[Session]:
        """A session of this plan's run; it holds the run's lease, and closes its workers at the end.

        Errors inside never end a command with 2, whoever raises them: something is written by then.

        `renewed` is called each time that the results in the store were renewed during `run`.
        """
        ledger = Ledger(plan.run_url, plan.places)
        with Lease(ledger.store, plan.places.record("lease.json"), watcher.facts) as lease:
            ledger.claim(plan.job_text(), plan.document())
            with writing():
                session = cls(plan, asked, ledger, lease, open_evaluators, watcher, renewed)
                try:
                    yield session
                finally:
                    session.close()
                lease.check()

    def run(self) -> EvaluationResult:
        """The race, then the open items of the parents and of the points that stayed, then the noise floor."""
        asked = self._asked
        self._running = True
        self._lease.confirm()
        self._ledger.store.delete(VERDICT)  # the verdict of an earlier evaluation is no longer valid
        self.make([*asked.points.values(), *asked.baselines])
        if asked.race is not None:
            self._run_race(asked.race)
        stayed = [asked.points[name] for name in (asked.points if self._race is None else self._race.live)]
        rest = [*stayed, *asked.baselines]
        self.ask(
            rest,
            f"evaluating {len(rest)} models",
            None if self._race is None else _common_items(rest, BENCHMARKS.keys() - GUARDS),
        )
        if asked.guards is not None and self._race is None:
            self._guards = judged(asked.guards, asked, self._guards_baseline(asked.guards), self.rows())
        self.noise = self._ask_again(asked.points[self._standing()[0].point])
        result = self._result(finished=True)
        self._running = False
        self._lease.confirm()
        write_results(self._ledger.store, result)
        return result

    def conclude(self, verdict: Mapping[str, object]) -> None:
        """Writes the gate's verdict into the run, as `gate/verdict.json`."""
        self._lease.confirm()
        self._ledger.store.write(VERDICT, sealed(verdict, lines=True))

    def close(self) -> None:
        """Lets go of the workers."""
        if self._evaluators is not None:
            self._evaluators.close()

    def make(self, subjects: Iterable[Subject], counts: Mapping[Cell, int] | None = None) -> None:
        """These subjects' sets of items, in the store; with at least so many items where `counts` says so."""
        wanted = {
            (planned.digest, (counts or {}).get(cell)): planned
            for subject in subjects
            for cell, planned in subject.sets.items()
        }
        self._watcher.begin_stage(sum(planned.made * planned.length for planned in wanted.values()), "making items")
        for (name, count), planned in wanted.items():
            made = self._sets[name].parts if name in self._sets else ()
            self._sets[name] = stored(planned, self._ledger.store, count, made)
            self._lease.check()
            self._watcher.advance(planned.made * planned.length)

    def ask(self, subjects: Iterable[Subject], text: str, wanted: Mapping[Cell, range] | None = None) -> None:
        """Asks these subjects their open items, of the common ones or of the wanted ones of each cell."""
        requests = [
            Request(subject, cell, range(planned.count) if wanted is None else wanted[cell])
            for subject in subjects
            for cell, planned in subject.sets.items()
            if wanted is None or cell in wanted
        ]
        for _ in self._answers(requests, text):
            pass

    def rows(self) -> list[ScoreRow]:
        """Every item that was answered in this session, now or earlier, in a fixed order."""
        return by_item(self._blocks.rows())

    def answers(self) -> list[ScoreRow]:
        """The same with one row for each sample of an item."""
        return self._blocks.rows()

    def _run_race(self, planned: RacePlan) -> None:
        """The race, run to its end; prints departures as they happen."""
        points, share = self._asked.points, planned.share
        sets = next(iter(points.values())).sets
        raced = {cell: entry for cell, entry in sets.items() if entry.benchmark == planned.benchmark}
        alone = all(entry.questions == 1 for entry in raced.values())
        rungs = [-(-rung // share) * share for rung in RUNGS]
        race = self._race = Race(
            [*points],
            [*raced],
            rungs=[*(rung for rung in dict.fromkeys(rungs) if rung < planned.items), planned.items],
            keep=min(planned.spec.keep, len(points)),
            alpha=planned.spec.alpha,
            items_per_haystack=1 if alone else share,
            items_shared_across_lengths=True,
            confirmation=planned.fresh,
        )
        while not race.decided:
            self._race_on(race)
        self._guard_winners(race)
        while not race.finished:
            self._race_on(race)

    def _race_on(self, race: Race) -> None:
        """Asks what the next decision of the race needs, and decides."""
        points = self._asked.points
        requests = [Request(points[block.point], block.cell, block.items) for block in race.next_blocks()]
        for request, answered in self._answers(requests, f"racing {len(race.live)} points"):
            rows = by_item(answered)
            race.record(request.subject.label, request.cell, [row.item for row in rows], [row.score for row in rows])
        for departure in race.eliminate():
            self._watcher.tell(f"{departure.point} leaves: {departure.reason}")

    def _guard_winners(self, race: Race) -> None:
        """Asks the winners their guards, before any is confirmed; the next best take the places of those that lose."""
        if self._asked.guards is None:
            return
        asked: set[str] = set()
        while winners := [name for name in race.winners if name not in asked]:
            self._guards = self.guarded([self._asked.points[name] for name in winners])
            asked.update(winners)
            for guarded in self._guards:
                if guarded.outcome == "broken" and guarded.model in winners:
                    self._watcher.tell(f"{guarded.model} is out: guard {guarded.words}")
            race.bar(broken(self._guards))

    def guarded(self, subjects: Sequence[Subject]) -> list[Guarded]:
        """Asks these subjects their guards, and the baseline; the findings on all that answered theirs by now."""
        spec = self._asked.guards
        if spec is None:
            return []
        baseline = self._guards_baseline(spec)
        everyone = [*subjects, baseline]
        self.make(everyone)
        self.ask(everyone, "asking guards", _common_items(everyone, GUARDS))
        return judged(spec, self._asked, baseline, self.rows())

    def _guards_baseline(self, spec: GuardsSpec) -> Subject:
        """The subject that guards compare with: the best parent by score where nothing names one."""
        asked = self._asked
        if spec.baseline is not None:
            return asked.subject(spec.baseline, "parent")
        parents = {subject.label: subject for subject in asked.parents.values()}
        self.ask(parents.values(), "evaluating parents", _common_items(parents.values(), asked.ranked))
        return parents[_standing(ranked_rows(self.rows(), asked.ranked), [*parents])[0].point]

    def _ask_again(self, leader: Subject) -> FlipRate | None:
        """How often the leader's own answers flip when it is asked the same again; None without answers."""
        requests = [
            Request(leader, cell, first_items(planned, NOISE_ITEMS), repeat=1)
            for cell, planned in leader.sets.items()
            if BENCHMARKS[planned.benchmark].retrieval
        ]
        answered = self._answers(requests, "asking again")
        second = {_place(row): row.score for _, rows in answered for row in by_item(rows)}
        first = {_place(row): row.score for row in self.rows() if row.point == leader.label}
        places = sorted(second.keys() & first.keys())
        if not places:
            return None
        return flip_rate([first[place] for place in places], [second[place] for place in places])

    def _answers(self, requests: Iterable[Request], text: str) -> Iterator[tuple[Request, list[ScoreRow]]]:
        """The wanted rows of each request as they come: first from the store, then from workers."""
        wanted = list(requests)
        prefixes = {request: self._prefix(request) for request in wanted}
        self._remove(self._blocks.recall((prefixes[request], request.items) for request in wanted))
        self._tell_remarks(self._blocks.remarks())
        waiting: dict[str, tuple[EvaluationTask, Request]] = {}
        for request in wanted:
            prefix = prefixes[request]
            yield from ((request, rows) for rows in self._blocks.within(prefix, request))
            for gap in self._blocks.gaps(prefix, request.items):
                waiting |= {task.key: (task, request) for task in self._tasks(request, gap, prefix)}
        if not waiting:
            return
        self._watcher.begin_stage(sum(task.tokens for task, _ in waiting.values()), text)
        if self._evaluators is None:
            self._evaluators = self._open(self._asked.models)
        tasks = [task for task, _ in waiting.values()]
        for task, scores in dispatch(tasks, self._evaluators, self._pace, self._watcher.failed):
            self._lease.check()
            request = waiting[task.key][1]
            rows = self._blocks.add(task.key, scores, request)
            self._watcher.advance(task.tokens)
            self._tell_remarks(scores.remarks)
            yield request, rows
            self._renew()

    def _remove(self, damaged: Sequence[str]) -> None:
        """Removes damaged files of scores: a worker does not replace a file that exists."""
        for key in damaged:
            self._lease.confirm()
            self._ledger.store.delete(key)
            self._watcher.tell(f"{key}: damaged; its items are asked again")

    def _tell_remarks(self, remarks: Iterable[str]) -> None:
        """Prints the remarks that are new in this session."""
        for remark in remarks:
            if remark not in self._told:
                self._told.add(remark)
                self._watcher.tell(remark)

    def _prefix(self, request: Request) -> str:
        """The name of the files of these answers, without their items: it covers all inputs of the answers."""
        subject, items = request.subject, request.subject.sets[request.cell]
        spec = self._asked.models[subject.model]
        asked_with = [spec.engine, spec.url, dict(spec.options), spec.end_tokens]
        unit = digest(
            [FORMAT, subject.planned.digest, subject.planned.layout.beside, items.digest, asked_with, request.repeat]
        )
        return f"scores/{subject.folder}/{items.task}-{items.length}-{unit[:16]}"

    def _tasks(self, request: Request, wanted: range, prefix: str) -> Iterator[EvaluationTask]:
        """Blocks of a fixed grid that cover the wanted items: however a run was cut, its blocks are the same."""
        planned = request.subject.planned
        items = self._sets[request.subject.sets[request.cell].digest]
        step = max(1, min(BLOCK_ITEMS, BLOCK_TOKENS // items.tokens) // items.share) * items.share
        for start in range(wanted.start // step * step, wanted.stop, step):
            first, last = max(start, wanted.start), min(start + step, wanted.stop)
            yield EvaluationTask(
                request.subject.model,
                request.subject.label,
                planned.digest,
                planned.settings,
                items,
                first,
                last,
                request.repeat,
                f"{prefix}-{first:06d}-{last:06d}.parquet",
                request.subject.kind,
            )

    def _standing(self) -> tuple[Standing, ...]:
        """Best first; of the points that stayed, those that surely lost a guard come last."""
        if self._race is not None:
            found = self._race.standing()
        else:
            found = _standing(ranked_rows(self.rows(), self._asked.ranked), [*self._asked.points])
        out = broken(self._guards)
        return tuple(sorted(found, key=lambda entry: (entry.departed_at_rung is not None, entry.point in out)))

    def _renew(self) -> None:
        """Lets who looks at the run see how it stands, now and then: a twentieth of the time at most.

        Not while a gate asks: the visible results are then those of the evaluation that ended.
        """
        if not self._running or time.monotonic() - self._renewed < self._pause:
            return
        began = time.monotonic()
        self._lease.confirm()
        write_results(self._ledger.store, self._result(finished=False))
        self._tell_renewed()
        self._renewed = time.monotonic()
        self._pause = max(RENEW_SECONDS, 20 * (self._renewed - began))

    def _result(self, *, finished: bool) -> EvaluationResult:
        asked, race, answers = self._asked, self._race, self.answers()
        return EvaluationResult(
            rows=by_item(answers),
            samples=answers if any(row.sample for row in answers) else (),
            ranked=asked.ranked,
            standing=self._standing(),
            departures=() if race is None else tuple(race.departures),
            baselines=tuple(subject.label for subject in asked.baselines),
            parents={name: subject.label for name, subject in asked.parents.items()},
            same=asked.same,
            noise=self.noise,
            cost_share=1.0 if race is None else race.spent() / race.full_cost(),
            race=asked.race,
            seed=asked.seed,
            finished=finished,
            remarks=tuple(self._blocks.remarks()),
            guards=tuple(self._guards),
        )


def _common_items(subjects: Iterable[Subject], benchmarks: Collection[str]) -> dict[Cell, range]:
    """The items of these benchmarks that everyone is asked."""
    return {
        cell: range(planned.count)
        for subject in subjects
        for cell, planned in subject.sets.items()
        if planned.benchmark in benchmarks
    }


def _place(row: ScoreRow) -> tuple[str, int, int]:
    return row.task, row.length, row.item


def _standing(rows: Iterable[ScoreRow], points: Sequence[str]) -> tuple[Standing, ...]:
    """Every point's macro score, best first: tasks count alike within a length, lengths alike."""
    by_point: dict[str, dict[Cell, list[float]]] = {point: defaultdict(list) for point in points}
    for row in rows:
        if row.point in by_point:
            by_point[row.point][Cell(row.task, row.length, row.benchmark)].append(row.score)
    found: list[Standing] = []
    for point, cells in by_point.items():
        if cells:
            means = [sum(scores) / len(scores) for scores in cells.values()]
            score = float(macro_weights(list(cells)) @ means)
            found.append(Standing(point, score, min(len(scores) for scores in cells.values()), None, None))
    return tuple(sorted(found, key=lambda standing: (-standing.score, standing.point)))
