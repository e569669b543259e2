"""slerp against trigonometry on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch


def slerp(merge: Any, start: list[float], end: list[float], t: float) -> list[float]:
    ends = {name: torch.tensor(values, dtype=torch.float64) for name, values in (("a", start), ("b", end))}
    return merge("slerp", ends, base={"a": ends["a"]}, t=t, arithmetic="F64").tolist()


def test_half_way_between_orthogonal_vectors(merge: Any):
    # sin 45° / sin 90° of each
    assert slerp(merge, [1, 0], [0, 1], 0.5) == pytest.approx([math.sqrt(0.5), math.sqrt(0.5)])


def test_the_lengths_of_the_vectors_stay_in(merge: Any):
    # 60° apart, a third of the way: sin 40°/sin 60° of [2, 0] and sin 20°/sin 60° of [1, √3]
    first, second = math.sin(math.radians(40)), math.sin(math.radians(20))
    expected = [(2 * first + second) / math.sin(math.radians(60)), 2 * second]
    assert slerp(merge, [2, 0], [1, math.sqrt(3)], 1 / 3) == pytest.approx(expected)


@pytest.mark.parametrize("t", [0.0, 1.0])
def test_both_ends_are_the_models_themselves(merge: Any, t: float):
    assert slerp(merge, [3, 1, 2], [-1, 4, 0], t) == pytest.approx([-1, 4, 0] if t else [3, 1, 2], abs=1e-15)


def test_nearly_parallel_vectors_are_interpolated_linearly(merge: Any):
    # cos = 1/√(1 + 0.03²) = 0.99955: a quarter of the way is 0.25 · 0.03
    assert slerp(merge, [1, 0], [1, 0.03], 0.25) == [1, 0.25 * 0.03]


def test_a_cosine_just_below_the_threshold_is_an_arc(merge: Any):
    # cos = 1/√(1 + 0.032²) = 0.999488
    angle = math.atan(0.032)
    assert slerp(merge, [1, 0], [1, 0.032], 0.25)[1] == pytest.approx(
        math.sin(0.25 * angle) / math.sin(angle) * 0.032, rel=1e-12
    )
    assert slerp(merge, [1, 0], [1, 0.032], 0.25)[1] != 0.25 * 0.032


def test_opposite_vectors_are_interpolated_linearly(merge: Any):
    # ¾ v − ¼ v
    assert slerp(merge, [2, -4], [-2, 4], 0.25) == [1, -2]


def test_a_zero_vector_counts_as_orthogonal(merge: Any):
    # its norm is left as it is, so the cosine is 0 and the other end gets sin 45°
    assert slerp(merge, [0, 0], [3, 4], 0.5) == pytest.approx([3 * math.sqrt(0.5), 4 * math.sqrt(0.5)])
    assert slerp(merge, [0, 0], [0, 0], 0.5) == [0, 0]


def test_the_base_is_the_start_wherever_it_is_listed(merge: Any):
    models = {"b": [0.0, 1.0], "a": [1.0, 0.0]}
    merged = merge("slerp", models, base={"a": models["a"]}, t=0.25, arithmetic="F64").tolist()
    assert merged == slerp(merge, [1, 0], [0, 1], 0.25)
    assert merged == pytest.approx([math.sin(math.radians(67.5)), math.sin(math.radians(22.5))])


def test_the_angle_is_that_of_the_whole_tensor_not_of_a_tile(merge: Any, small_tiles: int):
    # two tiles, orthogonal within the first, equal in the second: cos = 16/32
    start = [1.0] * small_tiles + [1.0] * small_tiles
    end = [(-1.0) ** i for i in range(small_tiles)] + [1.0] * small_tiles
    merged = slerp(merge, start, end, 0.5)
    share = math.sin(math.radians(30)) / math.sin(math.radians(60))
    assert merged == pytest.approx([share * (a + b) for a, b in zip(start, end, strict=True)])
