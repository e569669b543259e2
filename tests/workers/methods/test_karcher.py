"""karcher against geometry on the circle and the sphere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch


def karcher(merge: Any, *models: list[float], **more: Any) -> list[float]:
    parents = {f"m{place}": torch.tensor(each, dtype=torch.float64) for place, each in enumerate(models)}
    return merge("karcher", parents, arithmetic="F64", **more).tolist()


def on_circle(degrees: float, length: float = 1.0) -> list[float]:
    return [length * math.cos(math.radians(degrees)), length * math.sin(math.radians(degrees))]


def test_on_a_circle_the_angles_are_averaged(merge: Any):
    # 0°, 10° and 50°: 20°, where the mean vector would lie at 19.8°; the lengths 1, 2 and 6: 3
    merged = karcher(merge, on_circle(0), on_circle(10, 2), on_circle(50, 6))
    assert merged == pytest.approx(on_circle(20, 3), abs=1e-9)


def test_without_steps_it_is_the_direction_of_the_mean_unit_vector(merge: Any):
    units = torch.tensor([on_circle(0), on_circle(10), on_circle(50)]).sum(dim=0)
    merged = karcher(merge, on_circle(0), on_circle(10, 2), on_circle(50, 6), max_iter=0)
    assert merged == pytest.approx((3 * units / units.norm()).tolist())


def test_a_wide_tolerance_stops_the_steps(merge: Any):
    models = on_circle(0), on_circle(10), on_circle(50)
    assert karcher(merge, *models, tol=0.1) == karcher(merge, *models, max_iter=0)
    assert karcher(merge, *models, max_iter=1) == pytest.approx(karcher(merge, *models), abs=1e-9)


def test_the_steps_of_the_mean_point_sum_to_zero(merge: Any):
    # the mean of points of a sphere is where their logarithms cancel
    generator = torch.Generator().manual_seed(5)
    models = 1 + torch.randn(4, 6, generator=generator, dtype=torch.float64)
    units = models / models.norm(dim=1, keepdim=True)
    merged = torch.tensor(karcher(merge, *models.tolist(), tol=1e-9, max_iter=50), dtype=torch.float64)
    assert float(merged.norm()) == pytest.approx(float(models.norm(dim=1).mean()))
    mean = merged / merged.norm()
    angles = (units @ mean).acos()
    logarithms = (angles / angles.sin()).unsqueeze(1) * (units - (units @ mean).unsqueeze(1) * mean)
    assert float(logarithms.sum(dim=0).norm()) < 1e-7


def test_siblings_of_a_tiny_angle_are_averaged(merge: Any):
    # a cosine of 1 − 5·10⁻¹¹
    assert karcher(merge, [1, 0], [1, 1e-5]) == pytest.approx([1, 5e-6], rel=1e-9)


def test_a_model_of_no_length_counts_among_the_lengths_alone(merge: Any):
    assert karcher(merge, [3, 0], [0, 6], [0, 0]) == pytest.approx([3 * math.sqrt(0.5)] * 2)
    assert karcher(merge, [3, 0], [0, 9e-6]) == pytest.approx([1.5 + 4.5e-6, 0])
    assert karcher(merge, [3, 0], [0, 9e-6], tol=1e-9, max_iter=0) == pytest.approx(
        [1.5 * math.sqrt(0.5)] * 2, rel=1e-5
    )
    assert karcher(merge, [0, 0], [1e-6, 0]) == [0, 0]


@pytest.mark.parametrize("factor", [1, 2, 3, 0.7])
def test_opposite_models_have_the_direction_of_the_first(merge: Any, factor: float):
    model = [0.1, -0.7, 1.3]
    merged = karcher(merge, model, [-factor * value for value in model])
    assert merged == pytest.approx([(1 + factor) / 2 * value for value in model])


def test_one_model_is_returned_as_it_is(merge: Any):
    assert karcher(merge, [2, 3]) == [2, 3]


def test_the_angle_is_that_of_the_whole_tensor_not_of_a_tile(merge: Any, small_tiles: int):
    # two tiles, orthogonal in the first, equal in the second: the mean of two is their sum's direction
    start, end = [1.0] * 32, [(-1.0) ** place for place in range(16)] + [1.0] * 16
    factor = math.sqrt(32) / math.sqrt(16 * 2 + 16 * 4)
    merged = karcher(merge, start, end)
    assert merged == pytest.approx([factor * (a + b) for a, b in zip(start, end, strict=True)], abs=1e-12)
