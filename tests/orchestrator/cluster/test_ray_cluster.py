"""What becomes of tasks and workers whose node, head or process goes, and how soon: on a clock that the tests move.

Ray is stood in for: what it would take to lose sixteen slots or a network at a chosen second is a cluster, which
`make chaos` has, and its clock is not exact to the second. Its errors are its own.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import pytest
from ray.core.generated.common_pb2 import ActorDiedErrorContext
from ray.exceptions import ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, WorkerCrashedError

from jobs.errors import BadInput, MergeyardError, Unavailable, WorkerLost
from jobs.evaluation_tasks import BlockScores, EvaluationTask, ItemSet
from jobs.job import WorkerSpec
from jobs.merge_tasks import MergeTask, ShardOfPoint
from orchestrator.cluster import dispatching, ray_cluster, ray_evaluating, ray_merging
from orchestrator.cluster.again import LOSSES, TRIES
from orchestrator.cluster.dispatching import Pace, dispatch
from orchestrator.cluster.ray_cluster import HEAD_TIMEOUT, RayCluster, failure
from orchestrator.cluster.ray_evaluating import RayEvaluators
from orchestrator.cluster.ray_merging import RayPool
from orchestrator.watching import Watcher

LARGE = {"CPU": 16.0, "memory": 64e9}
SMALL = {"CPU": 16.0, "memory": 1e9}
HEAD_ALONE = {"memory": 64e9}
NODE_DIED = "The actor died because its node has died. Node Id: 5a80\n\tthe actor's node was terminated unexpectedly"
WORKER_DIED = "The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"


def actor_died(how: str) -> ActorDiedError:
    return ActorDiedError(ActorDiedErrorContext(actor_id=bytes(16), error_message=how))


class Clock:
    """Stands in for `time`: seconds pass when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@dataclass(eq=False)
class Call:
    """A call of a task or of an actor: how it ends, and when."""

    what: Any
    ends: float
    error: Exception | None = None

    def __next__(self) -> Call:
        return self


@dataclass
class Ray:
    """Stands in for `ray`: nodes as the test says, calls that end as the test says."""

    clock: Clock
    nodes_now: list[Mapping[str, float]] = field(default_factory=lambda: [LARGE])
    given_out: list[tuple[float, Any]] = field(default_factory=list[tuple[float, Any]])
    killed: int = 0
    asked: int = 0

    def ending(self, what: Any) -> Call:
        """The call that was made now."""
        self.given_out.append((self.clock.now, what))
        return self.end(what)

    def end(self, what: Any) -> Call:
        """Answered after a second, unless a test says otherwise."""
        return Call(what, self.clock.now + 1)

    def nodes(self) -> list[dict[str, Any]]:
        self.asked += 1
        return [{"Alive": True, "Resources": has} for has in self.nodes_now]

    def get_runtime_context(self) -> Any:
        class Context:
            gcs_address = "127.0.0.1:6379"

        return Context

    def wait(self, calls: Sequence[Call], *, num_returns: int, timeout: float, **_: Any) -> tuple[list[Call], None]:
        first = min(calls, key=lambda call: call.ends)
        if first.ends > self.clock.now + timeout:
            self.clock.sleep(timeout)
            return [], None
        self.clock.now = max(self.clock.now, first.ends)
        return [first], None

    def get(self, call: Call) -> Any:
        if call.error is not None:
            raise call.error
        return call.what

    def remote(self, kind: type) -> Actors:
        return Actors(self)

    def kill(self, actor: Any) -> None:
        self.killed += 1


