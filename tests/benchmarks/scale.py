"""How far do planner and driver scale? Their own time, memory and requests, for runs far larger than this machine.

    python -m tests.benchmarks.scale
    python -m tests.benchmarks.scale --case 70b       one of them
    python -m tests.benchmarks.scale --json

Real: job, planner, ledger, driver, gatherer, on a store in memory. The parents are headers of files that are not
there; the pool answers at once with receipts such as workers leave. What the workers would ask of the store, and how
long the bytes take, is reckoned: ranges and parts as the code cuts them, and a network of 25 Gb/s each way and node, of
which 0.8 is used. Each case runs in a process of its own, so that its peak of memory is its own; seconds of planner
and driver are of the processor.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import pickle
import resource
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

from jobs.errors import ObjectMissing
from jobs.job import load_job
from jobs.merge_tasks import MergeTask, Receipt
from orchestrator.cluster.pool import Progress
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import make_plan
from orchestrator.watching import Watcher
from workers.checkpoints.safetensors import header_bytes
from workers.merging.shard import LARGEST_SLAB
from workers.storage import ObjectInfo
from workers.storage.memory import MemoryStore

BYTES_A_SECOND = 25e9 / 8 * 0.8
NODES = 16
PARTS = 16 << 20
FILE_BYTES = 5 * 10**9
PARENTS = "abcd"
LINEAR = """
  merge_method: linear
  models:
  - {model: a, parameters: {weight: "${x}"}}
  - {model: b, parameters: {weight: "${y}"}}
  - {model: c, parameters: {weight: 1}}
  - {model: d, parameters: {weight: "${1 - x}"}}
  dtype: bfloat16
"""
Tensors = list[tuple[str, str, tuple[int, ...]]]


def dense_70b() -> Tensors:
    """The shapes of Llama 3 70B: 80 layers, 141 GB in bfloat16."""
    hidden, middle, keys, words = 8192, 28672, 1024, 128256
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (middle, hidden),
        "mlp.up_proj": (middle, hidden),
        "mlp.down_proj": (hidden, middle),
    }
    ends = [("model.embed_tokens", (words, hidden)), ("model.norm", (hidden,)), ("lm_head", (words, hidden))]
    layers = [(f"model.layers.{number}.{name}", shape) for number in range(80) for name, shape in layer.items()]
    return [(f"{name}.weight", "BF16", shape) for name, shape in [*ends, *layers]]


def mixture_1t() -> Tensors:
    """A mixture of 384 experts in 60 of 61 layers: 1.03 T parameters in 69,800 tensors, 2 TB in bfloat16."""
    hidden, middle, words = 7168, 2048, 163840
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens", (words, hidden)), ("lm_head", (words, hidden))]
    for number in range(61):
        at = f"model.layers.{number}"
        found += [(f"{at}.self_attn.{name}_proj", (hidden, hidden)) for name in "qkvo"]
        found += [(f"{at}.input_layernorm", (hidden,)), (f"{at}.mlp.gate", (384, hidden))]
        for expert in range(384 if number else 1):
            inside = f"{at}.mlp.experts.{expert}"
            found += [(f"{inside}.{name}_proj", (middle, hidden)) for name in ("gate", "up")]
            found.append((f"{inside}.down_proj", (hidden, middle)))
    return [(f"{name}.weight", "BF16", shape) for name, shape in found]


class Headers:
    """A parent of which nothing is there but what planning reads."""

    def __init__(self, name: str, tensors: Tensors) -> None:
        self.url = self.pinned_url = f"s3://models/{name}"
        self.asked: Counter[str] = Counter()
        config = {"model_type": "qwen2", "num_hidden_layers": 80, "max_position_embeddings": 131072}
        self._small = {"config.json": json.dumps(config).encode(), "tokenizer.json": b'{"model": {"vocab": {"x": 0}}}'}
        files: list[Tensors] = [[]]
        room = FILE_BYTES
        for tensor in tensors:
            size = 2 * math.prod(tensor[2])
            if size > room:
                files.append([])
                room = FILE_BYTES
            files[-1].append(tensor)
            room -= size
        names = [f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)]
        self._small["model.safetensors.index.json"] = json.dumps(
            {"weight_map": {tensor[0]: file for file, part in zip(names, files, strict=True) for tensor in part}}
        ).encode()
        self._headers = {file: header_bytes(part) for file, part in zip(names, files, strict=True)}
        data = {file: sum(2 * math.prod(tensor[2]) for tensor in part) for file, part in zip(names, files, strict=True)}
        self._sizes = {file: len(header) + data[file] for file, header in self._headers.items()}
        self._sizes |= {name: len(content) for name, content in self._small.items()}

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        self.asked["LIST"] += math.ceil(len(self._sizes) / 1000)
        return (ObjectInfo(key, size, key) for key, size in self._sizes.items())

    def read(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        self.asked["GET"] += 1
        content = self._small.get(key) or self._headers[key]
        return content[start:] if length is None else content[start : start + length].ljust(length, b" ")

    def free_bytes(self) -> int | None:
        return None


class Counted(MemoryStore):
    """The run's store, as the driver sees it: every request is counted as S3 would charge it."""

    def __init__(self) -> None:
        super().__init__("s3://runs")
        self.asked: Counter[str] = Counter()
        self.sizes: dict[str, int] = {}
        self.counting = threading.Lock()

    def count(self, kind: str, times: int = 1) -> None:
        with self.counting:
            self.asked[kind] += times

    def locate(self, key: str) -> ObjectInfo:
        self.count("HEAD")
        return super().locate(key)

    def read(self, key: str, **how: Any) -> Any:
        self.count("GET")
        return super().read(key, **how)

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        found = list(super().list(prefix))
        found += [ObjectInfo(key, size, "etag") for key, size in self.sizes.items() if key.startswith(prefix)]
        self.count("LIST", math.ceil(len(found) / 1000) or 1)
        return iter(found)

    def write(self, key: str, data: Any, **how: Any) -> ObjectInfo:
        self.count("PUT")
        return super().write(key, data, **how)

    def swap(self, key: str, data: Any, *, etag: str) -> ObjectInfo:
        self.count("PUT")
        return super().swap(key, data, etag=etag)


