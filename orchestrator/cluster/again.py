"""Retries: when a failed task runs again, and when its error ends the run."""

from __future__ import annotations

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, TypeVar

from jobs.errors import MergeyardError

TRIES = 4
"""Tries of a task whose error may be temporary."""

LOSSES = 12
"""Losses of a task with its node before the task counts as the cause.

If a third of all tasks lose their node, one task in 3¹² = 531,441 loses it this often. A task that crashes its nodes
has crashed a dozen of them by then, and the run ends with its error.
"""

LOSS_SECONDS = 2.0
"""The pause before the third and each later try of a task that was lost with its node.

The second try has no pause. A dead node may receive more tasks until Ray notices, at most 20 s: LOSSES take longer.
"""

LONGEST_PAUSE = 60.0

Task = TypeVar("Task")


@dataclass(frozen=True, slots=True)
class Failure:
    """The error of a failed task, and whether its node was lost."""

    error: MergeyardError
    node_lost: bool = False


@contextmanager
def placing(place: str) -> Generator[None]:
    """Prefixes errors with `place`; an error from elsewhere becomes a `MergeyardError` of one line."""
    try:
        yield
    except MergeyardError as error:
        raise type(error)(f"{place}: {error}") from error
    except Exception as error:
        raise MergeyardError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error


class Tries:
    """Counts the failures and losses of one task."""

    def __init__(self) -> None:
        self._failed = self._lost = 0

    def again(self, failure: Failure) -> float:
        """Seconds before the next try: 1, 2, 4 …; 0, then LOSS_SECONDS, for lost nodes. Raises a final error."""
        if failure.node_lost:
            self._lost += 1
            enough, pause = self._lost == LOSSES, 0.0 if self._lost == 1 else LOSS_SECONDS
        else:
            self._failed += 1
            enough, pause = self._failed == TRIES, 2.0 ** (self._failed - 1)
        if enough or not failure.error.retry:
            raise failure.error
        return pause


class Queue(Generic[Task]):
    """Tasks in order, with failed tasks to be tried again after a pause.

    The caller passes the current time. `key` identifies a task.
    """

    def __init__(self, tasks: Iterable[Task], key: Callable[[Task], str]) -> None:
        self._tasks = deque(tasks)
        self._key = key
        self._tries: defaultdict[str, Tries] = defaultdict(Tries)
        self._again: list[tuple[float, Task]] = []

    def __bool__(self) -> bool:
        return bool(self._tasks or self._again)

    def next(self, now: float) -> Task | None:
        """Removes and returns the task to run now, failed tasks before new ones; None if there is none."""
        if self._again and self._again[0][0] <= now:
            return self._again.pop(0)[1]
        return self._tasks.popleft() if self._tasks else None

    def again(self, task: Task, failure: Failure, now: float) -> None:
        """Puts a failed task back; raises its error if there is no further try."""
        insort(self._again, (now + self._tries[self._key(task)].again(failure), task), key=itemgetter(0))

    def pause(self, now: float, most: float = LONGEST_PAUSE) -> float:
        """Seconds until the next pause of a task ends, `most` at most."""
        return min([most, *(not_before - now for not_before, _ in self._again if not_before > now)])