class Uncounted:
    """Stands in for the meters, which only a running Ray takes."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Ray:
    clock = Clock()
    stand_in = Ray(clock)
    for module in (ray_cluster, ray_merging, ray_evaluating, dispatching):
        monkeypatch.setattr(module, "time", clock)
    for module in (ray_cluster, ray_merging, ray_evaluating):
        monkeypatch.setattr(module, "ray", stand_in)
    monkeypatch.setattr(ray_cluster, "reach", lambda place, seconds: None)
    return stand_in


def cluster(ray: Ray, *, patience: float = 0.0) -> RayCluster:
    """A cluster as it is after it was joined."""
    opened: Any = RayCluster.__new__(RayCluster)
    opened.spec, opened.gpus, opened._patience = WorkerSpec(), 0.0, patience
    opened._nodes, opened.meters, opened.device = ray_cluster._Nodes(), Uncounted(), "cpu"
    return opened


def pool(ray: Ray) -> RayPool:
    """A pool of such a cluster."""

    class Merge:
        @staticmethod
        def remote(task: MergeTask, *_: Any) -> Call:
            return ray.ending(task)

    opened: Any = RayPool.__new__(RayPool)
    opened._cluster, opened._merge = cluster(ray), Merge
    return opened


# ---- merging


def test_the_work_of_sixteen_slots_that_a_node_took_along_is_given_out_again_in_the_second_it_is_missed(
    ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    began = ray.clock.now
    tasks = [
        MergeTask(
            "memory://run", f"{number}", (), (ShardOfPoint("p", f"{number}", "", "", ()),), {}, 0, "float32", 1, 1
        )
        for number in range(16)
    ]

    def end(task: Any) -> Call:
        if ray.clock.now == began:
            return Call(task, began + 13, NodeDiedError("its node is dead"))
        return Call([], ray.clock.now + 1)

    monkeypatch.setattr(ray, "end", end)
    assert len([*pool(ray).run(tasks, Watcher(visible=False))]) == 16
    again = [at - began for at, _ in ray.given_out[16:]]
    assert again == [13.0] * 16


# ---- failures


@pytest.mark.parametrize(
    ("error", "node_lost"),
    [
        (NodeDiedError("Task failed because the node it was running on is dead or unavailable."), True),
        (actor_died(NODE_DIED), True),
        (ActorUnavailableError("RPC error: keepalive watchdog timeout", bytes(16)), True),
        (actor_died(WORKER_DIED), False),
        (WorkerCrashedError(), False),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_node_that_goes_is_told_from_a_worker_that_dies(error: Any, node_lost: bool) -> None:
    found = failure(error, "shard of 2 points")
    assert found.node_lost == node_lost
    assert found.error.exit_code == 75 and found.error.retry
    assert ("lost with its node" if node_lost else "its worker died") in str(found.error)


def test_a_worker_that_dies_names_its_task_and_the_node_where_it_was(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merging, a task that told where it runs; evaluating, a block of an actor that did when it was opened."""
    task = MergeTask("memory://run", "00007", (), (ShardOfPoint("ties", "u", "", "", ()),), {}, 0, "float32", 1, 1)
    told: set[Call] = set()

    def dies_after_its_first_word(call: Call) -> Any:
        if isinstance(call.what, MergeTask) and call not in told:
            told.add(call)
            return "10.0.0.7"
        if isinstance(call.what, str):
            return "10.0.0.8"
        raise OutOfMemoryError("Task was killed due to the node running low on memory.")

    monkeypatch.setattr(ray, "get", dies_after_its_first_word)
    with pytest.raises(WorkerLost, match=r"^00007 of ties on node 10\.0\.0\.7: its worker died 4 times"):
        list(pool(ray).run([task], Watcher(visible=False)))
    with pytest.raises(
        WorkerLost, match=r"^vt at 4096 tokens, items 0 to 63, of p on node 10\.0\.0\.8: its worker died"
    ):
        list(answers(ray, 1, 1))


# ---- the head


