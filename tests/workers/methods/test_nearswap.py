"""nearswap against arithmetic on paper."""

from __future__ import annotations

from typing import Any

import pytest


def near(merge: Any, base: list[float], other: list[float], t: float, **more: Any) -> list[float]:
    return merge("nearswap", {"other": other}, base={"base": base}, t=t, **more).tolist()


def test_elements_at_most_t_apart_are_taken_from_the_other_model(merge: Any):
    assert near(merge, [1, -2, 0], [1.25, -2.5, 0.5], 0.5) == [1.25, -2.5, 0.5]


def test_the_further_apart_the_less_of_the_other_model(merge: Any):
    # t/|b − x| is 1/2, 1/4 and 1/8: each element moves by t towards the other model
    assert near(merge, [1, 1, 1], [2, -1, 5], 0.5) == [1.5, 0.5, 1.5]


def test_half_of_t_at_a_distance_of_t_and_more_is_never_exceeded(merge: Any):
    # 0.3/0.4 = 3/4 of the way
    assert near(merge, [2.0], [2.4], 0.3, arithmetic="F64") == pytest.approx([2.3])


@pytest.mark.parametrize("t", [0.0, -1.0])
def test_a_t_of_zero_or_less_leaves_the_base(merge: Any, t: float):
    assert near(merge, [1, -2, 3], [2, 5, 3], t) == [1, -2, 3]


def test_distances_below_a_millionth_count_as_a_millionth(merge: Any):
    # |b − x| = 2⁻²¹ ≈ 4.8e-7, so w = 2.5e-7/1e-6 = 1/4
    step = 2.0**-21
    assert near(merge, [0.0], [step], 2.5e-7, arithmetic="F64") == pytest.approx([step / 4])


def test_equal_elements_stay(merge: Any):
    assert near(merge, [0.75, -3], [0.75, -3], 1e-4) == [0.75, -3]
