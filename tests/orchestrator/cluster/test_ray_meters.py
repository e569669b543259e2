"""What Prometheus is told of a run: a real Ray of one node, read as Prometheus reads it."""

from __future__ import annotations

import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from jobs.job import load_job
from orchestrator.cluster.ray_cluster import RayCluster
from orchestrator.cluster.ray_evaluating import RayEvaluators
from orchestrator.cluster.ray_merging import RayPool
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.watching import Watcher
from tests.orchestrator.evaluating.asking import evaluate

PARENTS = Path(__file__).parents[3] / "jobs" / "examples" / "parents"
POINTS, ITEMS = 3, 4
ANSWERING = POINTS + 2 + 1
"""The points, their two parents, and the best point a second time."""

JOB = f"""\
name: grid
parents: {{long: {PARENTS}/long, fmt: {PARENTS}/fmt}}
recipe:
  merge_method: linear
  models:
    - {{model: long, parameters: {{weight: "${{w}}"}}}}
    - {{model: fmt, parameters: {{weight: "${{1 - w}}"}}}}
  dtype: bfloat16
grid: {{w: [0.25, 0.5, 0.75]}}
evaluate: {{ruler: {{tasks: [niah_single_1], lengths: [256], items: {ITEMS}}}}}
workers: {{cpus: 1, memory: 3GB, count: 1}}
output: {{output}}
"""


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    return make_plan(load_job(JOB.replace("{output}", str(tmp_path / "runs")), "job.yaml"))


@pytest.fixture
def cluster(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[RayCluster]:
    monkeypatch.setenv("HOME", str(tmp_path))  # Ray keeps its token there
    monkeypatch.setenv("RAY_metrics_report_interval_ms", "500")  # 10 s otherwise
    with closing(RayCluster(plan.job.workers)) as cluster:
        yield cluster


def told() -> dict[str, float]:
    """Our metrics as they are now, summed over what is not said of the work."""
    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(address, timeout=10) as answer:
        families = text_string_to_metric_families(answer.read().decode())
    found: dict[str, float] = {}
    for sample in (sample for family in families for sample in family.samples if "mergeyard" in sample.name):
        assert sample.labels["SessionName"]  # what the dashboard chooses by
        name = f"{sample.name}{{{sample.labels['work']}}}" if "work" in sample.labels else sample.name
        found[name] = found.get(name, 0) + sample.value
    return found


@pytest.mark.heavy
def test_what_a_run_did_is_what_prometheus_reads(plan: Plan, cluster: RayCluster, tmp_path: Path) -> None:
    pool = RayPool(cluster)
    tasks = plan.tasks((), pool.workers)
    with Watcher(visible=False) as watcher:
        result = drive(plan, pool, watcher)
        evaluate(plan, lambda models: RayEvaluators(models, cluster), watcher)
    scores = [pq.read_table(path, columns=["tokens"]) for path in (tmp_path / "runs").glob("grid/scores/**/*.parquet")]
    expected = {
        "ray_mergeyard_bytes_read_total": result.bytes_read,
        "ray_mergeyard_bytes_written_total": sum(task.bytes_written for task in tasks),
        "ray_mergeyard_points_total": POINTS,
        "ray_mergeyard_tasks_total{merge}": len(tasks),
        "ray_mergeyard_tasks_total{evaluate}": ANSWERING,
        "ray_mergeyard_items_total": ANSWERING * ITEMS,
        "ray_mergeyard_tokens_total": sum(sum(table["tokens"].to_pylist()) for table in scores),
    }
    deadline = time.monotonic() + 30
    while (now := told()) != expected and time.monotonic() < deadline:
        time.sleep(0.5)
    assert now == expected
