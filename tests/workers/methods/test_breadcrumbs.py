"""breadcrumbs and breadcrumbs_ties against arithmetic on paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.workers.methods.whole import tiles_of
from workers.methods.breadcrumbs import breadcrumbs_pass
from workers.methods.ranking import Cutoff, Magnitude
from workers.methods.tile import Inputs, NotYetKnown

DELTA = [5.0, -1.0, 4.0, -3.0, 2.0, -6.0, 0.5, 7.0, 8.0, -9.0]  # by magnitude: −9, 8, 7, −6, 5, 4, −3, 2, −1, ½


def left_of(merge: Any, deltas: list[float], density: float, gamma: float, **more: Any) -> list[float]:
    """What is left of one task vector."""
    base = {"base": [0.0] * len(deltas)}
    parameters = {"weight": (1.0,), "density": (density,), "gamma": (gamma,)}
    return merge("breadcrumbs", {"x": deltas}, base=base, **parameters, **more).tolist()


@pytest.mark.parametrize(
    ("density", "gamma", "kept"),
    [
        (0.5, 0.2, {7, -6, 5, 4, -3}),  # of ten the two largest go, the next five stay
        (0.5, 0.0, {-9, 8, 7, -6, 5}),
        (0.5, 0.01, {-9, 8, 7, -6, 5}),  # 0.01 · 10 is less than one element
        (0.8, 0.5, {7, -6, 5, 4, -3, 2, -1, 0.5}),  # eight must stay, so only two of the five largest go
        (0.09, 0.2, set[float]()),  # ⌊0.9⌋ = 0
        (0.09, 0.0, set[float]()),
        (1.0, 0.5, set(DELTA)),  # a density of one trims nothing at all
    ],
)
def test_the_largest_go_and_the_next_stay(merge: Any, density: float, gamma: float, kept: set[float]):
    assert left_of(merge, DELTA, density, gamma) == [value if value in kept else 0 for value in DELTA]


def test_of_equal_magnitudes_the_first_count_as_the_larger(merge: Any):
    assert left_of(merge, [1, -1, 1, -1, 1], 0.4, 0.2) == [0, -1, 1, 0, 0]


def test_rescale_restores_the_sum_of_magnitudes(merge: Any):
    # |4| + |2| + |1| + |1| = 8, of which 2 stays: 2 · 8/2
    assert left_of(merge, [4, -2, 1, 1], 0.25, 0.25, rescale=True) == [0, -8, 0, 0]


@pytest.mark.parametrize("units", [1, 3])
def test_the_whole_tensor_is_ranked_not_a_tile(merge: Any, small_tiles: int, units: int):
    # of 70 equal elements in five tiles the first 7 go and the next 35 stay
    deltas = [(-1.0) ** number for number in range(70)]
    expected = [0.0] * 7 + deltas[7:42] + [0.0] * 28
    assert left_of(merge, deltas, 0.5, 0.1, units=units) == expected


X, Y, ZERO = [4.0, -3.0, 2.0, 1.0], [-1.0, -5.0, 3.0, 2.0], {"base": [0.0] * 4}
HALVES = {"weight": (1.0, 2.0), "density": (0.5, 0.5), "gamma": (0.25, 0.25)}  # left: [0, −3, 2, 0] and [0, 0, 3, 2]


def test_the_trimmed_task_vectors_are_added(merge: Any):
    assert merge("breadcrumbs", {"x": X, "y": Y}, base=ZERO, **HALVES).tolist() == [0, -3, 8, 4]
    divided = merge("breadcrumbs", {"x": X, "y": Y}, base=ZERO, **HALVES, normalize=True, lambda_=3.0)
    assert divided.tolist() == [0, -3, 8, 4]


def test_the_other_elects_a_sign(merge: Any):
    against = {"x": X, "y": [-value for value in Y]}  # y leaves [0, 0, −3, −2], twice: the sum is [0, −3, −4, −4]
    assert merge("breadcrumbs_ties", against, base=ZERO, **HALVES).tolist() == [0, -3, -6, -4]
    assert merge("breadcrumbs_ties", against, base=ZERO, **HALVES, normalize=True).tolist() == [0, -3, -3, -2]


def test_the_cutoffs_of_all_models_are_asked_for_at_once():
    (tile,) = tiles_of(dict.fromkeys(("x", "y", "base"), torch.ones(100)), {})
    settings: dict[str, Any] = {"weight": (1.0, 1.0), "density": (0.5, 0.5), "gamma": (0.1, 0.1), "lambda_": 1.0}
    with pytest.raises(NotYetKnown) as unknown:
        breadcrumbs_pass(Inputs(tile, ("x", "y"), "base", "float32"), normalize=False, rescale=False, **settings)
    expected = [Cutoff(Magnitude(model, "base"), count, 5.0) for model in ("x", "y") for count in (60, 10)]
    assert list(unknown.value.reductions) == expected
