"""Both kinds of work without Ray, in this process."""

from __future__ import annotations

import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from jobs.errors import MergeyardError
from jobs.evaluation_tasks import BlockScores, EvaluationTask, ModelSpec
from jobs.merge_tasks import MergeTask, Receipt
from orchestrator.cluster.again import Failure, Queue, placing
from orchestrator.cluster.pool import Progress, unit

if TYPE_CHECKING:
    from workers.evaluating.worker import Evaluator


class InProcessEvaluators:
    """One evaluator; a block is answered when `next_done` asks for it."""

    def __init__(self, models: Mapping[str, ModelSpec], *, device: str = "cpu") -> None:
        from workers.evaluating.worker import Evaluator

        self._evaluator: Evaluator = Evaluator(models, device)
        self._task: EvaluationTask | None = None

    def idle(self) -> Collection[int]:
        return (0,) if self._task is None else ()

    def submit(self, worker: int, task: EvaluationTask) -> None:
        self._task = task

    def next_done(self) -> tuple[EvaluationTask, BlockScores | Failure] | None:
        task, self._task = self._task, None
        assert task is not None, "asked for a result before there was a task"
        try:
            with placing(task.name):
                return task, self._evaluator.evaluate(task)
        except MergeyardError as error:
            return task, Failure(error)

    def close(self) -> None:
        self._evaluator.close()


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
        queue = Queue(tasks, unit)
        running: dict[Future[list[Receipt]], MergeTask] = {}
        try:
            while queue or running:
                while len(running) < self._workers and (task := queue.next(time.monotonic())) is not None:
                    running[executor.submit(self._run, task, progress)] = task
                pause = queue.pause(time.monotonic())
                if not running:
                    time.sleep(pause)
                for future in wait(running, timeout=pause, return_when=FIRST_COMPLETED).done:
                    task = running.pop(future)
                    try:
                        receipts = future.result()
                    except MergeyardError as error:
                        queue.again(task, Failure(error), time.monotonic())
                        progress.failed(error)
                    else:
                        yield receipts
        finally:
            self._stopping.set()
            executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, task: MergeTask, progress: Progress) -> list[Receipt]:
        from workers.merging.shard import merge_task

        def advance(read: int, written: int) -> None:
            if self._stopping.is_set():
                raise KeyboardInterrupt
            progress.moved(read, written)

        with placing(task.name):
            return merge_task(task, device=self._device, progress=advance)
