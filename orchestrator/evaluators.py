"""Evaluation without Ray: one worker, in this process."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from jobs.errors import MergeyardError
from jobs.evaluation import EvaluationTask, ModelSpec, ScoreRow
from orchestrator.pool import Failure

if TYPE_CHECKING:
    from workers.evaluating import Evaluator


class InProcessEvaluators:
    """One evaluator; a block is answered when `next_done` asks for it."""

    def __init__(self, models: Mapping[str, ModelSpec], *, device: str = "cpu") -> None:
        from workers.evaluating import Evaluator

        self._evaluator: Evaluator = Evaluator(models, device)
        self._task: EvaluationTask | None = None

    def idle(self) -> Collection[int]:
        return (0,) if self._task is None else ()

    def submit(self, worker: int, task: EvaluationTask) -> None:
        self._task = task

    def next_done(self) -> tuple[EvaluationTask, list[ScoreRow] | Failure] | None:
        task, self._task = self._task, None
        assert task is not None, "asked for a result before there was a task"
        try:
            return task, self._evaluator.evaluate(task)
        except MergeyardError as error:
            return task, Failure(error)

    def close(self) -> None:
        self._evaluator.close()
