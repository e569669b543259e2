"""Which task is next, which again, and when: by arithmetic, with the clock that is asked for."""

from __future__ import annotations

import pytest

import workers.merging.shard
from jobs.errors import BadInput, StorageUnavailable, WorkerLost
from jobs.merge_tasks import MergeTask, PointShard, Receipt
from orchestrator.cluster.again import LOSSES, TRIES, Failure, Queue, Tries
from orchestrator.cluster.in_process import InProcessPool

CRASH = Failure(WorkerLost("its worker died"))
NODE_LOST = Failure(WorkerLost("lost with its node"), node_lost=True)


def queue(*tasks: str) -> Queue[str]:
    return Queue(tasks, str)


def taken(waiting: Queue[str], now: float) -> list[str]:
    """All that may be tried now."""
    return list(iter(lambda: waiting.next(now), None))


def test_what_a_node_took_along_is_given_out_again_at_once_before_what_is_new() -> None:
    tasks = [f"task{number}" for number in range(20)]
    waiting = queue(*tasks)
    running = [waiting.next(0.0) for _ in range(16)]
    for task in running:
        assert task is not None
        waiting.again(task, NODE_LOST, 13.0)  # when a silent node is given up
    assert [waiting.next(13.0) for _ in range(16)] == running
    assert taken(waiting, 13.0) == tasks[16:]


def test_sixteen_failures_at_once_wait_a_second_together_and_not_after_each_other() -> None:
    tasks = [f"task{number}" for number in range(16)]
    waiting = queue(*tasks)
    for task in taken(waiting, 0.0):
        waiting.again(task, CRASH, 5.0)
    assert (taken(waiting, 5.9), waiting.pause(5.5)) == ([], 0.5)
    assert taken(waiting, 6.0) == tasks


def test_a_task_that_fails_waits_1_2_and_4_seconds_while_others_go_on() -> None:
    waiting = queue("bad", "good")
    assert waiting.next(0.0) == "bad"
    now = 0.0
    for seconds in (1.0, 2.0, 4.0):
        waiting.again("bad", CRASH, now)
        if seconds == 1.0:
            assert waiting.next(now) == "good"
        assert waiting.next(now + 0.99 * seconds) is None
        assert waiting
        now += seconds
        assert waiting.next(now) == "bad"
    with pytest.raises(WorkerLost, match="its worker died"):
        waiting.again("bad", CRASH, now)
    assert not waiting


def test_a_pause_is_told_no_longer_than_asked_and_not_for_what_may_go_already() -> None:
    waiting = queue("first", "second")
    for task in taken(waiting, 0.0):
        waiting.again(task, CRASH, 0.0 if task == "first" else 0.5)
    assert waiting.pause(0.0) == 1.0
    assert waiting.pause(0.0, 0.25) == 0.25
    assert waiting.pause(1.0) == 0.5  # of the second; the first needs room, not time
    assert queue().pause(0.0, 7.0) == 7.0


def test_nodes_that_go_are_not_counted_as_the_tasks_own_failures() -> None:
    waiting = queue("task")
    for _ in range(LOSSES - 1):
        waiting.again("task", NODE_LOST, 0.0)
    for _ in range(TRIES - 1):
        waiting.again("task", CRASH, 0.0)
    with pytest.raises(WorkerLost, match="its worker died"):
        waiting.again("task", CRASH, 0.0)


def test_a_task_that_takes_every_node_with_it_is_given_up() -> None:
    waiting = queue("task")
    for _ in range(LOSSES - 1):
        waiting.again("task", NODE_LOST, 0.0)
    with pytest.raises(WorkerLost, match="lost with its node"):
        waiting.again("task", NODE_LOST, 0.0)


def test_a_node_that_takes_tasks_until_it_is_missed_does_not_use_one_up() -> None:
    tries = Tries()
    pauses = [tries.again(NODE_LOST) for _ in range(LOSSES - 1)]
    assert pauses[0] == 0.0
    assert sum(pauses) >= 20.0  # a silent node is missed by then
    with pytest.raises(WorkerLost, match="lost with its node"):
        tries.again(NODE_LOST)


def test_what_no_retry_mends_is_raised_at_once() -> None:
    with pytest.raises(BadInput):
        queue("task").again("task", Failure(BadInput("wrong")), 0.0)


def merge(name: str) -> MergeTask:
    return MergeTask("memory://run", name, (), (PointShard("p", name, name, name, ()),), {}, 0, "float32", 1, 1)


def test_in_this_process_a_store_that_is_away_for_one_task_does_not_hold_up_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The arithmetic is replaced: what fails first, and in which order tasks are tried, is all there is to see."""
    tried: list[str] = []

    def merged(task: MergeTask, **_: object) -> list[Receipt]:
        tried.append(task.shard)
        if tried == ["a"]:
            raise StorageUnavailable("no answer")
        return [Receipt(task.shard, "p", task.shard, 0, "", {}, (), 0, 0.0, "w")]

    monkeypatch.setattr(workers.merging.shard, "merge_task", merged)
    receipts = InProcessPool().run([merge("a"), merge("b")], lambda read, written: None)
    assert [receipt.unit for [receipt] in receipts] == ["b", "a"]
    assert tried == ["a", "b", "a"]