@pytest.mark.parametrize("seconds", [15.0, 60.0])
def test_a_head_that_a_silent_cut_takes_is_missed_in_time_for_an_orderly_end(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    def swallowed(place: str, patience: float) -> None:
        ray.clock.sleep(patience)
        raise TimeoutError

    monkeypatch.setenv(HEAD_TIMEOUT, str(seconds))
    nodes = ray_cluster._Nodes()
    assert nodes.living() == [LARGE]
    monkeypatch.setattr(ray_cluster, "reach", swallowed)
    cut = ray.clock.now
    with pytest.raises(Unavailable, match=r"the head of the Ray cluster at 127\.0\.0\.1:6379 is gone"):
        while ray.clock.now < cut + 2 * seconds:
            ray.clock.sleep(1.0)  # as ray.wait does
            nodes.living()
    assert ray.clock.now - cut < seconds


# ---- joining


@pytest.mark.parametrize("address", ["auto", "PLACE"])
@pytest.mark.parametrize("answers", [True, False])
def test_a_cluster_that_refuses_wants_a_token_and_one_that_has_just_gone_is_to_be_tried_again(
    monkeypatch: pytest.MonkeyPatch, answers: bool, address: str
) -> None:
    """Ray says the same of both, in the words here, after minutes; whether something listens is asked for real."""
    with socket.socket() as head:
        head.bind(("127.0.0.1", 0))
        head.listen()
        place = f"127.0.0.1:{head.getsockname()[1]}"

        def refused(**_: Any) -> None:
            if not answers:
                head.close()
            raise ConnectionError(f"Failed to connect to Ray cluster at {place}")

        monkeypatch.setattr(ray_cluster, "_init", refused)
        with pytest.raises(BadInput if answers else Unavailable, match="RAY_AUTH_TOKEN" if answers else "just gone"):
            ray_cluster._connect(address.replace("PLACE", place))


def test_where_no_ray_is_found_it_is_to_be_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(**_: Any) -> None:
        raise ConnectionError("Could not find any running Ray instance. Please specify the one to connect to.")

    monkeypatch.setattr(ray_cluster, "_init", refused)
    with pytest.raises(Unavailable, match="Could not find any running Ray"):
        ray_cluster._connect("auto")


# ---- nodes that are not there


def room(opened: RayCluster) -> int:
    return opened.awaited(opened.room, "a worker", 4 * 10**9, "ask for less")


@pytest.mark.parametrize("nodes", [[], [HEAD_ALONE]])
def test_a_cluster_without_nodes_now_is_one_to_try_again(ray: Ray, nodes: list[Mapping[str, float]]) -> None:
    ray.nodes_now = nodes
    began = ray.clock.now
    with pytest.raises(Unavailable, match="run again"):
        room(cluster(ray, patience=60.0))
    assert 60 <= ray.clock.now - began < 63


def test_a_head_that_is_away_is_not_a_lack_of_large_nodes(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(place: str, patience: float) -> None:
        raise ConnectionRefusedError

    opened = cluster(ray, patience=60.0)
    monkeypatch.setattr(ray_cluster, "reach", refused)
    with pytest.raises(Unavailable, match="is gone"):
        room(opened)


def test_nodes_that_are_all_too_small_are_bad_input(ray: Ray) -> None:
    ray.nodes_now = [HEAD_ALONE, SMALL]
    with pytest.raises(BadInput, match=r"a worker of 1 CPUs, 0 GPUs and 4\.0 GB; ask for less"):
        room(cluster(ray))


def test_a_node_that_joins_is_waited_for_and_that_is_said_once(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def sleep(seconds: float) -> None:
        ray.clock.now += seconds
        if ray.clock.now > 130:
            ray.nodes_now = [HEAD_ALONE, LARGE]

    ray.nodes_now = [HEAD_ALONE]
    monkeypatch.setattr(ray.clock, "sleep", sleep)
    with caplog.at_level(logging.WARNING):
        assert room(cluster(ray, patience=60.0)) == 16
    assert len(caplog.records) == 1 and "waiting 60 s" in caplog.text


def test_nodes_are_looked_at_once_a_second_however_often_there_is_news(ray: Ray) -> None:
    opened = cluster(ray)
    for _ in range(1000):
        opened.room()
        ray.clock.sleep(0.01)
    assert 9 <= ray.asked <= 11


@pytest.mark.parametrize(
    ("gpus", "slots"), [(0.1, 20), (0.3, 6), (0.5, 4), (0.6, 2), (1.0, 2), (2.0, 1), (3.0, 0)], ids=str
)
def test_a_worker_of_a_fraction_is_on_one_gpu(gpus: float, slots: int) -> None:
    """Ray puts two actors of 0.6 GPU on two GPUs, and lets a third wait."""
    has = {"GPU": 2.0, "CPU": 64.0, "memory": 1e12}
    assert ray_cluster._worker_slots(has, WorkerSpec(gpus=gpus), gpus) == slots


def test_cpus_are_counted_as_ray_counts_them() -> None:
    """0.1 is not a number of float64: 2 // 0.1 is 19."""
    has = {"CPU": 2.0, "memory": 1e12}
    assert ray_cluster._worker_slots(has, WorkerSpec(cpus=0.1), 0.0) == 20


# ---- evaluating


class Actors:
    """Stands in for the actor's class: each call is one of the stand-in for Ray."""

    def __init__(self, ray: Ray) -> None:
        self._ray = ray

    def options(self, **_: Any) -> Actors:
        return self

    def remote(self) -> Actors:
        return self

    @property
    def open(self) -> Any:
        return _Method(lambda *_: self._ray.ending("open"))

    @property
    def evaluate(self) -> Any:
        return _Method(self._ray.ending)

    @property
    def close(self) -> Any:
        return _Method(lambda: self._ray.ending("close"))


@dataclass
class _Method:
    remote: Any


def evaluators(ray: Ray, workers: int) -> RayEvaluators:
    """Evaluators on nodes that hold so many."""
    ray.nodes_now = [{"CPU": 1.0, "memory": 64e9}] * workers
    opened: Any = cluster(ray)
    opened.device, opened.resources = "cuda", {"memory": 0}  # on a GPU, memory is not looked at before
    return RayEvaluators({}, opened)


def blocks(count: int) -> list[EvaluationTask]:
    """Blocks of one cell."""
    items = ItemSet("ruler", "vt", 4096, 1, "digest", ((0, 64 * count, "items/x.parquet"),), 4096)
    return [
        EvaluationTask("0", "p", "p", (), items, 64 * number, 64 * number + 64, 0, f"scores/p-{number}")
        for number in range(count)
    ]


def answers(ray: Ray, workers: int, count: int) -> Iterator[tuple[EvaluationTask, BlockScores]]:
    return dispatch(blocks(count), evaluators(ray, workers), Pace())


@pytest.mark.parametrize("error", [actor_died(NODE_DIED), actor_died(WORKER_DIED)], ids=["node", "worker"])
def test_four_blocks_of_one_cell_that_are_lost_together_are_each_tried_again(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    lost: set[str] = set()

    def end(what: Any) -> Call:
        if isinstance(what, str):
            return Call(None, ray.clock.now)
        if what.key not in lost:
            lost.add(what.key)
            return Call(None, 110.0, error)
        return Call(BlockScores([]), ray.clock.now + 1)

    monkeypatch.setattr(ray, "end", end)
    assert len([*answers(ray, 4, 8)]) == 8
    assert len(lost) == 8 and ray.killed == 8


@pytest.mark.parametrize(("error", "times"), [(actor_died(NODE_DIED), LOSSES), (actor_died(WORKER_DIED), TRIES)])
def test_a_block_that_always_loses_its_worker_ends_the_evaluation(
    ray: Ray, monkeypatch: pytest.MonkeyPatch, error: Exception, times: int
) -> None:
    def end(what: Any) -> Call:
        return Call(None, ray.clock.now) if isinstance(what, str) else Call(None, ray.clock.now + 1, error)

    monkeypatch.setattr(ray, "end", end)
    with pytest.raises(WorkerLost, match=f"{times} times"):
        [*answers(ray, 1, 1)]
    assert sum(what != "open" for _, what in ray.given_out) == times


def test_workers_that_fail_to_start_together_are_one_failure_and_the_next_start_after_a_pause(
    ray: Ray, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(what: Any) -> Call:
        if what == "open" and ray.clock.now < 106:
            return Call(None, ray.clock.now + 1, actor_died(WORKER_DIED))
        return Call(BlockScores([]), ray.clock.now + 1)

    monkeypatch.setattr(ray, "end", end)
    assert len([*answers(ray, 4, 4)]) == 4
    starts = sorted({at for at, what in ray.given_out if what == "open"})
    assert [after - before for before, after in pairwise(starts)] == [2.0, 3.0, 5.0]
    assert all([at for at, what in ray.given_out if what == "open"].count(start) == 4 for start in starts)


def test_workers_that_never_start_end_the_evaluation(ray: Ray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "end", lambda what: Call(None, ray.clock.now + 1, WorkerCrashedError()))
    with pytest.raises(MergeyardError, match=f"an evaluation worker: its worker died {TRIES} times"):
        [*answers(ray, 4, 4)]
    assert len(ray.given_out) == 4 * TRIES
