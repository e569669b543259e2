"""ram and ramplus_tl against arithmetic on paper."""

from __future__ import annotations

from typing import Any

import pytest

BASE = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]
DELTAS = {
    "x": [3.0, 3.0, 3.0, 0.0, 0.0, 0.0],
    "y": [0.0, 1.0, -1.0, 2.0, 0.5, 0.0],
    "z": [0.0, 0.0, 1.0, 0.0, 0.0, 0.0],
}


def merged(merge: Any, method: str, models: str = "xyz", **more: Any) -> list[float]:
    parents = {name: [1 + delta for delta in DELTAS[name]] for name in models}
    return merge(method, parents, base={"base": BASE}, **more).tolist()


def test_lone_changes_are_whole_and_shared_ones_are_averaged(merge: Any):
    assert merged(merge, "ram") == pytest.approx([1 + 3, 1 + 2, 1 + 1, 1 + 2, 1.5, 1])


def test_a_change_must_exceed_epsilon(merge: Any):
    # of y 1, −1 and ½ do not count, nor does the 1 of z
    assert merged(merge, "ram", epsilon=1.0) == pytest.approx([4, 4, 4, 3, 1, 1])
    assert merged(merge, "ram", epsilon=0.99) == pytest.approx([4, 3, 2, 3, 1, 1])


def test_a_negative_epsilon_averages_over_all(merge: Any):
    assert merged(merge, "ram", "xy", epsilon=-1.0) == pytest.approx([2.5, 3, 2, 2, 1.25, 1])


@pytest.mark.parametrize("units", [1, 3])
def test_lone_changes_grow_with_what_a_model_shares(merge: Any, units: int):
    # x shares 2 and has 1 alone: ρ = 2, at most α; y shares 2 and has 2 alone: ρ = 1; z has nothing alone
    grown = merged(merge, "ramplus_tl", r=0.5, alpha=1.5, units=units)
    assert grown == pytest.approx([1 + 3 * 1.75, 3, 2, 1 + 2 * 1.5, 1 + 0.5 * 1.5, 1])


def test_the_defaults_add_at_most_a_fiftieth(merge: Any):
    assert merged(merge, "ramplus_tl") == pytest.approx([1 + 3 * 1.02, 3, 2, 1 + 2 * 1.02, 1 + 0.5 * 1.02, 1])


@pytest.mark.parametrize("units", [1, 3])
def test_the_whole_tensor_is_counted_not_a_tile(merge: Any, small_tiles: int, units: int):
    # x changes all 70 elements in five tiles, y the first 35: ρ of x is 1
    models = {"x": [2.0] * 70, "y": [4.0] * 35 + [0.0] * 35}
    grown = merge("ramplus_tl", models, base={"base": [0.0] * 70}, r=0.5, alpha=3.0, units=units).tolist()
    assert grown == pytest.approx([3.0] * 35 + [3.0] * 35)


def test_without_lone_changes_nothing_grows(merge: Any):
    same = {"x": [2.0, 4.0], "y": [4.0, 2.0]}
    assert merge("ramplus_tl", same, base={"base": [0.0, 0.0]}, epsilon=0.0).tolist() == [3, 3]