class AnsweringPool:
    """Workers that need no time: their receipts, and what they would have asked of the stores."""

    def __init__(self, workers: int, store: Counted) -> None:
        self.workers = workers
        self.asked: Counter[str] = Counter()
        self.tasks = 0
        self.bytes_read = self.bytes_written = 0
        self.largest_task = 0
        self._store = store

    def run(self, tasks: Sequence[MergeTask], progress: Progress) -> Iterator[list[Receipt]]:
        self.tasks = len(tasks)
        for number, task in enumerate(tasks):
            if number % 97 == 0:
                self.largest_task = max(self.largest_task, len(pickle.dumps(task)))
            yield pickle.loads(pickle.dumps(self._answer(task)))

    def close(self) -> None:
        pass

    def _answer(self, task: MergeTask) -> list[Receipt]:
        size = sum(tensor.bytes for tensor in task.tensors)
        self.bytes_read += task.bytes_read
        self.bytes_written += size * len(task.points)
        self.asked["GET"] += math.ceil(task.bytes_read / LARGEST_SLAB) + len(task.points)
        self.asked["PUT"] += (math.ceil(size / PARTS) + 3) * len(task.points)
        self.asked["HEAD"] += len(task.points)
        return [self._receipt(point.unit, point.point, point.key, point.receipt, size, task) for point in task.points]

    def _receipt(self, unit: str, point: str, key: str, at: str, size: int, task: MergeTask) -> Receipt:
        digests = {tensor.name: hashlib.sha256(f"{unit}{tensor.name}".encode()).hexdigest() for tensor in task.tensors}
        receipt = Receipt(unit, point, key, size, "etag", digests, (), task.bytes_read, 1.0, "node:1")
        self._store.sizes[key] = size
        MemoryStore.write(self._store, at, receipt.to_json())
        return receipt


CASES = {
    "70b": (dense_70b, "{x: {from: 0.05, to: 0.5, num: 10}, y: {from: 0.1, to: 1, num: 10}}", None),
    "1t": (mixture_1t, "{x: {from: 0.001, to: 0.9, num: 100}, y: {from: 0.1, to: 1, num: 100}}", 5),
    "1t-30": (mixture_1t, "{x: {from: 0.001, to: 0.9, num: 100}, y: {from: 0.1, to: 1, num: 100}}", 30),
}
TITLES = {
    "70b": "70B, 100 points, all written",
    "1t": "1T, 10,000 points, 5 written",
    "1t-30": "1T, 10,000 points, 30 written",
}


