"""The pool on Ray: one Ray task a merge task, receipts back, never a tensor."""

from __future__ import annotations

import logging
import os
import queue
import shutil
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, chdir, redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError, WorkerCrashedError
from ray.util import metrics

from jobs.errors import BadInput, MergeyardError, WorkerLost
from jobs.job import WorkerSpec
from jobs.tasks import MergeTask, Receipt
from orchestrator.pool import TRIES, Progress, retry_pause
from workers.fingerprint import fingerprint, package_folders

TASKS_AHEAD = 2
"""Tasks submitted for each worker slot: enough that none waits, few enough that stopping is immediate."""

LOOK_SECONDS = 1.0
"""How often we look whether the head is there, and which nodes came or went."""

HEAD_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""When its head has been away for this long, 60 s if unset, Ray ends our process; we end it in good order before."""

ORDERLY_SECONDS = 10.0  # without its head, ray.shutdown() takes 7

REPORT_SECONDS = 0.5
REACH_SECONDS = 10.0
LOCAL_OBJECT_STORE_BYTES = 80 << 20  # receipts are all that passes through it

NOTICE_A_CUT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
"""On every node and here, they have the work of a node that is cut off given out again in 20 s; it would be 420."""


class RayPool:
    """Runs tasks on a Ray cluster: the one at `address`, or one started here and stopped with this pool.

    Raises `BadInput` for a cluster that is not there and for workers that fit on none of its nodes.
    """

    def __init__(self, spec: WorkerSpec, *, address: str | None = None) -> None:
        with ExitStack() as opened:
            opened.enter_context(redirect_stdout(sys.stderr))  # Ray prints what befalls its nodes; results are ours
            if address is None:
                opened.callback(shutil.rmtree, _start(), ignore_errors=True)
            else:
                _connect(address)
            opened.callback(ray.shutdown)
            gpus = spec.gpus if ray.cluster_resources().get("GPU", 0) else 0.0
            self.device = "cuda" if gpus else "cpu"
            self.resources: dict[str, float] = {"num_cpus": spec.cpus, "num_gpus": gpus, "memory": spec.memory_bytes}
            self._spec, self._gpus = spec, gpus
            self.meters = Meters()
            self._head = _Head()
            self._workers = self._room_then = self.room()
            self._looked = time.monotonic()
            if self._workers == 0:
                raise BadInput(
                    f"no node has room for a worker of {spec.cpus:g} CPUs, {gpus:g} GPUs and"
                    f" {spec.memory_bytes / 1e9:.1f} GB; ask for less under `workers:`"
                )
            # no retries by Ray: it would leave out what a task has told before, receipts or not
            self._merge = ray.remote(_merge).options(**self.resources, max_retries=0, num_returns="streaming")
            self._opened = opened.pop_all()

    @property
    def workers(self) -> int:
        return self._workers

    def room(self, memory_bytes: int = 0) -> int:
        """How many workers, of `memory_bytes` at least, the cluster's nodes hold now; they come and go.

        `WorkerLost` when the cluster's head is gone.
        """
        if self._head.is_away():
            return 0
        spec = replace(self._spec, memory_bytes=max(self._spec.memory_bytes, memory_bytes))
        slots = _slots(spec, self._gpus)
        return min(slots, self._spec.count) if self._spec.count else slots

    def run(self, tasks: Sequence[MergeTask], progress: Progress) -> Iterator[list[Receipt]]:
        waiting = [(task, 1) for task in reversed(tasks)]
        running: dict[Any, tuple[MergeTask, int]] = {}
        shards_left = Counter(shard.point for task in tasks for shard in task.points)
        while waiting or running:
            self._look()
            while waiting and len(running) < self._most_running:
                task, attempt = waiting.pop()
                running[self._merge.remote(task, self.device, fingerprint())] = (task, attempt)
            told: list[Any] = ray.wait(list(running), num_returns=1, timeout=LOOK_SECONDS, fetch_local=False)[0]
            for stream in told:
                try:
                    news = ray.get(next(stream))
                except (RayError, MergeyardError) as failure:
                    task, attempt = running.pop(stream)
                    error = translated(failure, task.name)
                    if not error.retry or attempt == TRIES:
                        raise error from failure
                    self.meters.retried("merge")
                    time.sleep(retry_pause(attempt))
                    waiting.append((task, attempt + 1))
                    continue
                if isinstance(news, tuple):
                    self.meters.moved(*news)
                    progress(*news)
                else:
                    task, _ = running.pop(stream)
                    shards_left.subtract(shard.point for shard in task.points)
                    self.meters.merged(sum(shards_left[shard.point] == 0 for shard in task.points))
                    yield news

    def _look(self) -> None:
        if time.monotonic() - self._looked > LOOK_SECONDS:
            self._room_then = max(1, self.room())
            self._looked = time.monotonic()

    @property
    def _most_running(self) -> int:
        """How many tasks to have given to Ray; it runs as many of them as it has room for, whatever the job says."""
        return min(TASKS_AHEAD * self._room_then, self._spec.count or sys.maxsize)

    def close(self) -> None:
        self._opened.close()


class _Head:
    """The cluster's head, whose end Ray would make the end of our process as well, without a word of ours."""

    def __init__(self) -> None:
        self._address: str = ray.get_runtime_context().gcs_address
        self._patience = float(os.environ.get(HEAD_TIMEOUT, "60")) - ORDERLY_SECONDS
        self._away_since: float | None = None

    def is_away(self) -> bool:
        """Whether nothing answers where it was; `WorkerLost` when that has been so for too long."""
        try:
            _reach(self._address)
        except OSError:
            now = time.monotonic()
            self._away_since = self._away_since or now
            if now - self._away_since > self._patience:
                raise WorkerLost(
                    f"the head of the Ray cluster at {self._address} is gone; start it, then run again"
                ) from None
            return True
        self._away_since = None
        return False


