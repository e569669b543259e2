"""Where tasks run. A pool takes them all and gives back receipts as they come; the driver knows no more.

This one runs them in this process: for `mergeyard merge`, for one machine, and for tests without a cluster.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

from jobs.errors import MergeyardError
from jobs.tasks import MergeTask, Receipt

Progress = Callable[[int, int], None]
"""Called with bytes read and bytes written since the last call."""

TRIES = 4
"""How often a task is tried when its failure is of the kind that a retry can mend."""


class Pool(Protocol):
    """Runs merge tasks."""

    @property
    def workers(self) -> int:
        """How many tasks run at once."""
        ...

    def run(self, tasks: Sequence[MergeTask], progress: Progress) -> Iterator[list[Receipt]]:
        """Each task's receipts, in the order of completion. The first failure that no retry mends ends it."""
        ...

    def close(self) -> None:
        """Lets go of workers; running tasks are stopped."""
        ...


def retry_pause(attempt: int) -> float:
    """Seconds to wait before trying again: 1, 2, 4 …"""
    return float(2 ** (attempt - 1))


class InProcessPool:
    """Runs tasks in this process, `workers` at once, on `device`."""

    def __init__(self, workers: int = 1, *, device: str = "cpu") -> None:
        self._workers = workers
        self._device = device
        self._stopping = threading.Event()

    @property
    def workers(self) -> int:
        return self._workers

    def run(self, tasks: Sequence[MergeTask], progress: Progress) -> Iterator[list[Receipt]]:
        executor = ThreadPoolExecutor(self._workers, "task")
        waiting = list(reversed(tasks))
        running: set[Future[list[Receipt]]] = set()
        try:
            while waiting or running:
                while waiting and len(running) < self._workers:
                    running.add(executor.submit(self._run, waiting.pop(), progress))
                finished, running = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    yield future.result()
        finally:
            self._stopping.set()
            executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, task: MergeTask, progress: Progress) -> list[Receipt]:
        from workers.merging import merge_task

        def advance(read: int, written: int) -> None:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            progress(read, written)

        attempt = 1
        while True:
            try:
                return merge_task(task, device=self._device, progress=advance)
            except MergeyardError as error:
                if not error.retry or attempt == TRIES or self._stopping.is_set():
                    raise
                time.sleep(retry_pause(attempt))
                attempt += 1

    def close(self) -> None:
        self._stopping.set()
