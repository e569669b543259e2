"""Programs that run as contenders, in processes of their own; each prints one JSON object.

    python -m tests.benchmarks.merges.worker resident JOB.yaml   # seconds a point, into a resident model
    python -m tests.benchmarks.merges.worker hashed JOB.yaml     # the same, and every tensor's digest
    python -m tests.benchmarks.merges.worker copy FOLDER         # seconds of a copy of the model in memory
    python -m tests.benchmarks.merges.worker task JOB.yaml       # a worker's tasks, output thrown away

Each uses two threads. `resident` reads the parents once, untimed, then merges each point of the job into the memory of
a model that was loaded before, as an evaluation does; `copy` writes over such memory as well. `task` runs every merge
task of the job and drops the bytes of the shards: 64 points need no disk.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from typing_extensions import Buffer

from jobs.job import load_job
from orchestrator.planning.plan import Plan, make_plan
from workers.storage import ObjectInfo
from workers.storage.memory import MemoryStore

ROUNDS, THREADS = 5, 2


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("program", choices=("resident", "hashed", "copy", "task"))
    arguments.add_argument("input", type=Path)
    options = arguments.parse_args()
    run = {"resident": resident, "hashed": partial(resident, hashed=True), "copy": copy, "task": task}[options.program]
    print(json.dumps(run(options.input)))


def resident(job: Path, *, hashed: bool = False) -> dict[str, float]:
    """Wall and CPU seconds a point, the facts about whole tensors included."""
    import torch

    from workers.checkpoints.dtypes import torch_dtype
    from workers.merging.resident import ResidentParents

    plan = planned(job)
    tensors = [tensor for shard in plan.points[0].layout.shards for tensor in shard.tensors]
    parents = ResidentParents(
        tensors,
        {name: checkpoint.parent for name, checkpoint in plan.parents.items()},
        seed=0,
        numerics="float32",
        threads=THREADS,
    )
    # zero_ gets every page from the kernel, which torch.zeros leaves to the first point
    model = {tensor.name: torch.empty(tensor.shape, dtype=torch_dtype(tensor.dtype)).zero_() for tensor in tensors}
    started, used = time.perf_counter(), time.process_time()
    for point in plan.points:
        for name, tensor in parents.merged(point.settings, {} if hashed else None, model):
            assert tensor is model[name] or tensor.data_ptr() == model[name].data_ptr(), f"{name} is not in its place"
    points = len(plan.points)
    return {"wall": (time.perf_counter() - started) / points, "cpu": (time.process_time() - used) / points}


def copy(folder: Path) -> dict[str, float]:
    """The middle of five copies of a checkpoint's bytes from memory to memory."""
    sources = [np.fromfile(path, np.uint8) for path in sorted(folder.glob("*.safetensors"))]
    pieces = [part for source in sources for part in np.array_split(source, max(1, source.nbytes >> 22))]
    targets = [np.zeros_like(part) for part in pieces]
    seconds: list[tuple[float, float]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(ROUNDS):
            started, used = time.perf_counter(), time.process_time()
            _wait(pool.map(np.copyto, targets, pieces))
            seconds.append((time.perf_counter() - started, time.process_time() - used))
    wall, cpu = sorted(seconds)[ROUNDS // 2]
    return {"wall": wall, "cpu": cpu}


def task(job: Path) -> dict[str, float]:
    """Merges every point of the job, shard by shard, as one worker."""
    from workers.merging import shard

    store, open_store = _Dropping("memory://dropped"), shard.open_store
    plan = planned(job)
    shard.open_store = lambda url: store if str(url) == plan.run_url else open_store(url)  # pyright: ignore
    started, used = time.perf_counter(), time.process_time()
    for merge in plan.tasks((), 1):
        shard.merge_task(merge)
    return {"wall": time.perf_counter() - started, "cpu": time.process_time() - used}


def planned(job: Path) -> Plan:
    """The plan of a job file."""
    return make_plan(load_job(job.read_text(), job.name), relative_to=job.parent)


class _Dropping(MemoryStore):
    """Keeps receipts, and counts the bytes of shards without keeping them."""

    def upload(self, key: str, *, mode: Literal["create", "overwrite"] = "overwrite") -> Any:
        return _Dropped(key)


class _Dropped:
    def __init__(self, key: str) -> None:
        self._key, self._size = key, 0

    def write(self, data: Buffer) -> None:
        self._size += memoryview(data).nbytes

    def commit(self) -> ObjectInfo:
        return ObjectInfo(self._key, self._size, "dropped")

    def abort(self) -> None:
        pass

    def __enter__(self) -> _Dropped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass


def _wait(answers: Iterable[None]) -> None:
    for _ in answers:
        pass


if __name__ == "__main__":
    main()
