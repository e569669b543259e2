"""Answers by a function in place of a model, for evaluations in this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobs.evaluation_tasks import BlockScores, EvaluationTask
from orchestrator.cluster.scripted import Answer, ScriptedEvaluators
from workers.benchmarks.items import Item
from workers.evaluating.scores import write_scores


def turned_down(task: EvaluationTask, item: Item) -> float:
    """As `long` answers: a point `w0.3`, whose weights are turned down to 0.3, finds nothing, all others everything."""
    weight = re.fullmatch(r"w(.+)", task.point)
    return float(weight is None or float(weight[1]) > 0.9)


class HarnessEvaluators(ScriptedEvaluators):
    """As its parent, also for tasks of lm-evaluation-harness, which is not asked: `questions` items of one metric."""

    questions = 0

    def next_done(self) -> tuple[EvaluationTask, BlockScores]:
        task = self._task
        if task is None or task.items.length:
            return super().next_done()
        self._task = None
        rows = [self._row(task, _question(task.items.task, number)) for number in range(self.questions)]
        self._store.write(task.key, write_scores(rows), mode="create")
        return task, BlockScores(rows)


def _question(task: str, number: int) -> Item:
    place = f"{task}-{number}"
    texts = {"prefix": "", "prompt": "", "answer_prefix": "", "scorer": ""}
    return Item(
        benchmark="", task=f"{task}:acc", length=0, index=number, depths=(), haystack=place, pair=place, answers=(),
        max_new_tokens=0, tokens=10, **texts,
    )  # fmt: skip


@contextmanager
def scripted(answer: Answer, questions: int = 0) -> Iterator[None]:
    """Whoever evaluates in this process asks the function; `questions` to each task of lm-evaluation-harness."""
    evaluators = type("Evaluators", (HarnessEvaluators,), {"questions": questions})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "orchestrator.cluster.in_process.InProcessEvaluators",
            lambda models, device="cpu": evaluators(models, answer),
        )
        yield
