"""The two protocols of workers: a pool runs merge tasks, evaluators answer blocks of items."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Protocol

from jobs.evaluation_tasks import BlockScores, EvaluationTask
from jobs.merge_tasks import MergeTask, Receipt
from orchestrator.cluster.again import Failure


class Progress(Protocol):
    """Follows the work of a pool; called from any thread."""

    def moved(self, read: int, written: int) -> None:
        """These many bytes more were read and written."""
        ...

    def failed(self, error: Exception) -> None:
        """A task failed and will be tried again."""
        ...


class Pool(Protocol):
    """Runs merge tasks."""

    @property
    def workers(self) -> int:
        """How many tasks run at once."""
        ...

    def run(self, tasks: Sequence[MergeTask], progress: Progress) -> Iterator[list[Receipt]]:
        """Yields the receipts of each task, in the order of completion; raises the first error that is final."""
        ...


def unit(task: MergeTask) -> str:
    """A key for a merge task: each unit is in one task only."""
    return task.points[0].unit


class Evaluators(Protocol):
    """Workers that answer blocks. Each worker has a number that is never reused."""

    def idle(self) -> Collection[int]:
        """The workers that wait for a block."""
        ...

    def submit(self, worker: int, task: EvaluationTask) -> None:
        """Gives a block to an idle worker."""
        ...

    def next_done(self) -> tuple[EvaluationTask, BlockScores | Failure] | None:
        """Waits for a block; returns its scores or its failure. None means that `idle` may have changed."""
        ...

    def close(self) -> None:
        """Releases the workers."""
        ...
