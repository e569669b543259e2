"""Workers on GPUs as a real Ray gives them out; the GPUs are numbers, and the merges run on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.end_to_end.command import ROOT
from tests.end_to_end.conftest import PARENTS

GRID = """
import json, sys
from functools import partial
from pathlib import Path
from jobs.job import WorkerSpec, load_job
from orchestrator.cluster import ray_cluster
from orchestrator.cluster.ray_merging import RayPool
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import make_plan
from orchestrator.watching import Watcher

parents, runs = sys.argv[1:]
recipe = {"merge_method": "linear", "models": [{"model": "long"}, {"model": "fmt"}], "dtype": "bfloat16",
          "parameters": {"weight": 0.5}}
plan = make_plan(load_job(json.dumps({"name": "gpus", "parents": {n: f"{parents}/{n}" for n in ("long", "fmt")},
    "recipe": recipe, "output": runs, "shard_size": "400KB"}), "job.yaml"))
ray_cluster._init = partial(ray_cluster._init, num_gpus=2, num_cpus=2)
cluster = ray_cluster.RayCluster(WorkerSpec(gpus=1, memory_bytes=10**8))
found = {"workers": cluster.workers, "device": cluster.device}
cluster.device = "cpu"
drive(plan, RayPool(cluster), Watcher(visible=False))
cluster.close()
receipts = [json.loads(file.read_text()) for file in Path(runs).rglob("receipts/**/*.json")]
print(json.dumps(found | {"processes": [receipt["worker"] for receipt in receipts]}))
"""


def test_a_process_on_a_gpu_merges_one_task(tmp_path: Path) -> None:
    """Ray may give the next task another GPU; a process that has used CUDA would stay on its first."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-c", GRID, PARENTS, tmp_path / "runs"]
    done = subprocess.run(run, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["workers"], found["device"]) == (2, "cuda")
    assert len(set(found["processes"])) == len(found["processes"]) >= 4
