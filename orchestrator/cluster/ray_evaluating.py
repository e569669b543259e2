"""Evaluation on Ray: one actor a worker, which keeps the parents and an engine and becomes one point after another.

An actor is never restarted in place: the block of a dead one is given to another, and a new one is started as soon as
the cluster has room, on whichever node. A node that joins is used; one that leaves is missed, not waited for.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from jobs.errors import MergeyardError, WorkerLost
from jobs.evaluation_tasks import BlockScores, EvaluationTask, ModelSpec
from orchestrator.cluster.again import Failure, Tries, placing
from orchestrator.cluster.ray_cluster import LOOK_SECONDS, RayCluster, check_code, failure, on_node, this_node
from workers.fingerprint import fingerprint
from workers.gpu_memory import take_part

WORKING_BYTES = 1 << 30
"""Memory of Python, torch and a context's keys and values, beside the weights."""

CLOSE_SECONDS = 5.0
"""How long an engine may take to close."""


class RayEvaluators:
    """As many actors as the cluster has room for, now and later."""

    def __init__(self, models: Mapping[str, ModelSpec], cluster: RayCluster) -> None:
        self._models, self._cluster = models, cluster
        self._memory = _memory(models, cluster)
        asked = {**cluster.resources, "memory": max(cluster.resources["memory"], self._memory)}
        self._remote: Any = ray.remote(_RemoteEvaluator).options(**asked, max_restarts=0, max_task_retries=0)
        self._actors: dict[int, Any] = {}
        self._nodes: dict[int, str] = {}
        self._starting: dict[Any, tuple[Any, int]] = {}
        self._running: dict[Any, tuple[int, EvaluationTask]] = {}
        self._failed: set[str] = set()
        self._started = 0
        self._tries, self._round, self._not_before = Tries(), 0, 0.0
        self._grow()

    def idle(self) -> Collection[int]:
        return self._actors.keys() - {worker for worker, _ in self._running.values()}

    def submit(self, worker: int, task: EvaluationTask) -> None:
        if task.key in self._failed:
            self._failed.remove(task.key)
            self._cluster.meters.retried("evaluate")
        self._running[self._actors[worker].evaluate.remote(task)] = (worker, task)

    def next_done(self) -> tuple[EvaluationTask, BlockScores | Failure] | None:
        self._grow()
        if not self._running and not self._starting:  # the cluster has no room left; it may come back
            time.sleep(LOOK_SECONDS)
            return None
        ready, _ = ray.wait([*self._running, *self._starting], num_returns=1, timeout=LOOK_SECONDS)
        for reference in ready:
            if reference in self._starting:
                self._welcome(reference)
                return None
            return self._result(reference)
        return None

    def close(self) -> None:
        """Ends the actors; each is given a moment to close its engine."""
        closing = [actor.close.remote() for actor in self._actors.values()]
        if closing:
            ray.wait(closing, num_returns=len(closing), timeout=CLOSE_SECONDS)
        for actor in [*self._actors.values(), *(actor for actor, _ in self._starting.values())]:
            ray.kill(actor)

    def _grow(self) -> None:
        """Starts as many actors as the cluster has room for, unless a start failed a moment ago."""
        if time.monotonic() < self._not_before:
            return
        for _ in range(self._cluster.room(self._memory) - len(self._actors) - len(self._starting)):
            actor = self._remote.remote()
            opened = actor.open.remote(self._models, self._cluster.device, self._cluster.gpus, fingerprint())
            self._starting[opened] = (actor, self._round)

    def _welcome(self, reference: Any) -> None:
        actor, begun = self._starting.pop(reference)
        try:
            node: str = ray.get(reference)
        except (RayError, MergeyardError) as error:
            failed = failure(error, "an evaluation worker")
            if begun == self._round or not failed.error.retry:  # of those that began together, one speaks for all
                self._not_before = time.monotonic() + self._tries.again(failed)
                self._round += 1
            return
        self._actors[self._started], self._nodes[self._started] = actor, node
        self._started += 1
        self._tries = Tries()

    def _result(self, reference: Any) -> tuple[EvaluationTask, BlockScores | Failure]:
        worker, task = self._running.pop(reference)
        try:
            scores: BlockScores = ray.get(reference)
        except (RayError, MergeyardError) as error:
            failed = failure(error, on_node(task.name, self._nodes[worker]))
            if isinstance(failed.error, WorkerLost):
                ray.kill(self._actors.pop(worker))
            self._failed.add(task.key)
            return task, failed
        self._cluster.meters.evaluated(len(scores.rows), sum(row.tokens for row in scores.rows))
        return task, scores


def _memory(models: Mapping[str, ModelSpec], cluster: RayCluster) -> int:
    """Memory of a worker on a CPU in bytes, whatever the job requests; `BadInput` if no node has that much."""
    if cluster.device != "cpu":
        return 0
    needed = max(model.bytes for model in models.values()) + WORKING_BYTES
    remedy = "parents, point and context take that much: use larger nodes, or fewer parents a point"
    cluster.awaited(lambda: cluster.room(needed), "an evaluation worker", needed, remedy)
    return needed


class _RemoteEvaluator:
    """The evaluator as an actor."""

    def open(self, models: Mapping[str, ModelSpec], device: str, gpus: float, code: str) -> str:
        """The node's address, if it has the driver's code."""
        with placing(on_node("an evaluation worker", this_node())):
            check_code(code)
            take_part(device, gpus)
            from workers.evaluating.worker import Evaluator

            self._evaluator = Evaluator(models, device)
        return this_node()

    def evaluate(self, task: EvaluationTask) -> BlockScores:
        """One block."""
        with placing(on_node(task.name, this_node())):
            return self._evaluator.evaluate(task)

    def close(self) -> None:
        """Gives back the engine."""
        self._evaluator.close()
