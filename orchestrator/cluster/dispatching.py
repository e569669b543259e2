"""Assigns blocks to workers: longest first, and a worker keeps its point while the point has blocks.

Workers may join and leave at any time. A block that failed, or whose worker is lost, is submitted again.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from jobs.evaluation_tasks import BlockScores, EvaluationTask
from orchestrator.cluster.again import Failure, Queue
from orchestrator.cluster.pool import Evaluators

Merge = tuple[str, str]
"""A model and one of its points."""

LATE = 3.0
"""A block is late if its time per token is this many times that of other blocks …"""

LATE_SECONDS = 60.0
"""… and it takes longer than this, for example because a starting worker reads the parents."""


class Pace:
    """Seconds per token of the answered blocks, by context length.

    Uses the median per length: first blocks also wait for the parents, and long contexts cost more per token.
    """

    def __init__(self) -> None:
        self._seconds: defaultdict[int, list[float]] = defaultdict(list)

    def took(self, task: EvaluationTask, seconds: float) -> None:
        """Records the time of an answered block, except for whole harness tasks, whose token count is unknown."""
        if task.items.length:
            self._seconds[task.items.length].append(seconds / task.tokens)

    def late(self, task: EvaluationTask, seconds: float) -> bool:
        """Whether a block takes far longer than others of its length, or than all others if its length has none."""
        if not task.items.length or not self._seconds:
            return False
        alike = self._seconds.get(task.items.length)
        usual = median(alike) if alike else max(max(of_length) for of_length in self._seconds.values())
        return seconds > max(LATE_SECONDS, LATE * usual * task.tokens)


@dataclass(slots=True)
class _Running:
    """A block in progress: its first start, its number of workers, and whether it was submitted twice."""

    task: EvaluationTask
    began: float
    copies: int = 0
    helped: bool = False


def dispatch(
    tasks: Sequence[EvaluationTask],
    evaluators: Evaluators,
    pace: Pace,
    on_failure: Callable[[Exception], None] = lambda error: None,
    more: Callable[[], Sequence[Sequence[EvaluationTask]]] = tuple,
) -> Iterator[tuple[EvaluationTask, BlockScores]]:
    """Yields the scores of every block once, in the order of completion; raises an error that retries did not fix.

    When no other block waits, a late block is also submitted to a second worker. The first answer counts. A worker that
    still runs when all blocks are answered is not waited for. If one of the two workers fails, the other one continues.

    `more` is called first, and after each answer: it adds waves of blocks, each of which waits until no earlier one
    does.
    """
    waves: list[dict[Merge, list[EvaluationTask]]] = []
    unanswered = set[str]()
    for wave in (tasks, *more()):
        waves.append(_by_merge(wave))
        unanswered |= {task.key for task in wave}
    failed: Queue[EvaluationTask] = Queue((), key=lambda task: task.key)
    holds: dict[int, Merge] = {}
    running: dict[str, _Running] = {}
    while unanswered:
        while (again := failed.next(time.monotonic())) is not None:
            waves[0].setdefault((again.model, again.point), []).append(again)
        waves = [wave for wave in waves if wave] or [{}]
        if not waves[0] and not running:
            time.sleep(failed.pause(time.monotonic()))
            continue
        for worker in sorted(evaluators.idle()):
            waiting = next((wave for wave in waves if wave), waves[0])
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
            for wave in more():
                waves.append(_by_merge(wave))
                unanswered |= {task.key for task in wave}
        elif not entry.copies:
            del running[task.key]
            failed.again(task, scores, time.monotonic())
            on_failure(scores.error)


def _by_merge(tasks: Sequence[EvaluationTask]) -> dict[Merge, list[EvaluationTask]]:
    """The blocks of each point, the longest last."""
    found: dict[Merge, list[EvaluationTask]] = {}
    for task in sorted(tasks, key=lambda task: task.tokens):
        found.setdefault((task.model, task.point), []).append(task)
    return found


def _next(
    waiting: dict[Merge, list[EvaluationTask]], held: Merge | None, taken: Collection[Merge]
) -> EvaluationTask | None:
    """Removes and returns the next block for a worker; None if no block waits."""
    if not waiting:
        return None
    merge = _next_merge(waiting, held, taken)
    task = waiting[merge].pop()
    if not waiting[merge]:
        del waiting[merge]
    return task


def _late(running: Mapping[str, _Running], pace: Pace) -> EvaluationTask | None:
    """The block that is late for longest and has no second worker."""
    now = time.monotonic()
    entries = (entry for entry in running.values() if not entry.helped and pace.late(entry.task, now - entry.began))
    return next((entry.task for entry in entries), None)


def _next_merge(
    waiting: Mapping[Merge, Sequence[EvaluationTask]], held: Merge | None, taken: Collection[Merge]
) -> Merge:
    """The next point for a worker: the one it holds, else the costliest free one, of its own model if possible.

    Changing the point costs time, and changing the model also means reading other parents.
    """
    if held is not None and held in waiting:
        return held
    free = [merge for merge in waiting if merge not in taken] or list(waiting)
    near = [merge for merge in free if held is not None and merge[0] == held[0]] or free
    return max(near, key=lambda merge: (sum(task.tokens for task in waiting[merge]), merge))
