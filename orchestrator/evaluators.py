"""Evaluation without Ray: one worker, in this process."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.evaluation import EvaluationTask, ModelSpec, ScoreRow

if TYPE_CHECKING:
    from workers.evaluating import Evaluator


class InProcessEvaluators:
    """One evaluator; a block is answered when `next_done` asks for it."""

    def __init__(self, model: ModelSpec, *, device: str = "cpu") -> None:
        from workers.evaluating import Evaluator

        self._evaluator: Evaluator = Evaluator(model, device)
        self._task: EvaluationTask | None = None

    @property
    def workers(self) -> int:
        return 1

    def submit(self, worker: int, task: EvaluationTask) -> None:
        self._task = task

    def next_done(self) -> tuple[int, EvaluationTask, list[ScoreRow]]:
        assert self._task is not None, "asked for a result before there was a task"
        return 0, self._task, self._evaluator.evaluate(self._task)

    def close(self) -> None:
        self._evaluator.close()
