"""Which worker answers which block next: longest first, and a worker stays with its point while that has blocks.

Workers may come and go at any moment. A block that came to nothing, or whose worker is lost, is given out again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from jobs.evaluation import EvaluationTask, ScoreRow
from orchestrator.pool import Failure, Queue

Merge = tuple[str, str]
"""A model, and a point that it can hold."""


class Evaluators(Protocol):
    """Workers that answer blocks; each has a number that no later worker is given."""

    def idle(self) -> Collection[int]:
        """The workers that wait for a block."""
        ...

    def submit(self, worker: int, task: EvaluationTask) -> None:
        """Gives a block to an idle worker."""
        ...

    def next_done(self) -> tuple[EvaluationTask, list[ScoreRow] | Failure] | None:
        """Waits for a block: its scores, or why there are none. None alone: look again who is idle."""
        ...

    def close(self) -> None:
        """Lets go of the workers."""
        ...


def dispatch(
    tasks: Sequence[EvaluationTask], evaluators: Evaluators
) -> Iterator[tuple[EvaluationTask, list[ScoreRow]]]:
    """Every block's scores, as they come; raises what no retry mended."""
    waiting: dict[Merge, list[EvaluationTask]] = defaultdict(list)
    for task in sorted(tasks, key=lambda task: task.tokens):
        waiting[task.model, task.point].append(task)
    failed: Queue[EvaluationTask] = Queue((), key=lambda task: task.key)
    holds: dict[int, Merge] = {}
    running = 0
    while waiting or running or failed:
        while (again := failed.next(time.monotonic())) is not None:
            waiting[again.model, again.point].append(again)
        if not waiting and not running:
            time.sleep(failed.pause(time.monotonic()))
            continue
        for worker in sorted(evaluators.idle()) if waiting else ():
            merge = _next_merge(waiting, holds.get(worker), set(holds.values()))
            evaluators.submit(worker, waiting[merge].pop())
            running += 1
            holds[worker] = merge
            if not waiting[merge]:
                del waiting[merge]
            if not waiting:
                break
        done = evaluators.next_done()
        if done is None:
            continue
        running -= 1
        task, rows = done
        if isinstance(rows, Failure):
            failed.again(task, rows, time.monotonic())
        else:
            yield task, rows


def _next_merge(
    waiting: Mapping[Merge, Sequence[EvaluationTask]], held: Merge | None, taken: Collection[Merge]
) -> Merge:
    """What a worker should hold next: what it holds; else, of its own model if it can, the costliest that is free.

    Becoming another point costs time, and another model's parents have to be read first.
    """
    if held is not None and held in waiting:
        return held
    free = [merge for merge in waiting if merge not in taken] or list(waiting)
    near = [merge for merge in free if held is not None and merge[0] == held[0]] or free
    return max(near, key=lambda merge: (sum(task.tokens for task in waiting[merge]), merge))
