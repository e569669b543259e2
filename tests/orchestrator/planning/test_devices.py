"""The device that merges written points faster, by the bytes of a plan and the rates that are assumed."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobs.job import Keep, load_job
from orchestrator.planning.devices import merging
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.report.terminal.run import plan_facts
from workers.checkpoints.grams import write_grams
from workers.storage import open_store

PARENTS = Path(__file__).parents[3] / "jobs" / "examples" / "parents"


def planned(method: str, tmp_path: Path, points: int, **workers: Any) -> Plan:
    models = [{"model": name, "parameters": {"weight": "${w}"}} for name in ("long", "fmt")]
    more: dict[str, Any] = {"base_model": "base", "parameters": {"density": 0.5}}
    if method == "regmean":
        write_grams(open_store(str(tmp_path)), "grams.safetensors", (), {})
        more = {"grams": dict.fromkeys(("long", "fmt"), str(tmp_path / "grams.safetensors"))}
    elif method == "linear":
        more = {}
    document = {
        "name": method,
        "parents": {name: str(PARENTS / name) for name in ("long", "fmt", *(["base"] if "base_model" in more else []))},
        "recipe": {"merge_method": method, "models": models, "dtype": "bfloat16", **more},
        "grid": {"w": [(1 + at) / 10 for at in range(points)]},
        "output": str(tmp_path),
        "workers": {"gpus": 1, "memory": "4GB", **workers},
    }
    return make_plan(load_job(json.dumps(document), "job.yaml"))


@pytest.mark.parametrize(
    ("method", "cpus", "points", "storage", "computing", "faster"),
    # of a parent's bytes: read at 1, written at 0.5, and merged by a CPU at 2, 1, 0.6 or 0.03 GB/s
    [
        ("linear", 1, 1, 2, 2 / 2, False),
        ("ties", 1, 1, 3, 3 / 1, False),
        ("ties", 1, 4, 8, 4 * 3 / 1, True),
        ("dare_ties", 1, 1, 3, 3 / 0.6, True),
        ("dare_ties", 2, 1, 3, 3 / 1.2, False),
        ("regmean", 2, 1, 2, 2 / 0.06, True),
    ],
)
def test_a_gpu_is_faster_where_cpus_are_slower_than_storage(
    tmp_path: Path, method: str, cpus: int, points: int, storage: float, computing: float, faster: bool
) -> None:
    plan = planned(method, tmp_path, points, cpus=cpus)
    found = merging(plan.tasks((), 1), plan.job.workers)
    assert found is not None and found.gpu_is_faster == faster
    parent = plan.merges[0].layout.bytes / 1e9
    assert (found.storage / parent, found.cpus / parent) == pytest.approx((storage, computing), rel=0.02)


def test_nothing_to_merge_needs_no_device(tmp_path: Path) -> None:
    plan = planned("linear", tmp_path, 1)
    assert merging(plan.tasks(plan.units, 1), plan.job.workers) is None


def test_a_job_that_writes_no_points_has_no_line_on_devices(tmp_path: Path) -> None:
    plan = planned("linear", tmp_path, 1)
    assert plan_facts(plan)["device"] is not None
    assert plan_facts(replace(plan, job=replace(plan.job, keep=Keep(kind="none"))))["device"] is None
