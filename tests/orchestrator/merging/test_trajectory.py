"""Twenty checkpoints in a bucket: windows times shapes, each checkpoint read once, weights as in the formulas."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load

from jobs.job import load_job
from orchestrator.cluster.in_process import InProcessPool
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import make_plan
from orchestrator.records.ledger import Ledger
from orchestrator.watching import Watcher
from tests.orchestrator.models import load_model, shapes
from tests.orchestrator.trajectories import trajectory_job, write_run
from tests.seaweedfs import SeaweedFS

COUNT = 20
WINDOWS = (1, 4, 20)
SHAPES: dict[str, Callable[[int, int], float]] = {
    "uniform": lambda age, size: 1 / size,
    "cosine": lambda age, size: (
        (math.cos(math.pi * (size - 1 - age) / size) - math.cos(math.pi * (size - age) / size)) / 2
    ),
    "1-sqrt": lambda age, size: math.sqrt((size - age) / size) - math.sqrt((size - 1 - age) / size),
    "ema": lambda age, size: 0.3 * 0.7**age if age < size - 1 else 0.7 ** (size - 1),
    "0.9 ** age": lambda age, size: 0.9**age / sum(0.9**other for other in range(size)),
}
RECIPE = """
  merge_method: linear
  models:
  - model: step[-${k}:]
    parameters: {weight: "${shape}", alpha: 0.3}
"""


def test_windows_and_shapes_over_twenty_checkpoints_in_a_bucket(s3_server: SeaweedFS, s3_url: str, tmp_path: Path):
    write_run(tmp_path, COUNT)
    client, (bucket, _, prefix) = s3_server.client(), s3_url.removeprefix("s3://").partition("/")
    for file in sorted(tmp_path.glob("*/*")):
        client.upload_file(str(file), bucket, f"{prefix}/{file.parent.name}/{file.name}")
    axes = f"{{k: {[*WINDOWS]}, shape: [{', '.join(SHAPES)}]}}"
    plan = make_plan(load_job(trajectory_job(s3_url, COUNT, f"{s3_url}/runs", grid=axes, recipe=RECIPE), "job.yaml"))

    result = drive(plan, InProcessPool(), Watcher(visible=False))

    once = COUNT * sum(4 * torch.Size(shape).numel() for shape in shapes().values())
    receipts = Ledger(plan.run_url, plan.places).trusted(plan.units).values()
    assert len(plan.points) == len(WINDOWS) * len(SHAPES)
    assert {receipt.bytes_read for receipt in receipts} == {once} == {result.bytes_read}
    checkpoints = [load_model(tmp_path / f"step-{number}") for number in range(1, COUNT + 1)]
    for planned, (size, shape) in zip(plan.points, product(WINDOWS, SHAPES), strict=True):
        same_as = planned.same_as or planned.name
        key = f"{prefix}/runs/windows/points/{same_as}/model.safetensors"
        found = load(client.get_object(Bucket=bucket, Key=key)["Body"].read())
        for name, tensor in found.items():
            expected = sum(SHAPES[shape](age, size) * checkpoints[-1 - age][name].double() for age in range(size))
            torch.testing.assert_close(tensor.double(), expected, rtol=2e-7, atol=1e-9, msg=planned.name)
    largest = f"{prefix}/runs/windows/points/k20_shape=uniform"
    card = client.get_object(Bucket=bucket, Key=f"{largest}/README.md")["Body"].read().decode()
    assert "A `linear` merge of `step-1`, `step-2` … `step-20` (20 checkpoints), made by mergeyard." in card
    assert f"| `step-20` | `{s3_url}/step-20` | `0.05` |" in card