class Meters:
    """What Prometheus sees of a run, as `ray_mergeyard_…`: counted where the driver hears of it, whoever did it."""

    def __init__(self) -> None:
        self._bytes_read = metrics.Counter("mergeyard_bytes_read_total", "Bytes of parents read.")
        self._bytes_written = metrics.Counter("mergeyard_bytes_written_total", "Bytes of points written.")
        self._points = metrics.Counter("mergeyard_points_total", "Points of which every shard is merged.")
        self._items = metrics.Counter("mergeyard_items_total", "Items answered.")
        self._tokens = metrics.Counter("mergeyard_tokens_total", "Tokens of prompts and answers.")
        self._tasks = metrics.Counter("mergeyard_tasks_total", "Tasks done, by work: merge or evaluate.", ("work",))
        self._retries = metrics.Counter("mergeyard_retries_total", "Tasks given out again, by work.", ("work",))

    def moved(self, read: int, written: int) -> None:
        _add(self._bytes_read, read)
        _add(self._bytes_written, written)

    def merged(self, points: int) -> None:
        """A merge task is done, and with it these many points."""
        self._tasks.inc(tags={"work": "merge"})
        _add(self._points, points)

    def evaluated(self, items: int, tokens: int) -> None:
        """A block of items is answered."""
        self._tasks.inc(tags={"work": "evaluate"})
        _add(self._items, items)
        _add(self._tokens, tokens)

    def retried(self, work: str) -> None:
        self._retries.inc(tags={"work": work})


def _add(counter: metrics.Counter, amount: int) -> None:
    if amount:  # Ray refuses to add nothing
        counter.inc(amount)


