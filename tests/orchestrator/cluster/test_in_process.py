"""Which task is next, which again, and when: by arithmetic, with the clock that is asked for."""

from __future__ import annotations

import pickle

import pytest

import workers.merging.shard
from jobs.errors import AccessDenied, BadInput, CorruptData, MergeyardError, StorageUnavailable, WorkerLost
from jobs.evaluation_tasks import BlockScores, EvaluationTask, ItemSet
from jobs.merge_tasks import MergeTask, Receipt, ShardOfPoint
from orchestrator.cluster.again import LOSSES, TRIES, Failure, Queue, Tries, placing
from orchestrator.cluster.in_process import InProcessEvaluators, InProcessPool
from orchestrator.watching import Watcher

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


def merge(name: str, *points: str) -> MergeTask:
    shards = tuple(ShardOfPoint(point, name, name, name, ()) for point in points or ("p",))
    return MergeTask("memory://run", name, (), shards, {}, 0, "float32", 1, 1)


# ---- where it failed


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [MergeyardError, BadInput, CorruptData, AccessDenied, WorkerLost, StorageUnavailable])
def test_an_error_keeps_its_class_and_gains_its_place(kind: type[MergeyardError], protocol: int) -> None:
    with pytest.raises(kind) as refused, placing("vt of p on node 10.0.0.7"):
        raise kind("s3://bucket/x:", 404)
    arrived = pickle.loads(pickle.dumps(refused.value, protocol))
    assert (type(arrived), str(arrived)) == (kind, "vt of p on node 10.0.0.7: s3://bucket/x: 404")
    assert (arrived.exit_code, arrived.retry) == (kind.exit_code, kind.retry)


def test_a_foreign_error_becomes_one_line_of_ours() -> None:
    with pytest.raises(MergeyardError) as refused, placing("vt of p"):
        raise RuntimeError("The size of tensor a\nmust match  tensor b")
    assert str(refused.value) == "vt of p: RuntimeError: The size of tensor a must match tensor b"
    assert (type(refused.value), refused.value.exit_code) == (MergeyardError, 1)
    assert isinstance(refused.value.__cause__, RuntimeError)


def test_a_signal_is_not_an_error_with_a_place() -> None:
    with pytest.raises(KeyboardInterrupt), placing("vt of p"):
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("points", "named"),
    [
        (["ties-0.3"], "00007 of ties-0.3"),
        (["a", "b", "c"], "00007 of a, b, c"),
        (["a", "b", "c", "d", "e"], "00007 of a, b, c and 2 more points"),
    ],
)
@pytest.mark.parametrize("raised", [BadInput("no room"), KeyError("x")], ids=["ours", "foreign"])
def test_a_merge_that_fails_in_this_process_names_its_shard_and_points(
    monkeypatch: pytest.MonkeyPatch, points: list[str], named: str, raised: Exception
) -> None:
    def merged(task: MergeTask, **_: object) -> list[Receipt]:
        raise raised

    monkeypatch.setattr(workers.merging.shard, "merge_task", merged)
    with pytest.raises(MergeyardError) as refused:
        list(InProcessPool().run([merge("00007", *points)], Watcher(visible=False)))
    words = {BadInput: "no room", MergeyardError: "KeyError: 'x'"}
    assert str(refused.value) == f"{named}: {words[type(refused.value)]}"


@pytest.mark.parametrize(
    ("length", "named"), [(4096, "vt at 4096 tokens, items 64 to 127, of ties-0.3"), (0, "vt of ties-0.3")]
)
def test_a_block_that_fails_in_this_process_names_its_items_and_point(
    monkeypatch: pytest.MonkeyPatch, length: int, named: str
) -> None:
    class Broken:
        def __init__(self, *_: object) -> None:
            pass

        def evaluate(self, task: EvaluationTask) -> BlockScores:
            raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("workers.evaluating.worker.Evaluator", Broken)
    evaluators = InProcessEvaluators({})
    items = ItemSet("ruler", "vt", length, 1, "digest", (), 4096)
    evaluators.submit(0, EvaluationTask("0", "ties-0.3", "d", (), items, 64, 128, 0, "scores/x"))
    done = evaluators.next_done()
    assert done is not None and isinstance(done[1], Failure)
    assert str(done[1].error) == f"{named}: ZeroDivisionError: division by zero"


# ---- in this process


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
    receipts = InProcessPool().run([merge("a"), merge("b")], Watcher(visible=False))
    assert [receipt.unit for [receipt] in receipts] == ["b", "a"]
    assert tried == ["a", "b", "a"]
