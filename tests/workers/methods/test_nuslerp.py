"""nuslerp against trigonometry on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch


def nuslerp(merge: Any, start: Any, end: Any, *weight: float, base: Any = None, **more: Any) -> list[float]:
    ends = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in (("a", start), ("b", end))}
    origin = None if base is None else {"base": torch.as_tensor(base, dtype=torch.float64)}
    return merge("nuslerp", ends, base=origin, weight=weight or (1, 1), arithmetic="F64", **more).tolist()


def sine(degrees: float) -> float:
    return math.sin(math.radians(degrees))


def test_the_way_is_the_share_of_the_second_weight(merge: Any):
    # 60° apart, ¼ of the way: sin 45°/sin 60° of [2, 0] and sin 15°/sin 60° of [1, √3]
    expected = [(2 * sine(45) + sine(15)) / sine(60), math.sqrt(3) * sine(15) / sine(60)]
    assert nuslerp(merge, [2, 0], [1, math.sqrt(3)], 0.6, 0.2) == pytest.approx(expected)


def test_weights_that_cancel_meet_half_way(merge: Any):
    assert nuslerp(merge, [1, 0], [0, 1], 1, -1) == pytest.approx([math.sqrt(0.5)] * 2)
    assert nuslerp(merge, [1, 0], [0, 1], 4e-7, 5e-7) == pytest.approx([math.sqrt(0.5)] * 2)


def test_a_negative_weight_goes_beyond_an_end(merge: Any):
    # t = −1 of 60°: sin 120°/sin 60° of the first, sin(−60°)/sin 60° of the second
    assert nuslerp(merge, [1, 0], [0.5, sine(60)], 2, -1) == pytest.approx([1 - 0.5, -sine(60)])


def test_siblings_stay_on_the_arc(merge: Any):
    # slerp is linear at this angle; nuslerp is not
    angle = math.atan(0.01)
    second = nuslerp(merge, [1, 0], [1, 0.01], 3, 1)[1]
    assert second == pytest.approx(math.sin(angle / 4) / math.sin(angle) * 0.01, rel=1e-12)
    assert second != 0.0025


@pytest.mark.parametrize("factor", [2.0, -3.0, 0.7])
def test_vectors_of_one_line_are_interpolated_linearly(merge: Any, factor: float):
    values = [0.1, -0.7, 1.3]
    merged = nuslerp(merge, values, [factor * value for value in values], 3, 1)
    assert merged == pytest.approx([(0.75 + 0.25 * factor) * value for value in values])


def test_zero_counts_as_orthogonal(merge: Any):
    assert nuslerp(merge, [0, 0], [3, 4]) == pytest.approx([3 * math.sqrt(0.5), 4 * math.sqrt(0.5)])


def test_with_a_base_task_vectors_turn_around_it(merge: Any):
    assert nuslerp(merge, [6, 7], [5, 8], base=[5, 7]) == pytest.approx([5 + math.sqrt(0.5), 7 + math.sqrt(0.5)])


MATRIX = [[1.0, 0, 0], [0, 2.0, 0]], [[0.0, 1, 0], [0, 4.0, 0]]
ROOT = math.sqrt(0.5)


def test_the_last_axis_by_itself(merge: Any, small_tiles: int):
    # the first rows are orthogonal, the second point the same way
    merged = nuslerp(merge, *MATRIX, nuslerp_flatten=False)
    assert merged == pytest.approx([ROOT, ROOT, 0, 0, 3, 0])


def test_row_wise_is_the_first_axis(merge: Any):
    # columns (1, 0) and 0, (0, 2) and (1, 4), 0 and 0
    cosine = 4 / math.sqrt(17)
    share = math.sin(math.acos(cosine) / 2) / math.sin(math.acos(cosine))
    merged = nuslerp(merge, *MATRIX, nuslerp_flatten=False, nuslerp_row_wise=True)
    assert merged == pytest.approx([ROOT, share, 0, 0, 6 * share, 0])


def test_flatten_wins_over_row_wise(merge: Any):
    cosine = 8 / math.sqrt(5 * 17)
    share = math.sin(math.acos(cosine) / 2) / math.sin(math.acos(cosine))
    merged = nuslerp(merge, *MATRIX, nuslerp_row_wise=True)
    assert merged == pytest.approx([share, share, 0, 0, 6 * share, 0])


@pytest.mark.parametrize("row_wise", [False, True])
@pytest.mark.parametrize("units", [1, 2, 9])
def test_lines_across_tiles_have_one_angle(merge: Any, small_tiles: int, row_wise: bool, units: int):
    # 3 × 7 × 5 over tiles of 16: each vector against the sines of its own angle
    generator = torch.Generator().manual_seed(3)
    a, b, base = torch.randn(3, 3, 7, 5, generator=generator, dtype=torch.float64)
    axis = 0 if row_wise else -1
    cosine = torch.cosine_similarity(a - base, b - base, dim=axis).unsqueeze(axis)
    angle = cosine.acos()
    expected = base + ((0.75 * angle).sin() * (a - base) + (0.25 * angle).sin() * (b - base)) / angle.sin()
    merged = nuslerp(merge, a, b, 3, 1, base=base, nuslerp_flatten=False, nuslerp_row_wise=row_wise, units=units)
    assert merged == pytest.approx(expected.flatten().tolist(), rel=1e-9)


def test_in_mergekits_order_siblings_in_bfloat16_are_linear(merge: Any):
    # a cosine of 0.99995 rounds to 1
    ends = {"a": [1.0, 0.0], "b": [1.0, 0.01]}
    merged = merge("nuslerp", ends, weight=(3.0, 1.0), arithmetic="BF16", numerics="mergekit")
    assert merged.tolist() == [1, float(0.25 * torch.tensor(0.01, dtype=torch.bfloat16))]