def _start() -> Path:
    """Starts a Ray of one node; the folder of its sockets and logs."""
    with chdir(Path(package_folders()[0]).parent):  # workers import from here first, whatever the user's folder holds
        try:
            context = _init(address="local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES)
        except Exception as error:  # the very class Ray raises when a part of it takes more than 30 seconds
            raise WorkerLost(
                f"Ray did not start here: {str(error).splitlines()[0]} Run again, or --in-process"
            ) from error
    return Path(context.address_info["session_dir"])


def _connect(address: str) -> None:
    """Joins a running Ray and sends the code along."""
    _check_reachable(address)
    with TemporaryDirectory() as code:
        for folder in package_folders():
            shutil.copytree(
                folder, Path(code, Path(folder).name), ignore=shutil.ignore_patterns("__pycache__", "examples")
            )
        try:
            _init(address=address, runtime_env={"working_dir": code})
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            raise BadInput(
                f"--address {address}: {str(error).splitlines()[0]}; if it wants a token, set RAY_AUTH_MODE=token and"
                " RAY_AUTH_TOKEN"
            ) from error


def _init(**options: Any) -> Any:
    """ray.init, quietly and without its own way of stopping at SIGTERM."""
    for name, value in NOTICE_A_CUT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray 2.60 warns without it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # inside a submitted job, our code before the job's
    stop = signal.getsignal(signal.SIGTERM)
    try:
        return ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except SystemExit:
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)


def _check_reachable(address: str) -> None:
    """Refuses an address where nothing listens, which Ray would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "/" in host:
        raise BadInput(f"--address {address}: give host:port of the cluster's head (Ray's own port is 6379), or auto")
    try:
        _reach(address)
    except (OSError, OverflowError) as error:
        raise BadInput(f"--address {address}: no Ray answers there ({error}); is its head running?") from None


def _reach(address: str) -> None:
    """Connects to host:port, which may raise OSError or OverflowError."""
    host, _, port = address.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), REACH_SECONDS).close()


def _merge(task: MergeTask, device: str, code: str) -> Iterator[tuple[int, int] | list[Receipt]]:
    """What runs on a node: bytes read and written from time to time, and at last the receipts."""
    from workers.merging import merge_task

    check_code(code)
    moved: queue.SimpleQueue[tuple[int, int]] = queue.SimpleQueue()
    with ThreadPoolExecutor(1, "task") as thread:
        merged = thread.submit(
            merge_task, task, device=device, progress=lambda read, written: moved.put((read, written))
        )
        while not merged.done():
            wait([merged], timeout=REPORT_SECONDS)
            news = [moved.get() for _ in range(moved.qsize())]
            yield sum(read for read, _ in news), sum(written for _, written in news)
        yield merged.result()


def check_code(expected: str) -> None:
    """Refuses to work with a driver whose code is not this node's."""
    if fingerprint() != expected:
        raise BadInput(
            f"node {ray.util.get_node_ip_address()} runs other mergeyard code than the driver;"
            " install the same version there"
        )


def _slots(spec: WorkerSpec, gpus: float) -> int:
    """How many workers the cluster's living nodes hold at once."""
    slots = 0
    for node in ray.nodes():
        if not node["Alive"]:
            continue
        has = node["Resources"]
        fits = [has.get("memory", 0) // spec.memory_bytes]
        if spec.cpus:
            fits.append(has.get("CPU", 0) // spec.cpus)
        if gpus:
            fits.append(has.get("GPU", 0) // gpus)
        slots += int(min(fits))
    return slots


def translated(failure: BaseException, what: str) -> MergeyardError:
    """Our own error if a worker raised one; else what became of the worker."""
    cause = failure.cause if isinstance(failure, RayTaskError) else failure  # its own text is a traceback
    if isinstance(cause, MergeyardError):
        return cause
    if isinstance(failure, RayTaskError):
        return MergeyardError(f"{what}: {type(cause).__name__}: {cause}")
    if isinstance(failure, (WorkerCrashedError, OutOfMemoryError)):
        return WorkerLost(f"{what}: its worker died {TRIES} times; look for a lack of memory, then run again")
    return WorkerLost(f"{what}: {str(failure).splitlines()[0]}")
