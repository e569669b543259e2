"""Which worker answers which block: longest first, points kept together, nothing lost with a worker."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import pytest

from jobs.errors import WorkerLost
from jobs.evaluation import EvaluationTask, ItemSet, ScoreRow
from orchestrator.dispatching import dispatch
from orchestrator.pool import Failure


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

    def next_done(self) -> tuple[EvaluationTask, list[ScoreRow] | Failure] | None:
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
        return task, []

    def close(self) -> None:
        pass


def done(tasks: Sequence[EvaluationTask], evaluators: Scripted) -> list[str]:
    return [task.key for task, _ in dispatch(tasks, evaluators)]


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
    for task, _ in dispatch(tasks, Scripted(1)):
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
    """Workers on a clock of their own: a block takes a second for ten tokens; the first of `hangs` never ends."""

    def __init__(self, workers: int, monkeypatch: pytest.MonkeyPatch, *, hangs: Collection[str]) -> None:
        super().__init__(workers)
        self.now = 0.0
        self.hangs = set(hangs)
        self.hanging: set[str] = set()
        self.until: dict[str, float] = {}
        monkeypatch.setattr("orchestrator.dispatching.time.monotonic", lambda: self.now)

    def submit(self, worker: int, task: EvaluationTask) -> None:
        super().submit(worker, task)
        if task.key in self.hangs:
            self.hangs.discard(task.key)
            self.hanging.add(task.key)
        else:
            self.until[task.key] = self.now + task.items.tokens / 10

    def next_done(self) -> tuple[EvaluationTask, list[ScoreRow] | Failure] | None:
        self.now += 1.0
        ended = [entry for entry in self.running if self.until.get(entry[1].key, self.now + 1) <= self.now]
        if not ended:
            assert self.now < 10_000, "waits forever"
            return None
        worker, task = ended[-1]  # the second, where the first hangs
        self.running.remove((worker, task))
        if task.key in self.hanging and any(other.key == task.key for _, other in self.running):
            self.until.pop(task.key)
        return task, []


def test_what_hangs_on_one_worker_is_answered_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [block("a", tokens) for tokens in (100, 110, 120, 130)]
    workers = Clocked(2, monkeypatch, hangs=["scores/0/a-130"])
    assert sorted(done(tasks, workers)) == sorted(task.key for task in tasks)
    assert workers.asked.count((0, "a-130")) == workers.asked.count((1, "a-130")) == 1
    # the others are through after 33 s; the hung block is late after a minute, as three times 13 s is less
    assert 60 < workers.now < 80


def test_a_block_is_given_out_a_second_time_and_no_third(monkeypatch: pytest.MonkeyPatch) -> None:
    class Both(Clocked):
        def submit(self, worker: int, task: EvaluationTask) -> None:
            super().submit(worker, task)
            if self.now > 0 and task.key in self.hanging:  # the second takes very long
                self.until[task.key] = self.now + 500

    workers = Both(3, monkeypatch, hangs=["scores/0/a-130"])
    assert len(done([block("a", tokens) for tokens in (100, 130)], workers)) == 2
    assert [key for _, key in workers.asked].count("a-130") == 2


def test_an_answer_that_comes_after_another_counts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = Scripted(1)
    stale = block("before", 10)
    workers.running.append((7, stale))  # of an evaluation that did not wait for it
    assert done([block("a", 10)], workers) == ["scores/0/a-10"]
