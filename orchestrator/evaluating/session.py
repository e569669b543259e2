"""Evaluate every point, or race them: the same items for all, in blocks whose scores stay in the store.

A block that has its file of scores is done: nothing is asked twice, in this run or the next.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Protocol

from jobs.errors import BadInput, writing
from jobs.evaluate import GuardsSpec
from jobs.evaluation_tasks import EvaluationTask, ItemSet, ModelSpec, ScoreRow
from jobs.merge_tasks import FORMAT, digest
from jobs.sealing import sealed
from jobs.search import Choice, SearchSpec
from orchestrator.cluster.dispatching import Pace, dispatch
from orchestrator.cluster.pool import Evaluators
from orchestrator.evaluating.batches import BatchFiles, key_of, make_search
from orchestrator.evaluating.blocks import Blocks, Request, first_items
from orchestrator.evaluating.guarding import GUARDS, judged
from orchestrator.evaluating.pairing import check_counted, tokens_by_item
from orchestrator.evaluating.results import VERDICT, EvaluationResult, ranked_rows, write_results
from orchestrator.evaluating.subjects import Questions, RacePlan, Subject
from orchestrator.judging.estimates import macro_weights
from orchestrator.judging.guards import Guarded, broken
from orchestrator.judging.race import RUNGS, Departure, Race, Standing
from orchestrator.judging.sampled import by_item
from orchestrator.judging.samples import Cell, cell_of
from orchestrator.judging.significance import FlipRate, flip_rate
from orchestrator.planning.plan import Plan, PlannedPoint
from orchestrator.records.lease import Lease
from orchestrator.records.ledger import Ledger
from orchestrator.searching.findings import findings
from orchestrator.searching.search import Batch, Search
from orchestrator.watching import Watcher
from orchestrator.words import counted
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
        self.asked = asked
        """What is asked; a search adds the points that it proposes."""
        self._plan, self._ledger, self._lease, self._watcher = plan, ledger, lease, watcher
        self._open = open_evaluators
        self._evaluators: Evaluators | None = None
        self._blocks = Blocks(ledger.store)
        self._sets: dict[str, ItemSet] = {}
        self._race: Race | None = None
        self._guards: list[Guarded] = []
        self._search: Search | None = None
        self.planned: list[PlannedPoint] = []
        """The points that a search has asked."""
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
        if (spec := plan.job.search) is not None:
            make_search(plan, asked, spec, spec.space.described)  # refused before anything is written
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
        self._running = True
        self._lease.confirm()
        self._ledger.store.delete(VERDICT)  # the verdict of an earlier evaluation is no longer valid
        self.make([*self.asked.points.values(), *self.asked.baselines])
        if self.asked.race is not None:
            self._run_race(self.asked.race)
        if self._plan.job.search is not None:
            self._run_search(self._plan.job.search)
        asked = self.asked
        names = [*asked.points] if self._race is None else self._race.live
        if self._search is not None:
            names = self.best
        rest = [*{each.label: each for each in (*(asked.points[name] for name in names), *asked.baselines)}.values()]
        self.ask(
            rest,
            f"evaluating {len(rest)} models",
            None if self._race is None else _common_items(rest, BENCHMARKS.keys() - GUARDS),
        )
        if asked.guards is not None and self._race is None:
            self._guards = judged(asked.guards, asked, self._guards_baseline(asked.guards), self.rows())
        self._tell_remarks(filter(None, [self._unkept()]))
        self.noise = self._ask_again(asked.points[self._standing()[0].point])
        result = self._result(finished=True)
        self._running = False
        self._lease.confirm()
        write_results(self._ledger.store, result)
        return result

    def recall(self) -> None:
        """Adds the points that the search of this run has asked so far, without asking anything."""
        spec, searched = self._plan.job.search, self._plan.job.searched
        assert spec is not None and searched is not None, "a job with a search has its recipe"
        planner = self._plan.planner.afresh()
        for batch in BatchFiles(self._ledger.store, spec, searched).written():
            self.asked = self.asked.joined(planner(searched.point(proposal.choice) for proposal in batch.proposals))

    @property
    def _several(self) -> bool:
        """Whether a search has several objectives."""
        return self._search is not None and len(self._search.spec.maximize) > 1

    def _unkept(self) -> str:
        """That the first point of a search likely breaks `at_least:`, as then each other one does."""
        first = None if self._search is None else next(iter(self._search.standing()), None)
        if first is None or first.feasible >= 0.5:
            return ""
        chance = f"with probability {first.feasible:.2f}"
        return f"no point is likely to keep `at_least:`; {first.point}, the first of the table, does {chance}"

    def _infeasible(self) -> tuple[str, ...]:
        """The points of a search that likely break `at_least:`."""
        rows = () if self._search is None else self._search.standing()
        return tuple(row.point for row in rows if row.feasible < 0.5)

    @property
    def best(self) -> list[str]:
        """The points that a search or a race keeps, best first, each merge once; at least the first of all."""
        keep, out = self._plan.job.keep.count or 1, self._infeasible()
        standing = self._standing()
        kept = [entry.point for entry in standing if entry.departed_at_rung is None and entry.point not in out]
        return kept[:keep] or [standing[0].point]

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
        if not wanted:
            return
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
        points, share = self.asked.points, planned.share
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
            shorter_stay=planned.spec.output_tokens,
        )
        while not race.decided:
            self._race_on(race)
        self._guard_winners(race)
        while not race.finished:
            self._race_on(race)

    def _race_on(self, race: Race) -> None:
        """Asks what the next decision of the race needs, and decides."""
        points = self.asked.points
        requests = [Request(points[block.point], block.cell, block.items) for block in race.next_blocks()]
        for request, answered in self._answers(requests, f"racing {len(race.live)} points"):
            rows = by_item(answered)
            items, scores = [row.item for row in rows], [row.score for row in rows]
            tokens = None
            if race.shorter_stay:  # a model that gives no answer is not one that writes less
                for row in answered:
                    check_counted(row, "race.output_tokens")
                written = tokens_by_item(answered, math.inf)
                tokens = [written[item] for item in items]
            race.record(request.subject.label, request.cell, items, scores, tokens)
        for departure in race.eliminate():
            self._watcher.tell(f"{departure.point} leaves: {departure.reason}")

    def _guard_winners(self, race: Race) -> None:
        """Asks the winners their guards, before any is confirmed; the next best take the places of those that lose."""
        if self.asked.guards is None:
            return
        asked: set[str] = set()
        while winners := [name for name in race.winners if name not in asked]:
            self._guards = self.guarded([self.asked.points[name] for name in winners])
            asked.update(winners)
            for guarded in self._guards:
                if guarded.outcome == "broken" and guarded.model in winners:
                    self._watcher.tell(f"{guarded.model} is out: guard {guarded.words}")
            race.bar(broken(self._guards))

    def guarded(self, subjects: Sequence[Subject]) -> list[Guarded]:
        """Asks these subjects their guards, and the baseline; the findings on all that answered theirs by now."""
        spec = self.asked.guards
        if spec is None:
            return []
        baseline = self._guards_baseline(spec)
        everyone = [*subjects, baseline]
        self.make(everyone)
        self.ask(everyone, "asking guards", _common_items(everyone, GUARDS))
        return judged(spec, self.asked, baseline, self.rows())

    def _guards_baseline(self, spec: GuardsSpec) -> Subject:
        """The subject that guards compare with: the best parent by score where nothing names one."""
        asked = self.asked
        if spec.baseline is not None:
            return asked.subject(spec.baseline, "parent")
        parents = {subject.label: subject for subject in asked.parents.values()}
        self.ask(parents.values(), "evaluating parents", _common_items(parents.values(), asked.ranked))
        return parents[_standing(ranked_rows(self.rows(), asked.ranked), [*parents])[0].point]

    def _run_search(self, spec: SearchSpec) -> None:
        """The search, run to its end: blocks of the open batches, while the next batch is written as soon as it is due.

        A batch lies in the store before anything of it is asked. Workers have the blocks of the next batch while the
        last blocks of this one are answered.
        """
        job, planner = self._plan.job, self._plan.planner.afresh()
        assert job.searched is not None, "a job with a search has its recipe"
        point = cache(job.searched.point)
        search = self._search = make_search(self._plan, self.asked, spec, lambda choice: point(choice).name)
        files = BatchFiles(self._ledger.store, spec, job.searched)
        wanted: dict[tuple[str, Cell], int] = defaultdict(int)  # items of each name, and those asked of each subject
        begun: dict[tuple[str, Cell], int] = defaultdict(int)
        waiting: dict[str, tuple[EvaluationTask, Request]] = {}
        of_parents = [*self.asked.parents.values()]
        asks_tokens = any(each.metric.startswith("output_tokens") for each in spec.maximize)

        def record(request: Request, rows: Sequence[ScoreRow]) -> None:
            for name in self._names_of(request.subject, search):
                answered = [row for row in rows if row.item < wanted[name, request.cell]]
                own = by_item(answered)
                items, scores = [row.item for row in own], [row.score for row in own]
                tokens = [float(row.tokens_out) for row in own]
                if asks_tokens:  # a point that gives no answer is not one that writes less
                    planned = request.subject.sets[request.cell]
                    written = tokens_by_item(answered, planned.generation.budget + planned.new_tokens)
                    tokens = [written[item] for item in items]
                search.record(name, request.cell, items, scores, tokens)

        def due() -> list[Request]:
            """The new requests of the next batch that has become due."""
            requests: list[Request] = []
            self._tell_departures(search.close())
            while not requests and search.due is not None:
                self._lease.confirm()
                batch = files.read_or_write(search.due, lambda: self._proposed(search, spec))
                try:
                    found = planner(point(proposal.choice) for proposal in batch.proposals)
                except BadInput as error:  # older versions asked such points
                    place = f"{self._ledger.store.url}/{key_of(batch.number)}"
                    raise BadInput(f"{error}; {place} asks this point: remove this file, and run again") from error
                self.planned += found
                self.asked = self.asked.joined(found)
                subjects = [self._subject(planned.name) for planned in found]
                self.make(each for each in subjects if any(of.digest not in self._sets for of in each.sets.values()))
                parents = [planned.name for planned in found if self._subject(planned.name) in of_parents]
                search.add(batch, parents)
                if batch.proposals or batch.promotions:
                    self._watcher.tell(_said(batch, len(search.choices)))
                for block in search.next_blocks():
                    subject, cell, stop = self._subject(block.point), block.cell, block.items.stop
                    start = max(block.items.start, wanted[block.point, cell])
                    if start >= stop:
                        continue
                    wanted[block.point, cell] = stop
                    if start < begun[subject.label, cell]:  # the same merge has answered these, or is asked them now
                        known = [row for row in self.answers() if _at(row, subject.label, cell) and row.item >= start]
                        record(Request(subject, cell, range(start, stop)), known)
                    start = max(start, begun[subject.label, cell])
                    if start < stop:
                        begun[subject.label, cell] = stop
                        requests.append(Request(subject, cell, range(start, stop)))
                self._tell_departures(search.close())
            return requests

        def more() -> list[list[EvaluationTask]]:
            """The blocks of the batches that have become due, each batch a wave."""
            waves: list[list[EvaluationTask]] = []
            while requests := due():
                found, opened = self._opened(requests)
                waiting.update(opened)
                if opened:
                    waves.append([task for task, _ in opened.values()])
                for request, rows in found:
                    record(request, rows)
            if waves:
                tokens = sum(task.tokens for task, _ in waiting.values())
                self._watcher.begin_stage(tokens, f"searching, batch {len(search.batches) - 1}")
            return waves

        if first := more():  # else the search has ended, and needs no worker
            for request, rows in self._dispatched([], waiting, lambda: [first.pop(0)] if first else more()):
                record(request, rows)

    def _proposed(self, search: Search, spec: SearchSpec) -> Batch:
        """The batch that is due; an empty one, which ends the search, once the hours of its budget are over."""
        hours = sum(row.seconds for row in self.rows()) / 3600
        batch = search.propose()
        if spec.budget.hours is not None and hours >= spec.budget.hours:
            return replace(batch, proposals=(), promotions=())
        return batch

    def _subject(self, name: str) -> Subject:
        """The subject of a point, or of a parent by its label."""
        name = self.asked.same.get(name, name)
        found = self.asked.points.get(name)
        return found or next(subject for subject in self.asked.parents.values() if subject.label == name)

    def _names_of(self, subject: Subject, search: Search) -> list[str]:
        """The names by which a search has this subject: several where points are the same merge."""
        names = [name for name in search.choices if self._subject(name) == subject]
        return names + [label for label in search.parents if label == subject.label]

    def _tell_departures(self, departures: Iterable[Departure]) -> None:
        for departure in departures:
            self._watcher.tell(f"{departure.point} leaves: {departure.reason}")

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
        found, waiting = self._opened(list(requests))
        yield from found
        if not waiting:
            return
        self._watcher.begin_stage(sum(task.tokens for task, _ in waiting.values()), text)
        yield from self._dispatched([task for task, _ in waiting.values()], waiting)

    def _opened(
        self, wanted: Sequence[Request]
    ) -> tuple[list[tuple[Request, list[ScoreRow]]], dict[str, tuple[EvaluationTask, Request]]]:
        """(the wanted rows that lie in the store, the blocks of all others by their keys)."""
        prefixes = {request: self._prefix(request) for request in wanted}
        self._remove(self._blocks.recall((prefixes[request], request.items) for request in wanted))
        self._tell_remarks(self._blocks.remarks())
        found: list[tuple[Request, list[ScoreRow]]] = []
        waiting: dict[str, tuple[EvaluationTask, Request]] = {}
        for request in wanted:
            prefix = prefixes[request]
            found += [(request, rows) for rows in self._blocks.within(prefix, request)]
            for gap in self._blocks.gaps(prefix, request.items):
                waiting |= {task.key: (task, request) for task in self._tasks(request, gap, prefix)}
        return found, waiting

    def _dispatched(
        self,
        tasks: Sequence[EvaluationTask],
        waiting: dict[str, tuple[EvaluationTask, Request]],
        more: Callable[[], Sequence[Sequence[EvaluationTask]]] = tuple,
    ) -> Iterator[tuple[Request, list[ScoreRow]]]:
        """The rows of these blocks, and of those that `more` adds, as workers answer them; each leaves `waiting`."""
        if self._evaluators is None:
            self._evaluators = self._open(self.asked.models)
        for task, scores in dispatch(tasks, self._evaluators, self._pace, self._watcher.failed, more):
            self._lease.check()
            request = waiting.pop(task.key)[1]
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
        spec = self.asked.models[subject.model]
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
        if self._search is not None:
            front = {row.choice for row in self._search.front()} if self._several else set[Choice]()
            return tuple(
                Standing(row.point, row.observed, row.items, None if row.left is None else row.left.rung, None)
                for row in sorted(
                    self._search.standing(),
                    key=lambda row: (row.feasible < 0.5, row.left is not None, row.choice not in front),
                )
                if row.point not in self.asked.same
            )
        if self._race is not None:
            found = self._race.standing()
        else:
            found = _standing(ranked_rows(self.rows(), self.asked.ranked), [*self.asked.points])
        out = broken(self._guards)
        return tuple(sorted(found, key=lambda entry: (entry.departed_at_rung is not None, entry.point in out)))

    def _departures(self) -> tuple[Departure, ...]:
        """The points that left the race or the search, each merge once."""
        found = [] if self._race is None else self._race.departures
        found = found if self._search is None else self._search.departures
        return tuple(each for each in found if each.point not in self.asked.same)

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
        asked, race, answers = self.asked, self._race, self.answers()
        names = {subject.label: name for name, subject in asked.points.items()}  # a parent's, where it is a point too
        answers = [
            row if names.get(row.point, row.point) == row.point else replace(row, point=names[row.point], kind="point")
            for row in answers
        ]
        return EvaluationResult(
            rows=by_item(answers),
            samples=answers if any(row.sample for row in answers) else (),
            ranked=asked.ranked,
            standing=self._standing(),
            departures=self._departures(),
            baselines=tuple(subject.label for subject in asked.baselines if subject.label not in names),
            parents={name: names.get(subject.label, subject.label) for name, subject in asked.parents.items()},
            same=asked.same,
            noise=self.noise,
            cost_share=1.0 if race is None else race.spent() / race.full_cost(),
            race=asked.race,
            seed=asked.seed,
            finished=finished,
            remarks=(*self._blocks.remarks(), *filter(None, [self._unkept()])),
            guards=tuple(self._guards),
            infeasible=self._infeasible(),
            search=findings(self._search, asked.seed) if finished and self._search is not None else None,
        )


def _common_items(subjects: Iterable[Subject], benchmarks: Collection[str]) -> dict[Cell, range]:
    """The items of these benchmarks that everyone is asked."""
    return {
        cell: range(planned.count)
        for subject in subjects
        for cell, planned in subject.sets.items()
        if planned.benchmark in benchmarks
    }


def _at(row: ScoreRow, label: str, cell: Cell) -> bool:
    return row.point == label and cell_of(row) == cell


def _said(batch: Batch, points: int) -> str:
    """A line about a batch, for whoever watches."""
    promoted = f", {len(batch.promotions)} with more items" if batch.promotions else ""
    new = counted(len(batch.proposals), "new point")
    return f"batch {batch.number}: {new}{promoted}; {counted(points, 'point')} so far"


def _place(row: ScoreRow) -> tuple[str, int, int]:
    return row.task, row.length, row.item


def _standing(rows: Iterable[ScoreRow], points: Sequence[str]) -> tuple[Standing, ...]:
    """Every point's macro score, best first: tasks count alike within a length, lengths alike."""
    by_point: dict[str, dict[Cell, list[float]]] = {point: defaultdict(list) for point in points}
    for row in rows:
        if row.point in by_point:
            by_point[row.point][cell_of(row)].append(row.score)
    found: list[Standing] = []
    for point, cells in by_point.items():
        if cells:
            means = [sum(scores) / len(scores) for scores in cells.values()]
            score = float(macro_weights(list(cells)) @ means)
            found.append(Standing(point, score, min(len(scores) for scores in cells.values()), None, None))
    return tuple(sorted(found, key=lambda standing: (-standing.score, standing.point)))
