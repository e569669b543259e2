"""A grid on several nodes comes to the same bytes, whatever happens to them. `make chaos` tries and prints far more."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from jobs.evaluation import ScoreRow
from tests.chaos.__main__ import strike
from tests.chaos.cluster import BUCKET, started
from tests.chaos.faults import FAULTS, Fault
from tests.chaos.network import why_not
from tests.chaos.yard import Yard
from workers.scores import read_scores

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are namespaces")]

REISSUED_SECONDS = 20.0
HERE = ("node killed", "link cut for good", "parted from the head, not from the store", "node frozen, later thawed")


@pytest.fixture(scope="module")
def yard() -> Iterator[Yard]:
    with started(2, megabits=10) as cluster:
        yield Yard(cluster, seed=0)


@pytest.fixture(autouse=True)
def repaired(yard: Yard) -> None:
    yard.cluster.repair()


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault.name in HERE], ids=lambda fault: fault.name)
def test_a_lost_node_costs_twenty_seconds_and_no_byte(yard: Yard, fault: Fault) -> None:
    again = strike(yard, yard.trial(), fault, seconds=[])
    assert again < REISSUED_SECONDS


def test_a_job_that_asks_for_one_worker_is_given_one(yard: Yard) -> None:
    trial = yard.trial()
    trial.job.write_text(trial.job.read_text().replace("memory: 2GB", "memory: 2GB, count: 1"))
    command = trial.start()
    seen: set[tuple[str, ...]] = set()
    while command.process.poll() is None:
        seen.add(tuple(yard.cluster.busy()))
        time.sleep(0.1)
    yard.check(trial, command.ended())
    assert seen - {()} and max(len(nodes) for nodes in seen) == 1


def test_more_points_read_no_more_of_a_parent(yard: Yard) -> None:
    read: list[dict[str, int]] = []
    for step in (0.5, 0.1):
        trial = yard.trial()
        trial.job.write_text(trial.job.read_text().replace("step: 0.1", f"step: {step}"))
        before = yard.cluster.proxy.sent.copy()
        trial.start()
        assert trial.finish().code == 0
        sent = yard.cluster.proxy.sent - before
        read.append({path: size for path, size in sent.items() if path.endswith("/model.safetensors")})
    few, many = read
    assert len(few) == 2
    assert few == many


def test_a_node_lost_in_an_evaluation_changes_no_score(yard: Yard) -> None:
    job = yard.cluster.folder / "soup.yaml"
    document: dict[str, Any] = {
        "name": "soup",
        "parents": {name: f"s3://{BUCKET}/parents/{name}" for name in ("long", "fmt")},
        "recipe": {
            "merge_method": "linear",
            "dtype": "bfloat16",
            "models": [
                {"model": "long", "parameters": {"weight": "${w}"}},
                {"model": "fmt", "parameters": {"weight": "${1 - w}"}},
            ],
        },
        "grid": {"w": [0.5, 0.7, 0.9, 1]},
        "point": "w{w}",
        "evaluate": {"ruler": {"tasks": ["niah_single_1"], "lengths": [256, 512], "items": 48}},
        "keep": "none",
        "workers": {"cpus": 1, "memory": "1200MB"},
    }

    def write(output: str) -> None:
        lines = {**document, "output": f"s3://{BUCKET}/{output}"}.items()
        job.write_text("".join(f"{key}: {json.dumps(value)}\n" for key, value in lines))

    cluster = yard.cluster
    write("evaluated")
    command = cluster.run(job)
    command.until(lambda: all(cluster.pids(node, "ray::_RemoteEva") for node in cluster.nodes))
    command.until(lambda: len(yard.keys("evaluated/soup/scores/")) >= 2)
    cluster.network.cut("node1")
    scattered = command.ended()
    write("alone")
    alone = cluster.command("run", job, "--in-process", "--json").ended()
    assert rows(yard, scattered.facts) == rows(yard, alone.facts)
    assert len(rows(yard, alone.facts)) == (4 + 1) * 2 * 48  # and a parent; the other is a point
    assert scattered.facts["leaderboard"] == alone.facts["leaderboard"]


def rows(yard: Yard, facts: dict[str, Any]) -> list[ScoreRow]:
    """The rows of a run, but for how long each took."""
    key = facts["results"].removeprefix(f"s3://{BUCKET}/")
    [found] = yard.objects(key).values()
    return [replace(row, seconds=0.0) for row in read_scores(found, key)]