def measure(case: str) -> dict[str, Any]:
    """One case in this process."""
    shapes, grid, kept = CASES[case]
    tensors = shapes()
    parents = {f"s3://models/{name}": Headers(name, tensors) for name in PARENTS}
    store = Counted()
    stores: dict[str, Any] = {**parents, store.url: store, f"{store.url}/scale": store}
    del tensors
    text = (
        "name: scale\nparents: {" + ", ".join(f"{name}: 's3://models/{name}'" for name in PARENTS) + "}\n"
        f"recipe:{LINEAR}grid: {grid}\noutput: s3://runs\nworkers: {{memory: 64GB, cpus: 8}}\n"
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with patched(stores):
        began = time.process_time()
        job = load_job(text, "job.yaml")
        read = time.process_time()
        plan = make_plan(job)
        document = len(json.dumps(plan.document()))
        planned = time.process_time()
        kept_plan = plan if kept is None else plan.keeping([point.name for point in plan.points[:kept]])
        pool = AnsweringPool(NODES, store)
        result = drive(kept_plan, pool, Watcher(visible=False))
        driven = time.process_time()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        first = Counter(store.asked)
        assert len(result.points) == len(kept_plan.written)
        del result
        again = drive(kept_plan, AnsweringPool(NODES, store), Watcher(visible=False))
        resumed = time.process_time()
    assert again.units_merged == 0
    seconds = max(pool.bytes_read, pool.bytes_written) / (NODES * BYTES_A_SECOND)
    asked_of_parents = sum((parent.asked for parent in parents.values()), Counter[str]())
    return {
        "points": len(plan.points),
        "tensors": sum(len(shard.tensors) for shard in plan.points[0].layout.shards),
        "units": len(kept_plan.units),
        "tasks": pool.tasks,
        "job_seconds": read - began,
        "plan_seconds": planned - read,
        "drive_seconds": driven - planned,
        "resume_seconds": resumed - driven,
        "peak_memory_mb": (peak - before) / 1024,
        "plan_json_mb": document / 1e6,
        "largest_task_kb": pool.largest_task / 1e3,
        "bytes_read_tb": pool.bytes_read / 1e12,
        "bytes_written_tb": pool.bytes_written / 1e12,
        "network_seconds": seconds,
        "driver_requests": dict(first + asked_of_parents),
        "worker_requests": dict(pool.asked),
        "worker_requests_a_second": {kind: times / seconds for kind, times in pool.asked.items()},
        "resume_requests": dict(store.asked - first),
    }


def patched(stores: dict[str, Any]) -> Any:
    """Every `open_store` of planner, ledger and gatherer opens these."""
    from contextlib import ExitStack

    def open_known(url: str) -> Any:
        if url not in stores:
            raise ObjectMissing(url)
        return stores[url]

    stack = ExitStack()
    for module in (
        "workers.checkpoints.opening",
        "orchestrator.planning.plan",
        "orchestrator.planning.compatibility",
        "orchestrator.records.ledger",
        "orchestrator.planning.beside",
    ):
        stack.enter_context(patch(f"{module}.open_store", open_known))
    return stack


ROWS = {
    "points": "{:,}",
    "tensors": "{:,}",
    "units": "{:,}",
    "tasks": "{:,}",
    "job_seconds": "{:.1f} s",
    "plan_seconds": "{:.1f} s",
    "drive_seconds": "{:.1f} s",
    "resume_seconds": "{:.1f} s",
    "peak_memory_mb": "{:,.0f} MB",
    "plan_json_mb": "{:.1f} MB",
    "largest_task_kb": "{:,.0f} kB",
    "bytes_read_tb": "{:.2f} TB",
    "bytes_written_tb": "{:.2f} TB",
    "network_seconds": "{:,.0f} s",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=tuple(CASES), help="this one alone, in this process")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if arguments.case:
        results = {arguments.case: measure(arguments.case)}
    else:
        command = [sys.executable, "-m", "tests.benchmarks.scale", "--json", "--case"]
        runs = {case: subprocess.run([*command, case], check=True, capture_output=True) for case in CASES}
        results = {case: json.loads(run.stdout)[case] for case, run in runs.items()}
    if arguments.json:
        print(json.dumps(results, indent=1))
        return
    print(" " * 26 + "".join(f"{TITLES[case]:>36}" for case in results))
    for name, shape in ROWS.items():
        values = "".join(f"{shape.format(result[name]):>36}" for result in results.values())
        print(f"{name.replace('_', ' '):<26}{values}")
    for name in ("driver_requests", "resume_requests", "worker_requests", "worker_requests_a_second"):
        for kind in ("LIST", "GET", "HEAD", "PUT"):
            cells = "".join(f"{result[name].get(kind, 0):>36,.0f}" for result in results.values())
            print(f"{f'{name}, {kind}'.replace('_', ' '):<32}{cells[6:]}")


if __name__ == "__main__":
    main()
