"""The two protocols of workers: a pool runs merge tasks, evaluators answer blocks of items."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Protocol

from jobs.evaluation_tasks import BlockScores, EvaluationTask
from jobs.merge_tasks import MergeTask, Receipt
from orchestrator.cluster.again import Failure

Progress = Callable[[int, int], None]
"""Called with bytes read and bytes written since the last call."""


class Pool(Protocol):
    """Runs merge tasks."""

    @property
    def workers(self) -> int:
        """How many tasks run at once."""
        ...

    def run(self, tasks: Sequence[MergeTask], progress: Progress) -> Iterator[list[Receipt]]:
        """Each task's receipts, in the order of completion. The first failure that no retry mends ends it."""
        ...


def unit(task: MergeTask) -> str:
    """Tells merge tasks apart: no unit is in two."""
    return task.points[0].unit


class Evaluators(Protocol):
    """Workers that answer blocks; each has a number that no later worker is given."""

    def idle(self) -> Collection[int]:
        """The workers that wait for a block."""
        ...

    def submit(self, worker: int, task: EvaluationTask) -> None:
        """Gives a block to an idle worker."""
        ...

    def next_done(self) -> tuple[EvaluationTask, BlockScores | Failure] | None:
        """Waits for a block: its scores, or why there are none. None alone: look again who is idle."""
        ...

    def close(self) -> None:
        """Lets go of the workers."""
        ...
