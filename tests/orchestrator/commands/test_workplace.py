"""Where a command works: the devices of this process."""

from __future__ import annotations

import argparse

import pytest

from jobs.job import WorkerSpec, load_job
from orchestrator.commands import workplace
from orchestrator.commands.workplace import Workplace

JOB = """\
name: job
parents: {a: a, b: b}
recipe: {merge_method: linear, models: [{model: a}, {model: b}], dtype: bfloat16, parameters: {weight: 0.5}}
output: runs
workers: {gpus: GPUS}
"""


@pytest.mark.parametrize(("gpus", "device"), [("0", "cpu"), ("1", "cuda"), ("0.5", "cuda")])
def test_merging_in_this_process_uses_a_gpu_where_the_job_asks_for_one(
    monkeypatch: pytest.MonkeyPatch, gpus: str, device: str
) -> None:
    parts: list[tuple[str, float]] = []
    monkeypatch.setattr(workplace, "best_device", lambda: "cuda")
    monkeypatch.setattr(workplace, "take_part", lambda *part: parts.append(part))
    job = load_job(JOB.replace("GPUS", gpus), "job.yaml")
    assert job.workers == WorkerSpec(gpus=float(gpus))
    with Workplace(job, argparse.Namespace(in_process=True, address=None)) as place:
        pool = place.pool
    assert pool._device == device  # type: ignore[attr-defined]
    assert parts == [(device, float(gpus))]
