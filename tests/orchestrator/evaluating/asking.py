"""Evaluations in this process, and the blocks that they asked."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.evaluation_tasks import EvaluationTask, ModelSpec
from jobs.job import load_job
from orchestrator.cluster import in_process
from orchestrator.cluster.pool import Evaluators
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


def evaluated(text: str, most: int = 10**9) -> tuple[EvaluationResult, list[EvaluationTask]]:
    """The job's evaluation and the blocks that it asked; RuntimeError after `most` of them."""
    asked: list[EvaluationTask] = []

    def opened(models: Mapping[str, ModelSpec]) -> Evaluators:
        evaluators = in_process.InProcessEvaluators(models)
        submit = evaluators.submit

        def counted(worker: int, task: EvaluationTask) -> None:
            if len(asked) == most:
                raise RuntimeError("pulled the plug")
            asked.append(task)
            submit(worker, task)

        evaluators.submit = counted
        return evaluators

    return evaluate(make_plan(load_job(text, "job.yaml")), opened), asked
