"""Which worker answers which block next: longest first, and a worker stays with its point while that has blocks.

Workers may come and go at any moment. A block that came to nothing, or whose worker is lost, is given out again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from jobs.evaluation_tasks import BlockScores, EvaluationTask
from orchestrator.cluster.again import Failure, Queue
from orchestrator.cluster.pool import Evaluators

Merge = tuple[str, str]
"""A model, and a point that it can hold."""

LATE = 3.0
"""A block is late that takes so many times as long as others took for as many tokens …"""

LATE_SECONDS = 60.0
"""… and longer than this: a starting worker may need as long to read the parents."""


class Pace:
    """How long blocks take for their tokens, by length, over all that were answered so far.

    A first block also waits for the parents, and long contexts cost more a token: so the middle one of a length counts.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[int, list[float]] = defaultdict(list)

    def took(self, task: EvaluationTask, seconds: float) -> None:
        """Records the time of an answer. The size of a whole task of the harness is unknown."""
        if task.items.length:
            self._seconds[task.items.length].append(seconds / task.tokens)

    def late(self, task: EvaluationTask, seconds: float) -> bool:
        """Whether a block that runs for so long takes far longer than others of its length, or than any if none is."""
        if not task.items.length or not self._seconds:
            return False
        alike = self._seconds.get(task.items.length)
        usual = median(alike) if alike else max(max(of_length) for of_length in self._seconds.values())
        return seconds > max(LATE_SECONDS, LATE * usual * task.tokens)


@dataclass(slots=True)
class _Running:
    """A block, when it was given out first, how many workers have it, and whether it was given out twice."""

    task: EvaluationTask
    began: float
    copies: int = 0
    helped: bool = False


def dispatch(
    tasks: Sequence[EvaluationTask], evaluators: Evaluators, pace: Pace
) -> Iterator[tuple[EvaluationTask, BlockScores]]:
    """Every block's scores, once and as they come; raises errors that no retry mends.

    A hanging block also goes to another worker, once nothing else waits; the first answer counts, and a worker
    that is still at it when all is answered is not waited for. While one of the two has the block, the other's failure
    is nothing.
    """
    waiting: dict[Merge, list[EvaluationTask]] = defaultdict(list)
    for task in sorted(tasks, key=lambda task: task.tokens):
        waiting[task.model, task.point].append(task)
    unanswered = {task.key for task in tasks}
    failed: Queue[EvaluationTask] = Queue((), key=lambda task: task.key)
    holds: dict[int, Merge] = {}
    running: dict[str, _Running] = {}
    while unanswered:
        while (again := failed.next(time.monotonic())) is not None:
            waiting[again.model, again.point].append(again)
        if not waiting and not running:
            time.sleep(failed.pause(time.monotonic()))
            continue
        for worker in sorted(evaluators.idle()):
            if (task := _next(waiting, holds.get(worker), set(holds.values())) or _late(running, pace)) is None:
                break
            evaluators.submit(worker, task)
            entry = running.setdefault(task.key, _Running(task, time.monotonic()))
            entry.copies, entry.helped = entry.copies + 1, entry.copies > 0
            holds[worker] = task.model, task.point
        done = evaluators.next_done()
        if done is None or (entry := running.get(done[0].key)) is None:  # None: an earlier answer counted
            continue
        task, scores = done
        entry.copies -= 1
        if not isinstance(scores, Failure):
            del running[task.key]
            unanswered.remove(task.key)
            pace.took(task, time.monotonic() - entry.began)
            yield task, scores
        elif not entry.copies:
            del running[task.key]
            failed.again(task, scores, time.monotonic())


def _next(
    waiting: dict[Merge, list[EvaluationTask]], held: Merge | None, taken: Collection[Merge]
) -> EvaluationTask | None:
    """Takes out the block that a worker should have next; None where none waits."""
    if not waiting:
        return None
    merge = _next_merge(waiting, held, taken)
    task = waiting[merge].pop()
    if not waiting[merge]:
        del waiting[merge]
    return task


def _late(running: Mapping[str, _Running], pace: Pace) -> EvaluationTask | None:
    """The block that is late for longest and that no second worker was given."""
    now = time.monotonic()
    entries = (entry for entry in running.values() if not entry.helped and pace.late(entry.task, now - entry.began))
    return next((entry.task for entry in entries), None)


def _next_merge(
    waiting: Mapping[Merge, Sequence[EvaluationTask]], held: Merge | None, taken: Collection[Merge]
) -> Merge:
    """The merge for a worker: the one it holds; else the costliest free one, of its own model if possible.

    Becoming another point costs time, and another model's parents have to be read first.
    """
    if held is not None and held in waiting:
        return held
    free = [merge for merge in waiting if merge not in taken] or list(waiting)
    near = [merge for merge in free if held is not None and merge[0] == held[0]] or free
    return max(near, key=lambda merge: (sum(task.tokens for task in waiting[merge]), merge))
