"""Times points that are merged in memory and never written, as an evaluation worker merges them.

    python -m tests.benchmarks.unwritten_grid PARENTS [--method linear|ties] [--points 16] [--threads 2]

PARENTS holds base, cos and fmt, as make_checkpoints.py writes them. Prints the seconds to read the parents once, those
of a copy of the model, and those a point, merged into one model's memory again and again, without and with digests. A
ties point varies the density, so nothing but the sample is shared between points.
"""

from __future__ import annotations

import argparse
import time
from collections import deque
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from jobs.job import load_job
from orchestrator.planning.plan import make_plan
from workers.merging.buffers import keep_freed_memory
from workers.merging.resident import ResidentParents
from workers.methods.tile import TILE_ELEMENTS

RECIPES = {
    "linear": """
  merge_method: linear
  models:
    - {model: cos, parameters: {weight: "${w}"}}
    - {model: fmt, parameters: {weight: "${1 - w}"}}
  dtype: bfloat16""",
    "ties": """
  merge_method: ties
  base_model: base
  models:
    - {model: cos, parameters: {weight: 0.7, density: "${w}"}}
    - {model: fmt, parameters: {weight: 0.3, density: "${w}"}}
  dtype: bfloat16""",
}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("parents", type=Path)
    arguments.add_argument("--method", choices=RECIPES, default="linear")
    arguments.add_argument("--points", type=int, default=16)
    arguments.add_argument("--threads", type=int, default=2)
    options = arguments.parse_args()
    names = ("cos", "fmt") if options.method == "linear" else ("cos", "fmt", "base")
    folder = options.parents.resolve()
    text = f"""
name: unwritten
parents: {{{", ".join(f"{name}: {folder / name}" for name in names)}}}
recipe:{RECIPES[options.method]}
grid: {{w: {{from: 0.2, to: 0.8, num: {options.points}}}}}
point: "w{{w}}"
output: {folder.parent / "runs"}
"""
    plan = make_plan(load_job(text, "unwritten.yaml"))
    tensors = [tensor for shard in plan.points[0].layout.shards for tensor in shard.tensors]
    keep_freed_memory()
    started = time.perf_counter()
    parents = ResidentParents(
        tensors,
        {name: checkpoint.parent for name, checkpoint in plan.parents.items()},
        seed=0,
        numerics="float32",
        threads=options.threads,
    )
    read = time.perf_counter() - started
    model = dict(parents.merged(plan.points[0].settings))
    copied = min(copy(model, options.threads) for _ in range(5))
    seconds = {}
    for hashed in (False, True):
        started = time.perf_counter()
        for planned in plan.points:
            deque(parents.merged(planned.settings, {} if hashed else None, model), maxlen=0)
        seconds[hashed] = time.perf_counter() - started
    merged = seconds[True]
    print(f"{options.method}: parents read in {read:.1f} s; a copy of the model takes {copied:.2f} s")
    for hashed, took in seconds.items():
        each = took / len(plan.points)
        print(f"{each:.2f} s a point{', digests too' if hashed else ''}: {each / copied:.2f} of a copy")
    print(f"all in all {(read + merged) / len(plan.points):.2f} s a point over {len(plan.points)} points")


def copy(model: Mapping[str, Tensor], threads: int) -> float:
    """Seconds that a copy of a model within memory takes."""
    parts = [part for tensor in model.values() for part in tensor.view(-1).split(16 * TILE_ELEMENTS)]
    copies = [part.clone() for part in parts]
    with ThreadPoolExecutor(threads, initializer=lambda: torch.set_num_threads(1)) as pool:
        started = time.perf_counter()
        deque(pool.map(lambda to, part: to.copy_(part), copies, parts), maxlen=0)
        return time.perf_counter() - started


if __name__ == "__main__":
    main()
