"""A point in few launches, on CPU tensors by Triton's interpreter: bit for bit the one that CPUs merge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from orchestrator.planning.plan import Plan
from tests.orchestrator.models import weights, write_model
from tests.workers.merging.test_resident import WITHOUT_STATISTICS, planned, same_bytes
from workers.merging.resident import ResidentParents
from workers.methods import launching
from workers.methods.gpu_kernels import launch
from workers.methods.gpu_kernels.language import interprets
from workers.methods.gpu_kernels.rows import BLOCK

pytestmark = pytest.mark.skipif(not interprets(), reason="Triton is not interpreted here; `make triton` does")

STAND_IN = "cpu:0"
"""A device of torch that is no "cpu" for a merge, and needs no GPU."""


@pytest.fixture(autouse=True)
def enough_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a device that does not say how much it has."""
    monkeypatch.setattr("workers.merging.resident.check_fits", lambda *_: None)


@pytest.fixture(scope="module")
def siblings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Siblings with tensors of several blocks and of none, integers, booleans and a tensor in float32."""
    folder = tmp_path_factory.mktemp("siblings")
    for who in ("base", "a", "b"):
        generator = torch.Generator().manual_seed(len(who) + 7 * ord(who[0]))
        odd = {
            "wide": torch.randn(2 * BLOCK + 17, generator=generator).bfloat16(),
            "empty": torch.empty(0, 4, dtype=torch.bfloat16),
            "steps": torch.arange(6).view(2, 3),
            "mask": torch.tensor([True, False]),
        }
        write_model(folder / who, {**weights(who, dtype=torch.bfloat16), **odd})
    return folder


def resident(plan: Plan, device: str) -> ResidentParents:
    return ResidentParents(
        [tensor for shard in plan.points[0].layout.shards for tensor in shard.tensors],
        {name: checkpoint.parent for name, checkpoint in plan.parents.items()},
        seed=plan.job.seed,
        numerics=plan.job.numerics,
        device=device,
    )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The programs of each launch."""
    grids: list[int] = []
    points = launch.points

    class Counted:
        def __getitem__(self, grid: tuple[int]) -> Any:
            grids.append(grid[0])
            return points[grid]

    monkeypatch.setattr(launch, "points", Counted())
    return grids


@pytest.mark.parametrize("numerics", ["float32", "mergekit"])
@pytest.mark.parametrize("method", WITHOUT_STATISTICS)
def test_every_tensor_and_digest_is_that_of_cpus(
    siblings: Path, launched: list[int], method: str, numerics: str
) -> None:
    plan = planned(siblings, method, numerics=numerics, seed="5")
    settings = plan.points[0].settings
    expected_digests: dict[str, str] = {}
    expected = dict(resident(plan, "cpu").merged(settings, expected_digests))
    digests: dict[str, str] = {}
    merged = dict(resident(plan, STAND_IN).merged(settings, digests))
    assert {name: same_bytes(merged[name], expected[name]) for name in expected} == dict.fromkeys(expected, True)
    assert [*merged] == [*expected]
    assert digests == expected_digests
    of_lines = method in ("nuslerp", "model_stock")  # vectors have one coefficient, matrices one for each line
    assert len(launched) == (0 if numerics == "mergekit" else 1 + of_lines)


def test_points_follow_each_other_into_the_memory_of_a_model(siblings: Path, launched: list[int]) -> None:
    """Other weights, another density, and the first point again: a launch each, and nothing beside the model."""
    plan = planned(siblings, "ties")
    first = plan.points[0].settings

    def changed(name: str, value: tuple[float, ...]) -> list[Any]:
        return [
            replace(each, parameters=tuple((key, value if key == name else old) for key, old in each.parameters))
            for each in first
        ]

    points = [first, changed("weight", (0.9, -0.2)), changed("density", (0.7, 0.1)), first]
    there, here = resident(plan, STAND_IN), resident(plan, "cpu")
    places = {name: torch.zeros_like(tensor) for name, tensor in here.merged(first)}
    for settings in points:
        expected = dict(here.merged(settings))
        for name, tensor in there.merged(settings, places=places):
            assert same_bytes(tensor, expected[name]), name
            assert tensor.data_ptr() == places[name].data_ptr()
    assert len(launched) == len(points)


def test_tensors_without_a_place_are_views_of_one_buffer(siblings: Path) -> None:
    plan = planned(siblings, "linear")
    merged = dict(resident(plan, STAND_IN).merged(plan.points[0].settings))
    of_dtype = {tensor.untyped_storage().data_ptr() for tensor in merged.values() if tensor.dtype == torch.bfloat16}
    assert len(of_dtype) == 1
    assert all(tensor.data_ptr() % 16 == 0 for tensor in merged.values())


def test_a_large_point_is_cut_into_several_launches(
    siblings: Path, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.merging.resident.ELEMENTS_A_LAUNCH", 2 * BLOCK)
    plan = planned(siblings, "task_arithmetic")
    expected = dict(resident(plan, "cpu").merged(plan.points[0].settings))
    merged = dict(resident(plan, STAND_IN).merged(plan.points[0].settings))
    assert all(same_bytes(merged[name], expected[name]) for name in expected)
    assert len(launched) > 1


def test_where_memory_ends_a_launch_has_fewer_tensors(
    siblings: Path, launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several tensors of more than three blocks do not fit: caches are freed, then the elements of a launch halved."""
    freed, run = list[bool](), launching.run

    def short_of_memory(works: Any, arithmetic: str) -> Tensor:
        if len(works) > 1 and sum(work.output.numel() for work in works) > 3 * BLOCK:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return run(works, arithmetic)

    monkeypatch.setattr(launching, "run", short_of_memory)
    monkeypatch.setattr("workers.merging.resident.GPU_PIECE_ELEMENTS", 1)
    monkeypatch.setattr(
        "workers.gpu_memory._card", lambda _: (SimpleNamespace(empty_cache=lambda: freed.append(True)),)
    )
    plan = planned(siblings, "task_arithmetic")
    expected = dict(resident(plan, "cpu").merged(plan.points[0].settings))
    merged = dict(resident(plan, STAND_IN).merged(plan.points[0].settings))
    assert all(same_bytes(merged[name], expected[name]) for name in expected)
    assert len(launched) > 1 and len(freed) > 2


def test_overflows_are_counted_tensor_by_tensor(tmp_path: Path) -> None:
    """10⁵ is above 65504, the largest number of float16; a parent's own infinity is no overflow."""
    large: Tensor = torch.ones(7, dtype=torch.bfloat16)
    large[:3] = 1e5
    for who in ("a", "b"):
        broken = torch.full((2,), torch.inf).bfloat16()
        write_model(tmp_path / who, {**weights(who, dtype=torch.bfloat16), "large": large, "broken": broken})
    plan = planned(tmp_path, "linear", dtype="float16")
    counted: dict[str, int] = {}
    merged = resident(plan, STAND_IN).merged(plan.points[0].settings, overflows=counted)
    assert dict(merged).keys() > {"large", "broken"}
    assert counted == {"large": 3}
