"""Evaluation on Ray: one actor a worker, which keeps the parents and an engine and becomes one point after another."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.exceptions import RayError

from jobs.errors import MergeyardError
from jobs.evaluation import EvaluationTask, ModelSpec, ScoreRow
from orchestrator.pool import TRIES, retry_pause
from orchestrator.ray_pool import RayPool, translated
from workers.fingerprint import fingerprint


class RayEvaluators:
    """As many actors as the cluster has room for; a dead one is started again and its block asked anew."""

    def __init__(self, model: ModelSpec, pool: RayPool) -> None:
        actor: Any = ray.remote(_RemoteEvaluator).options(**pool.resources, max_restarts=-1, max_task_retries=TRIES - 1)
        self._actors = [actor.remote(model, pool.device, fingerprint()) for _ in range(pool.workers)]
        self._running: dict[Any, tuple[int, EvaluationTask, int]] = {}

    @property
    def workers(self) -> int:
        return len(self._actors)

    def submit(self, worker: int, task: EvaluationTask) -> None:
        self._start(worker, task, 1)

    def _start(self, worker: int, task: EvaluationTask, attempt: int) -> None:
        self._running[self._actors[worker].evaluate.remote(task)] = (worker, task, attempt)

    def next_done(self) -> tuple[int, EvaluationTask, list[ScoreRow]]:
        while True:
            [reference], _ = ray.wait(list(self._running), num_returns=1)
            worker, task, attempt = self._running.pop(reference)
            try:
                return worker, task, ray.get(reference)
            except (RayError, MergeyardError) as failure:
                error = translated(failure, f"{task.items.task} at {task.items.length} of {task.point}")
                if not error.retry or attempt == TRIES:
                    raise error from failure
                time.sleep(retry_pause(attempt))
                self._start(worker, task, attempt + 1)

    def close(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


class _RemoteEvaluator:
    """The evaluator as an actor."""

    def __init__(self, model: ModelSpec, device: str, code: str) -> None:
        from orchestrator.ray_pool import check_code
        from workers.evaluating import Evaluator

        check_code(code)
        self._evaluator = Evaluator(model, device)

    def evaluate(self, task: EvaluationTask) -> list[ScoreRow]:
        """One block."""
        return self._evaluator.evaluate(task)
