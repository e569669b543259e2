"""Which worker answers which block next: longest first, and a worker stays with its point while that has blocks.

Workers may come and go at any moment. A block that came to nothing, or whose worker is lost, is given out again.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Protocol

from jobs.evaluation import EvaluationTask, ScoreRow
from orchestrator.pool import Failure, Queue

Merge = tuple[str, str]
"""A model, and a point that it can hold."""

LATE = 3.0
"""A block is late that takes so many times as long as the slowest block before took for as many tokens …"""

LATE_SECONDS = 60.0
"""… and longer than this: what a worker that starts takes to read the parents, say."""


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
    """Every block's scores, once and as they come; raises what no retry mended.

    What hangs on one worker is given to another as well, once nothing else waits; the first answer counts, and a worker
    that is still at it when all is answered is not waited for.
    """
    waiting: dict[Merge, list[EvaluationTask]] = defaultdict(list)
    for task in sorted(tasks, key=lambda task: task.tokens):
        waiting[task.model, task.point].append(task)
    open_keys = {task.key for task in tasks}
    failed: Queue[EvaluationTask] = Queue((), key=lambda task: task.key)
    holds: dict[int, Merge] = {}
    pace = _Pace()
    while open_keys:
        while (again := failed.next(time.monotonic())) is not None:
            if again.key in open_keys:
                waiting[again.model, again.point].append(again)
        idle = sorted(evaluators.idle())
        if not waiting and not pace.running and idle:
            time.sleep(failed.pause(time.monotonic()))
            continue
        for worker in idle:
            if waiting:
                merge = _next_merge(waiting, holds.get(worker), set(holds.values()))
                task = waiting[merge].pop()
                if not waiting[merge]:
                    del waiting[merge]
            elif (late := pace.late(time.monotonic())) is not None:
                task, merge = late, (late.model, late.point)
            else:
                break
            evaluators.submit(worker, task)
            pace.begin(task, time.monotonic())
            holds[worker] = merge
        done = evaluators.next_done()
        if done is None:
            continue
        task, rows = done
        if task.key not in open_keys:  # an earlier answer counted
            continue
        if isinstance(rows, Failure):
            pace.end(task)
            failed.again(task, rows, time.monotonic())
        else:
            pace.end(task, time.monotonic())
            open_keys.remove(task.key)
            yield task, rows


class _Pace:
    """How long blocks take, by their tokens, and which of those that run takes far longer than any did."""

    def __init__(self) -> None:
        self.running: dict[str, tuple[EvaluationTask, float]] = {}
        self._slowest: float | None = None
        self._twice: set[str] = set()

    def begin(self, task: EvaluationTask, now: float) -> None:
        """Takes note of a block that was given out; for the second time, the first remains."""
        if task.key in self.running:
            self._twice.add(task.key)
        self.running.setdefault(task.key, (task, now))

    def end(self, task: EvaluationTask, now: float | None = None) -> None:
        """Takes note of one that came back, with its answers if the time is told."""
        _, began = self.running.pop(task.key, (task, math.inf))
        self._twice.discard(task.key)
        if now is not None and math.isfinite(began):
            self._slowest = max(self._slowest or 0.0, (now - began) / task.tokens)

    def late(self, now: float) -> EvaluationTask | None:
        """The block that runs longest of those that are late, and that no second worker has."""
        if self._slowest is None:
            return None
        for key, (task, began) in self.running.items():
            if key not in self._twice and now - began > max(LATE_SECONDS, LATE * self._slowest * task.tokens):
                return task
        return None


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
