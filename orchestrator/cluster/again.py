"""When a failed task is tried again, and when its error ends the run."""

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
"""How often a task is tried when its failure is of the kind that a retry can mend."""

LOSSES = 12
"""How often a task may be lost with its node, which is seldom its own fault.

Where every third task meets the end of its node, one in 3¹² = 531,441 meets it so often. A task that brings its node
down has by then taken a dozen of them, and is given up as well.
"""

LOSS_SECONDS = 2.0
"""The pause before a task that was lost with its node is given out for the third time, and so on.

There is none at first. A node that is gone may take more tasks until Ray misses it, 20 s at most: LOSSES take longer.
"""

LONGEST_PAUSE = 60.0

Task = TypeVar("Task")


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a task came to nothing, and whether its node went and took it along."""

    error: MergeyardError
    node_lost: bool = False


@contextmanager
def placing(place: str) -> Generator[None]:
    """Errors from inside begin with `place`; a foreign one becomes a `MergeyardError` of one line."""
    try:
        yield
    except MergeyardError as error:
        raise type(error)(f"{place}: {error}") from error
    except Exception as error:
        raise MergeyardError(f"{place}: {type(error).__name__}: {' '.join(str(error).split())}") from error


class Tries:
    """How often one thing came to nothing."""

    def __init__(self) -> None:
        self._failed = self._lost = 0

    def again(self, failure: Failure) -> float:
        """Seconds to wait before the next try: 1, 2, 4 …, or none where a node is lost. Raises a permanent error."""
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
    """Which task is next, which again, and not before when.

    It knows no clock: whoever asks says how late it is. `key` tells the tasks apart.
    """

    def __init__(self, tasks: Iterable[Task], key: Callable[[Task], str]) -> None:
        self._tasks = deque(tasks)
        self._key = key
        self._tries: defaultdict[str, Tries] = defaultdict(Tries)
        self._again: list[tuple[float, Task]] = []

    def __bool__(self) -> bool:
        return bool(self._tasks or self._again)

    def next(self, now: float) -> Task | None:
        """Takes out the task that is to be tried now, one that failed before one that is new; None if there is none."""
        if self._again and self._again[0][0] <= now:
            return self._again.pop(0)[1]
        return self._tasks.popleft() if self._tasks else None

    def again(self, task: Task, failure: Failure, now: float) -> None:
        """Puts a task back that came to nothing; raises why, if no further try may mend it."""
        insort(self._again, (now + self._tries[self._key(task)].again(failure), task), key=itemgetter(0))

    def pause(self, now: float, most: float = LONGEST_PAUSE) -> float:
        """Seconds until a task may be tried that may not be now, `most` at most."""
        return min([most, *(not_before - now for not_before, _ in self._again if not_before > now)])
