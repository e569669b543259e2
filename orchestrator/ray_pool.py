"""The pool on Ray, and the only file that imports it: one Ray task a merge task, receipts back, never a tensor."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, cast

import ray
from ray.exceptions import RayError, RayTaskError, WorkerCrashedError

from jobs.errors import BadInput, MergeyardError, WorkerLost
from jobs.job import WorkerSpec
from jobs.tasks import MergeTask, Receipt
from orchestrator.pool import TRIES, Progress, retry_pause
from workers.fingerprint import fingerprint, package_folders

TASKS_AHEAD = 2
"""Tasks submitted for each worker slot: enough that none waits, few enough that stopping is immediate."""

REPORT_SECONDS = 0.5
LOCAL_OBJECT_STORE_BYTES = 80 << 20  # receipts are all that passes through it


class RayPool:
    """Runs tasks on a Ray cluster: the one at `address`, or one started here and stopped with this pool."""

    def __init__(self, spec: WorkerSpec, *, address: str | None = None) -> None:
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray 2.60 warns without it
        if address is None:
            ray.init(
                address="local",
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
                object_store_memory=LOCAL_OBJECT_STORE_BYTES,
            )
        else:
            ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"py_modules": package_folders()},
            )
        gpus = spec.gpus if ray.cluster_resources().get("GPU", 0) else 0.0
        self.device = "cuda" if gpus else "cpu"
        self.resources: dict[str, float] = {"num_cpus": spec.cpus, "num_gpus": gpus, "memory": spec.memory_bytes}
        self._workers = _slots(spec, gpus)
        self._merge = ray.remote(_merge).options(**self.resources, max_retries=TRIES - 1)
        self._meter: Any = ray.remote(Meter).options(num_cpus=0).remote()

    @property
    def workers(self) -> int:
        return self._workers

    def run(self, tasks: Sequence[MergeTask], progress: Progress) -> Iterator[list[Receipt]]:
        waiting = [(task, 1) for task in reversed(tasks)]
        running: dict[Any, tuple[MergeTask, int]] = {}
        reported = (0, 0)
        while waiting or running:
            while waiting and len(running) < TASKS_AHEAD * self._workers:
                task, attempt = waiting.pop()
                running[self._merge.remote(task, self.device, fingerprint(), self._meter)] = (task, attempt)
            finished, _ = ray.wait(list(running), num_returns=1, timeout=REPORT_SECONDS, fetch_local=False)
            reported = self._report(reported, progress)
            for reference in finished:
                task, attempt = running.pop(reference)
                try:
                    yield ray.get(reference)
                except (RayError, MergeyardError) as failure:
                    error = translated(failure, task.name)
                    if not error.retry or attempt == TRIES:
                        raise error from failure
                    time.sleep(retry_pause(attempt))
                    waiting.append((task, attempt + 1))

    def _report(self, reported: tuple[int, int], progress: Progress) -> tuple[int, int]:
        read, written = cast(tuple[int, int], ray.get(self._meter.total.remote()))
        progress(max(0, read - reported[0]), max(0, written - reported[1]))
        return read, written

    def close(self) -> None:
        ray.shutdown()


class Meter:
    """Adds up what all workers read and wrote."""

    def __init__(self) -> None:
        self._read = self._written = 0

    def add(self, read: int, written: int) -> None:
        """Some more."""
        self._read += read
        self._written += written

    def total(self) -> tuple[int, int]:
        """Bytes read and bytes written so far."""
        return self._read, self._written


def _merge(task: MergeTask, device: str, code: str, meter: Any) -> list[Receipt]:
    """What runs on a node."""
    from workers.merging import merge_task

    check_code(code)
    pending = [0, 0]
    last = time.monotonic()

    def progress(read: int, written: int) -> None:
        nonlocal last
        pending[0] += read
        pending[1] += written
        if time.monotonic() - last >= REPORT_SECONDS:
            last = time.monotonic()
            read, written = pending
            pending[:] = 0, 0
            meter.add.remote(read, written)

    receipts = merge_task(task, device=device, progress=progress)
    meter.add.remote(*pending)
    return receipts


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
    if slots == 0:
        raise BadInput(
            f"no node has room for a worker of {spec.cpus:g} CPUs, {gpus:g} GPUs and"
            f" {spec.memory_bytes / 1e9:.1f} GB; ask for less under `workers:`"
        )
    return min(slots, spec.count) if spec.count else slots


def translated(failure: BaseException, what: str) -> MergeyardError:
    """Our own error if a worker raised one; else what became of the worker."""
    if isinstance(failure, MergeyardError):
        return failure
    if isinstance(failure, RayTaskError):
        cause = failure.cause
        if isinstance(cause, MergeyardError):
            return cause
        return MergeyardError(f"{what}: {type(cause).__name__}: {cause}")
    if isinstance(failure, WorkerCrashedError):
        return WorkerLost(f"{what}: its worker died {TRIES} times; look for a lack of memory, then run again")
    return WorkerLost(f"{what}: {str(failure).splitlines()[0]}")
