"""Answers by a function in place of a model, for evaluations in this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from jobs.evaluation_tasks import EvaluationTask
from orchestrator.cluster.scripted import Answer, ScriptedEvaluators
from workers.benchmarks.items import Item


def turned_down(task: EvaluationTask, item: Item) -> float:
    """As `long` answers: a point `w0.3`, whose weights are turned down to 0.3, finds nothing, all others everything."""
    weight = re.fullmatch(r"w(.+)", task.point)
    return float(weight is None or float(weight[1]) > 0.9)


@contextmanager
def scripted(answer: Answer) -> Iterator[None]:
    """Whoever evaluates in this process asks the function."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "orchestrator.cluster.in_process.InProcessEvaluators",
            lambda models, device="cpu": ScriptedEvaluators(models, answer),
        )
        yield
