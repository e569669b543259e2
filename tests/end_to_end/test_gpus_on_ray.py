"""Workers on GPUs as a real Ray gives them out; the GPUs are numbers, and the merges run on the CPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.end_to_end.command import ROOT
from tests.end_to_end.conftest import PARENTS

GRID = """
import json, os, sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import ray
from jobs.errors import MergeyardError
from jobs.job import WorkerSpec, load_job
from orchestrator.cluster import ray_cluster, ray_merging
from orchestrator.cluster.ray_evaluating import RayEvaluators
from orchestrator.cluster.ray_merging import RayPool
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import make_plan
from orchestrator.watching import Watcher

parents, differing, runs = sys.argv[1:]
merge = ray_merging._merge

def on_a_gpu(*args):
    Path(runs, f"gpu-{os.getpid()}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
    yield from merge(*args)

def gpu_of(actor):
    return ray.get(actor.__ray_call__.remote(lambda _: os.environ["CUDA_VISIBLE_DEVICES"]))

def plan_of(parents, name):
    return make_plan(load_job(json.dumps({"name": name, "parents": {n: f"{parents}/{n}" for n in ("long", "fmt")},
        "recipe": recipe, "output": runs, "shard_size": "700KB"}), "job.yaml"))

recipe = {"merge_method": "linear", "models": [{"model": "long"}, {"model": "fmt"}], "dtype": "bfloat16",
          "parameters": {"weight": 0.5}}
ray_cluster._init = partial(ray_cluster._init, num_gpus=1, num_cpus=2)
cluster = ray_cluster.RayCluster(WorkerSpec(gpus=0.5, memory_bytes=10**8))
found = {"workers": cluster.workers, "device": cluster.device}
cluster.device, ray_merging._merge = "cpu", on_a_gpu
drive(plan_of(parents, "gpus"), RayPool(cluster), Watcher(visible=False))
try:
    drive(plan_of(differing, "refused"), RayPool(cluster), Watcher(visible=False))
except MergeyardError as error:
    found["refused"] = str(error)
evaluators = RayEvaluators({"model": SimpleNamespace(bytes=0, run=runs)}, cluster)
while len(evaluators.idle()) < 2:
    evaluators.next_done()
found["evaluators"] = [gpu_of(actor) for actor in evaluators._actors.values()]
evaluators.close()
cluster.close()
receipts = [json.loads(file.read_text()) for file in Path(runs, "gpus").rglob("receipts/**/*.json")]
found["gpus"] = [file.read_text() for file in Path(runs).glob("gpu-*")]
print(json.dumps(found | {"processes": [receipt["worker"] for receipt in receipts]}))
"""


def test_two_workers_share_a_gpu_and_a_process_merges_one_task(tmp_path: Path) -> None:
    """Ray may give the next task another GPU; a process that has used CUDA would stay on its first. What a worker
    refuses is said with the shard, the points and the node."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    (tmp_path / "runs").mkdir()
    for number, who in enumerate(("long", "fmt")):
        shutil.copytree(PARENTS / who, tmp_path / "differing" / who)
        weights = tmp_path / "differing" / who / "model.safetensors"
        save_file({**load_file(weights), "model.counter": torch.tensor([number])}, weights, {"format": "pt"})
    run = [sys.executable, "-c", GRID, PARENTS, tmp_path / "differing", tmp_path / "runs"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["workers"], found["device"]) == (2, "cuda")
    assert len(set(found["processes"])) == len(found["processes"]) >= 3
    assert set(found["gpus"]) == {"0"} and len(found["gpus"]) > len(found["processes"])
    assert found["evaluators"] == ["0", "0"]
    assert re.fullmatch(
        r"model-\d{5}-of-\d{5}\.safetensors of .* on node [\d.]+: "
        r"tensor model\.counter \(I64\) differs between long and fmt; integers cannot be merged, .*",
        found["refused"],
    )
