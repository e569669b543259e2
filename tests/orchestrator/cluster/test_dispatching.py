"""Which worker answers which block: longest first, points kept together, nothing lost with a worker."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import pytest

from jobs.errors import BadInput, WorkerLost
from jobs.evaluation_tasks import BlockScores, EvaluationTask, ItemSet
from orchestrator.cluster.again import Failure
from orchestrator.cluster.dispatching import Pace, dispatch


def block(point: str, tokens: int, model: str = "0") -> EvaluationTask:
    items = ItemSet("ruler", "vt", tokens, 1, 1, "items/x.parquet", tokens)
    return EvaluationTask(model, point, point, (), items, 0, 1, 0, f"scores/{model}/{point}-{tokens}")


class Scripted:
    """Workers that answer in the order in which they were asked; `lost` blocks lose their worker the first time."""

    def __init__(self, workers: int, *, lost: Collection[str] = (), joins_after: int | None = None) -> None:
        self.there = set(range(workers))
        self.lost = set(lost)
        self.joins_after = joins_after
        self.asked: list[tuple[int, str]] = []
        self.running: list[tuple[int, EvaluationTask]] = []

    def idle(self) -> Collection[int]:
        return self.there - {worker for worker, _ in self.running}

    def submit(self, worker: int, task: EvaluationTask) -> None:
        assert worker in self.idle()
        self.asked.append((worker, task.key.removeprefix("scores/0/")))
        self.running.append((worker, task))

    def next_done(self) -> tuple[EvaluationTask, BlockScores | Failure] | None:
        if self.joins_after is not None and len(self.asked) >= self.joins_after:
            self.there.add(max(self.there, default=0) + 1)
            self.joins_after = None
            return None
        if not self.running:
            raise WorkerLost("nobody is left")
        worker, task = self.running.pop(0)
        if task.key in self.lost:
            self.lost.discard(task.key)
            self.there.discard(worker)
            return task, Failure(WorkerLost("its node went"), node_lost=True)
        return task, BlockScores([])

    def close(self) -> None:
        pass


def done(tasks: Sequence[EvaluationTask], evaluators: Scripted) -> list[str]:
    return [task.key for task, _ in dispatch(tasks, evaluators, Pace())]


def test_the_costliest_point_comes_first_and_its_longest_block_before_its_others() -> None:
    tasks = [block("cheap", 10), block("dear", 50), block("cheap", 20), block("dear", 200)]
    evaluators = Scripted(1)
    done(tasks, evaluators)
    assert [key for _, key in evaluators.asked] == ["dear-200", "dear-50", "cheap-20", "cheap-10"]


def test_a_worker_stays_with_its_point_and_another_takes_another() -> None:
    tasks = [block(point, tokens) for point in "ab" for tokens in (10, 20, 30)]
    evaluators = Scripted(2)
    done(tasks, evaluators)
    points = {worker: {key[0] for at, key in evaluators.asked if at == worker} for worker in (0, 1)}
    assert sorted(map(sorted, points.values())) == [["a"], ["b"]]


def test_idle_workers_help_with_the_last_point() -> None:
    evaluators = Scripted(3)
    done([block("a", tokens) for tokens in (10, 20, 30)], evaluators)
    assert {worker for worker, _ in evaluators.asked} == {0, 1, 2}


def test_a_worker_stays_with_its_model_while_that_has_points() -> None:
    tasks = [block("a", 10, "x"), block("b", 10, "x"), block("c", 11, "y"), block("d", 12, "y")]
    order: list[str] = []
    for task, _ in dispatch(tasks, Scripted(1), Pace()):
        order.append(task.model)
    assert order == ["y", "y", "x", "x"]


def test_the_block_of_a_lost_worker_is_answered_by_another() -> None:
    tasks = [block("a", tokens) for tokens in (10, 20, 30)]
    evaluators = Scripted(2, lost=["scores/0/a-30"])
    assert sorted(done(tasks, evaluators)) == [task.key for task in tasks]
    assert [key for _, key in evaluators.asked].count("a-30") == 2


def test_a_worker_that_joins_late_is_given_work() -> None:
    evaluators = Scripted(1, joins_after=1)
    done([block(point, 10) for point in "abcd"], evaluators)
    assert {worker for worker, _ in evaluators.asked} == {0, 1}


def test_work_waits_for_the_first_worker_to_come() -> None:
    evaluators = Scripted(0, joins_after=0)
    assert len(done([block("a", 10), block("b", 10)], evaluators)) == 2


def test_what_no_retry_mends_ends_it() -> None:
    evaluators = Scripted(1, lost=["scores/0/a-10"])
    with pytest.raises(WorkerLost):
        done([block("a", 10)], evaluators)


# ---- a worker that hangs


class Clocked(Scripted):
    """Workers on a clock of their own: a block takes a second for ten tokens, the first try of `slow` ones longer.

    `fails` are those whose second try comes to nothing.
    """

    def __init__(
        self,
        workers: int,
        monkeypatch: pytest.MonkeyPatch,
        *,
        slow: Mapping[str, float],
        fails: Mapping[str, Failure] | None = None,
    ) -> None:
        super().__init__(workers)
        self.now = 0.0
        self.slow = dict(slow)
        self.fails = dict(fails or {})
        self.until: dict[int, float] = {}
        monkeypatch.setattr("orchestrator.cluster.dispatching.time.monotonic", lambda: self.now)
        monkeypatch.setattr("orchestrator.cluster.dispatching.time.sleep", self._sleep)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def submit(self, worker: int, task: EvaluationTask) -> None:
        super().submit(worker, task)
        self.until[worker] = self.now + self.slow.pop(task.key, task.items.tokens / 10)

    def next_done(self) -> tuple[EvaluationTask, BlockScores | Failure] | None:
        self.now += 1.0
        assert self.now < 10_000, "waits forever"
        for worker, task in self.running:
            if self.until[worker] <= self.now:
                self.running.remove((worker, task))
                second = [key for _, key in self.asked].count(task.key.removeprefix("scores/0/")) > 1
                return task, self.fails.pop(task.key) if second and task.key in self.fails else BlockScores([])
        return None


HUNG = "scores/0/a-130"
TASKS = [block("a", tokens) for tokens in (100, 110, 120, 130)]


def test_what_hangs_on_one_worker_is_answered_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Clocked(2, monkeypatch, slow={HUNG: 1e9})
    assert sorted(done(TASKS, workers)) == sorted(task.key for task in TASKS)
    assert workers.asked.count((0, "a-130")) == workers.asked.count((1, "a-130")) == 1
    # the others are through after 33 s; the hung block is late after a minute, as three times 13 s is less
    assert 60 < workers.now < 80


def test_a_block_is_given_out_a_second_time_and_no_third(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Clocked(3, monkeypatch, slow={HUNG: 500})
    workers.slow[HUNG] = 500
    first = workers.submit

    def submit(worker: int, task: EvaluationTask) -> None:
        if task.key == HUNG:
            workers.slow[HUNG] = 500  # each time
        first(worker, task)

    monkeypatch.setattr(workers, "submit", submit)
    assert len(done(TASKS, workers)) == 4 and workers.now == pytest.approx(500, abs=2)
    assert [key for _, key in workers.asked].count("a-130") == 2


@pytest.mark.parametrize("failure", [Failure(BadInput("no room")), Failure(WorkerLost("gone"), node_lost=True)])
def test_where_a_copy_comes_to_nothing_the_first_goes_on(monkeypatch: pytest.MonkeyPatch, failure: Failure) -> None:
    workers = Clocked(2, monkeypatch, slow={HUNG: 600}, fails={HUNG: failure})
    assert len(done(TASKS, workers)) == 4 and workers.now == pytest.approx(600, abs=2)
    assert [key for _, key in workers.asked].count("a-130") == 2


def test_the_pace_is_that_of_all_blocks_before(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace()
    workers = Clocked(2, monkeypatch, slow={HUNG: 1e9})
    assert len(list(dispatch(TASKS[:3], workers, pace))) == 3
    assert len(list(dispatch(TASKS[3:], workers, pace))) == 1 and workers.now < 120


def test_a_first_block_that_waited_for_the_parents_makes_no_other_late_later() -> None:
    pace, like = Pace(), block("a", 100)
    for seconds in (3000, 10, 11):  # the middle one took 11 s: late after a minute, not after three times 3,000 s
        pace.took(like, seconds)
    assert not pace.late(like, 60) and pace.late(like, 61)
    pace.took(replace(like, items=replace(like.items, length=99)), 1e-3)  # shorter ones say nothing of it
    assert not pace.late(like, 60) and pace.late(like, 61)


def test_a_whole_task_of_the_harness_may_take_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = replace(block("a", 130), items=replace(block("a", 130).items, length=0))
    workers = Clocked(2, monkeypatch, slow={HUNG: 5000})
    assert len(done([*TASKS[:3], whole], workers)) == 4 and workers.now == pytest.approx(5000, abs=2)


def test_an_answer_that_comes_after_another_counts_no_more() -> None:
    workers = Scripted(1)
    workers.running.append((7, block("before", 10)))  # of an evaluation that did not wait for it
    assert done([block("a", 10)], workers) == ["scores/0/a-10"]
