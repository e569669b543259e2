"""Points of one training run share tasks although their parents differ, and each of them is the merge it is alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jobs.job import load_job
from orchestrator.cluster.in_process import InProcessPool
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.sharing import families
from orchestrator.watching import Watcher
from tests.orchestrator.models import shapes, weights, write_model
from tests.orchestrator.trajectories import WINDOWS, trajectory_job, write_run

COUNT = 6
CHECKPOINT_BYTES = sum(4 * torch.Size(shape).numel() for shape in shapes().values())
SLIDING = WINDOWS.replace("step[-${k}:]", "step[${k}:${k + 3}]").replace("${shape}", "uniform")


@pytest.fixture
def planned(tmp_path: Path) -> Callable[..., Plan]:
    """planned(grid, recipe, more): the plan of a job over the windows of six checkpoints."""
    write_run(tmp_path, COUNT)

    def make(grid: str, recipe: str = WINDOWS, more: str = "", output: str = "runs") -> Plan:
        text = trajectory_job(str(tmp_path), COUNT, str(tmp_path / output), grid=grid, recipe=recipe, more=more)
        return make_plan(load_job(text, "job.yaml"))

    return make


@pytest.mark.parametrize(
    ("grid", "recipe", "checkpoints"),
    [
        ("{k: [1, 2, 4], shape: [uniform, cosine, ema]}", WINDOWS, 4),
        ("{shape: [uniform, cosine], k: [6, 1]}", WINDOWS, 6),
        ("{k: [0, 1, 2, 3]}", SLIDING, 6),
        ("{k: [0, 3, 2]}", SLIDING, 6),
    ],
)
def test_all_windows_read_each_checkpoint_once(planned: Callable[..., Plan], grid: str, recipe: str, checkpoints: int):
    plan = planned(grid, recipe)
    tasks = plan.tasks([], 1)
    assert len(tasks) == 1 and len(tasks[0].points) == len(plan.merges)
    assert sum(task.bytes_read for task in tasks) == checkpoints * CHECKPOINT_BYTES
    assert len(plan.parents) == checkpoints


def test_several_workers_get_windows_of_few_checkpoints(planned: Callable[..., Plan]):
    tasks = planned("{shape: [uniform, cosine], k: [2, 6]}").tasks([], 2)
    assert sorted(task.bytes_read // CHECKPOINT_BYTES for task in tasks) == [2, 6]


def test_with_little_memory_a_task_reads_few_checkpoints(planned: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch):
    plan = planned("{k: [0, 1, 2, 3]}", SLIDING)
    monkeypatch.setattr(Plan, "most_parents_a_task", 4)
    assert sorted(len(task.parents) for task in plan.tasks([], 1)) == [4, 4]


def test_a_point_of_a_shared_task_is_the_merge_that_it_is_alone(planned: Callable[..., Plan]):
    together = planned("{k: [2, 4], shape: [uniform, cosine]}")
    alone = planned("{k: [2], shape: [cosine]}", output="alone", more="point: k{k}_shape={shape}\n")
    point = next(each for each in together.points if each.name == alone.points[0].name)
    assert (point.digest, point.units) == (alone.points[0].digest, alone.points[0].units)
    results = [drive(plan, InProcessPool(), Watcher(visible=False)) for plan in (together, alone)]
    assert len({result.points[point.name].weights for result in results}) == 1


def test_checkpoints_of_another_kind_are_read_apart(planned: Callable[..., Plan], tmp_path: Path):
    half = weights("base", dtype=torch.bfloat16)
    write_model(tmp_path / "step-6", half)  # so that a window with it is stored in another dtype than one without
    plan = planned("{k: [0, 3]}", SLIDING)
    layouts = {point.layout for point in plan.points}
    assert len(layouts) == 2
    assert all(len(family.layouts) == 1 for family in families(layouts, 100).values())
