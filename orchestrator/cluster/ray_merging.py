"""The pool on Ray: one Ray task per merge task. It returns receipts, not tensors."""

from __future__ import annotations

import queue
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import ray
from ray.exceptions import RayError

from jobs.errors import MergeyardError
from jobs.merge_tasks import MergeTask, Receipt
from orchestrator.cluster.again import Queue, placing
from orchestrator.cluster.pool import Progress, unit
from orchestrator.cluster.ray_cluster import LOOK_SECONDS, RayCluster, check_code, failure, on_node, this_node
from workers.fingerprint import fingerprint
from workers.gpu_memory import take_part

TASKS_AHEAD = 2
"""Tasks submitted per worker slot: enough to keep workers busy, few enough to stop at once."""

REPORT_SECONDS = 0.5


class RayPool:
    """Runs merge tasks on the workers of a cluster."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster
        # no retries by Ray: a retried generator would skip the values that it has yielded before, also receipts
        # one task per process on a GPU: the next task may get another GPU, and CUDA stays on its first
        asked: dict[str, Any] = {**cluster.resources, **({"max_calls": 1} if cluster.resources["num_gpus"] else {})}
        self._merge: Any = ray.remote(**asked, max_retries=0, num_returns="streaming")(_merge)

    @property
    def workers(self) -> int:
        return self._cluster.workers

    def run(self, tasks: Sequence[MergeTask], progress: Progress) -> Iterator[list[Receipt]]:
        queue = Queue(tasks, unit)
        running: dict[Any, MergeTask] = {}
        places: dict[Any, str] = {}
        shards_left = Counter(shard.point for task in tasks for shard in task.points)
        while queue or running:
            most = self._most_running()
            while len(running) < most and (task := queue.next(time.monotonic())) is not None:
                running[self._merge.remote(task, self._cluster.device, self._cluster.gpus, fingerprint())] = task
            pause = queue.pause(time.monotonic(), LOOK_SECONDS)
            if not running:  # ray.wait refuses an empty list
                time.sleep(pause)
                continue
            told: list[Any] = ray.wait(list(running), num_returns=1, timeout=pause, fetch_local=False)[0]
            for stream in told:
                try:
                    news = ray.get(next(stream))
                except (RayError, MergeyardError) as error:
                    task = running.pop(stream)
                    failed = failure(error, places.pop(stream, task.name))
                    queue.again(task, failed, time.monotonic())
                    progress.failed(failed.error)
                    self._cluster.meters.retried("merge")
                    continue
                if isinstance(news, str):
                    places[stream] = on_node(running[stream].name, news)
                elif isinstance(news, tuple):
                    self._cluster.meters.moved(*news)
                    progress.moved(*news)
                else:
                    task = running.pop(stream)
                    places.pop(stream, None)
                    shards_left.subtract(shard.point for shard in task.points)
                    self._cluster.meters.merged(sum(shards_left[shard.point] == 0 for shard in task.points))
                    yield news

    def _most_running(self) -> int:
        """The number of tasks to submit to Ray, which runs as many at once as its resources allow."""
        return min(TASKS_AHEAD * max(1, self._cluster.room()), self._cluster.spec.count or sys.maxsize)


def _merge(task: MergeTask, device: str, gpus: float, code: str) -> Iterator[str | tuple[int, int] | list[Receipt]]:
    """The Ray task: yields the node's address, then bytes read and written, and last the receipts."""
    yield this_node()
    moved: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    with placing(on_node(task.name, this_node())), ThreadPoolExecutor(1, "task") as thread:
        check_code(code)
        take_part(device, gpus)
        from workers.merging.shard import merge_task

        merged = thread.submit(
            merge_task, task, device=device, progress=lambda read, written: moved.put((read, written))
        )
        while not merged.done():
            wait([merged], timeout=REPORT_SECONDS)
            news = [moved.get() for _ in range(moved.qsize())]
            yield sum(read for read, _ in news), sum(written for _, written in news)
        yield merged.result()
