"""Evaluations in this process, and the blocks that they asked."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.evaluation_tasks import EvaluationTask, ModelSpec
from jobs.job import load_job
from orchestrator.cluster.in_process import InProcessEvaluators
from orchestrator.evaluating.results import EvaluationResult
from orchestrator.evaluating.session import OpenEvaluators, Session
from orchestrator.evaluating.subjects import questions
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.watching import Watcher


def evaluate(plan: Plan, open_evaluators: OpenEvaluators, watcher: Watcher | None = None) -> EvaluationResult:
    """What a session of the plan finds."""
    watcher = watcher or Watcher(visible=False)
    with Session.of(plan, questions(plan), open_evaluators, watcher) as session:
        return session.run()


class Counting(InProcessEvaluators):
    """Counts what is asked, and fails after so many blocks."""

    def __init__(self, models: Mapping[str, ModelSpec], asked: list[EvaluationTask], most: int) -> None:
        super().__init__(models)
        self._asked, self._most = asked, most

    def submit(self, worker: int, task: EvaluationTask) -> None:
        if len(self._asked) == self._most:
            raise RuntimeError("pulled the plug")
        self._asked.append(task)
        super().submit(worker, task)


def evaluated(text: str, most: int = 10**9) -> tuple[EvaluationResult, list[EvaluationTask]]:
    """The job's evaluation and the blocks that it asked; RuntimeError after `most` of them."""
    asked: list[EvaluationTask] = []
    plan = make_plan(load_job(text, "job.yaml"))
    return evaluate(plan, lambda models: Counting(models, asked, most)), asked
