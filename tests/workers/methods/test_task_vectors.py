"""task_arithmetic, ties and dare against arithmetic on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from jobs.merge_tasks import Setting
from tests.workers.methods.whole import answered, change_tiles, tiles_of
from workers.merging.tiles import merge_tile

ZERO = {"base": [0.0, 0.0, 0.0, 0.0]}
X, Y = [4.0, -3.0, 2.0, 1.0], [-1.0, -5.0, 3.0, 0.0]


# ---- task arithmetic


def add(merge: Any, **parameters: Any) -> list[float]:
    base, x, y = [1.0, 1.0, 1.0], [2.0, 1.0, 0.0], [1.0, 3.0, 1.0]  # δx = [1, 0, −1], δy = [0, 2, 0]
    return merge("task_arithmetic", {"x": x, "y": y}, base={"base": base}, **parameters).tolist()


def test_weighted_task_vectors_are_added_to_the_base(merge: Any):
    assert add(merge, weight=(0.5, 0.25)) == [1.5, 1.5, 0.5]


def test_lambda_scales_the_sum(merge: Any):
    assert add(merge, weight=(0.5, 0.25), lambda_=2.0) == [2, 2, 0]


def test_lambda_comes_after_normalize(merge: Any):
    # (½ δx + ½ δy·3)/2 · 4 with weights ½ and 1½: δx is [1, 0, −1], δy [0, 2, 0]
    assert add(merge, weight=(0.5, 1.5), normalize=True, lambda_=4.0) == [2, 7, 0]


def test_weights_that_sum_to_zero_are_not_divided_by(merge: Any):
    assert add(merge, weight=(1.0, -1.0), normalize=True) == [2, -1, 0]


def test_negative_weights_take_away(merge: Any):
    assert add(merge, weight=(-1.0, 0.0)) == [0, 1, 2]


# ---- ties: trim


def trimmed(merge: Any, deltas: list[float], density: float, **more: Any) -> list[float]:
    """What TIES leaves of one task vector."""
    base = {"base": [0.0] * len(deltas)}
    return merge("ties", {"x": deltas}, base=base, weight=(1.0,), density=(density,), **more).tolist()


def test_the_largest_magnitudes_stay(merge: Any):
    assert trimmed(merge, X, 0.5) == [4, -3, 0, 0]


def test_of_equal_magnitudes_the_first_stay(merge: Any):
    assert trimmed(merge, [1, -1, 1, 1, -1], 0.6) == [1, -1, 1, 0, 0]
    assert trimmed(merge, [1, 2, -1, 1, -2], 0.6) == [1, 2, 0, 0, -2]


@pytest.mark.parametrize(("elements", "density", "kept"), [(5, 0.5, 2), (5, 0.79, 3), (100, 0.29, 28), (10, 0.3, 3)])
def test_the_number_kept_is_the_floor_of_density_times_elements(merge: Any, elements: int, density: float, kept: int):
    # 0.29 · 100 is 28.999… in floating point, and mergekit keeps 28
    left = trimmed(merge, [float(number) for number in range(1, elements + 1)], density)
    assert [value for value in left if value] == list(range(elements - kept + 1, elements + 1))


def test_at_least_one_element_is_kept(merge: Any):
    assert trimmed(merge, [1, -3, 2], 0.3) == [0, -3, 0]


def test_density_one_trims_nothing(merge: Any):
    assert trimmed(merge, X, 1.0) == X


def test_rescale_restores_the_sum_of_magnitudes(merge: Any):
    # |3| + |1| = 4 of which 3 stay: 3 · 4/3
    assert trimmed(merge, [3, 1], 0.5, rescale=True) == pytest.approx([4, 0])


def test_a_task_vector_of_zeros_is_not_rescaled(merge: Any):
    assert trimmed(merge, [0, 0, 0], 0.5, rescale=True) == [0, 0, 0]


@pytest.mark.parametrize("units", [1, 3])
def test_trimming_looks_at_the_whole_tensor_not_at_a_tile(merge: Any, small_tiles: int, units: int):
    # 70 elements in five tiles, all of magnitude 1 but two: the first 34 of the equal ones stay beside the two
    deltas = [(-1.0) ** number for number in range(70)]
    deltas[50], deltas[69] = 2.0, -2.0
    base = {"base": [0.0] * 70}
    left = merge("ties", {"x": deltas}, base=base, weight=(1.0,), density=(36 / 70,), units=units).tolist()
    assert left == deltas[:34] + [0.0] * 16 + [2.0] + [0.0] * 18 + [-2.0]


# ---- ties: elect and merge


def ties(merge: Any, **parameters: Any) -> list[float]:
    return merge("ties", {"x": X, "y": Y}, base=ZERO, **parameters).tolist()


def test_what_agrees_with_the_elected_sign_is_averaged(merge: Any):
    # trimmed: [4, −3, 0, 0] and [0, −5, 3, 0]; alone, both, alone, nobody
    assert ties(merge, weight=(1.0, 1.0), density=(0.5, 0.5)) == [4, -4, 3, 0]


def test_the_average_is_weighted(merge: Any):
    # votes [1, −¾, 0, 0] and [0, −3¾, 2¼, 0]; divisors ¼, 1, ¾ and, where nobody agrees, 1
    assert ties(merge, weight=(0.25, 0.75), density=(0.5, 0.5)) == [4, -4.5, 3, 0]


def test_without_normalize_the_votes_are_added(merge: Any):
    assert ties(merge, weight=(1.0, 1.0), density=(0.5, 0.5), normalize=False) == [4, -8, 3, 0]


def test_lambda_scales_what_was_merged(merge: Any):
    assert ties(merge, weight=(1.0, 1.0), density=(0.5, 0.5), lambda_=0.5) == [2, -2, 1.5, 0]


def test_the_base_is_added(merge: Any):
    base = {"base": [10.0, 10.0, 10.0, 10.0]}
    models = {"x": [14.0, 7.0, 12.0, 11.0], "y": [9.0, 5.0, 13.0, 10.0]}
    assert merge("ties", models, base=base, weight=(1.0, 1.0), density=(0.5, 0.5)).tolist() == [14, 6, 13, 10]


def elected(merge: Any, x: float, y: float, weight: tuple[float, float] = (1.0, 1.0)) -> float:
    return float(merge("ties", {"x": [x], "y": [y]}, base={"base": [0.0]}, weight=weight))


def test_the_larger_sum_elects_the_sign(merge: Any):
    assert elected(merge, 2, -3) == -3
    assert elected(merge, 2, -3, weight=(0.8, 0.2)) == 2


def test_a_sum_of_zero_elects_the_positive(merge: Any):
    assert elected(merge, 2, -2) == 2


def test_a_zero_agrees_with_nobody(merge: Any):
    assert elected(merge, 2, 0) == 2
    assert elected(merge, 0, -2) == -2
    assert elected(merge, 0, 0) == 0


def test_a_negative_weight_votes_against_its_model(merge: Any):
    # votes −2 and −1, both agree; the weights −1 + 1 sum to 0, so nothing is divided
    assert elected(merge, 2, -1, weight=(-1.0, 1.0)) == -3


# ---- dare


NOISE = torch.randn(5000, generator=torch.Generator().manual_seed(3))
FLAT = {"base": torch.zeros(5000)}


def kept(merge: Any, density: float, *, method: str = "dare_linear", model: str = "x", **more: Any) -> torch.Tensor:
    """Which elements stay."""
    merged = merge(
        method, {model: torch.ones(5000)}, base=FLAT, weight=(1.0,), density=(density,), rescale=False, **more
    )
    assert set(merged.tolist()) <= {0.0, 1.0}
    return merged.bool()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_the_coin_keeps_the_share_it_was_asked_for(merge: Any, density: float):
    sigma = math.sqrt(5000 * density * (1 - density))
    assert abs(int(kept(merge, density).sum()) - 5000 * density) < 4 * sigma


def test_a_smaller_density_keeps_a_part_of_what_a_larger_one_keeps(merge: Any):
    masks = [kept(merge, density) for density in (0.1, 0.4, 0.7)]
    assert not (masks[0] & ~masks[1]).any()
    assert not (masks[1] & ~masks[2]).any()


@pytest.mark.parametrize("other", [{"seed": 1}, {"model": "y"}, {"tensor": "z"}, {"method": "dare_ties"}])
def test_seed_model_tensor_and_method_have_coins_of_their_own(merge: Any, other: dict[str, Any]):
    same = kept(merge, 0.5) == kept(merge, 0.5, **other)
    assert abs(int(same.sum()) - 2500) < 4 * math.sqrt(5000 / 4)


def test_the_coins_do_not_depend_on_the_tiling(merge: Any, monkeypatch: pytest.MonkeyPatch):
    whole = kept(merge, 0.3)
    for elements in (16, 64, 1024):
        change_tiles(monkeypatch, elements)
        assert torch.equal(kept(merge, 0.3), whole)
        assert torch.equal(kept(merge, 0.3, units=3), whole)


def test_neighbouring_elements_have_independent_coins(merge: Any):
    mask = kept(merge, 0.5).double() - 0.5
    for lag in (1, 2, 7, 8):
        assert abs(float((mask[lag:] * mask[:-lag]).sum()) * 4) < 4 * math.sqrt(5000)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties"])
def test_dare_rescales_by_the_sum_of_magnitudes(merge: Any, method: str):
    # mergekit's ‖δ‖₁/‖kept δ‖₁, where the paper divides by the density
    parameters: dict[str, Any] = {"base": FLAT, "weight": (1.0,), "density": (0.3,)}
    plain = merge(method, {"x": NOISE}, rescale=False, **parameters)
    scaled = merge(method, {"x": NOISE}, **parameters)
    factor = float(NOISE.double().abs().sum() / plain.double().abs().sum())
    assert torch.allclose(scaled, plain * factor, rtol=1e-6)
    assert torch.equal(plain, NOISE * kept(merge, 0.3, method=method))


def test_dare_ties_elects_among_what_was_kept(merge: Any):
    x, y = NOISE, NOISE.flip(0) * 2
    x_kept = x * kept(merge, 0.5, method="dare_ties", model="x")
    y_kept = y * kept(merge, 0.5, method="dare_ties", model="y")
    total = x_kept * 0.5 + y_kept * 0.25
    sign = torch.where(total >= 0, 1.0, -1.0)
    expected = x_kept * 0.5 * (x_kept.sign() == sign) + y_kept * 0.25 * (y_kept.sign() == sign)
    merged = merge("dare_ties", {"x": x, "y": y}, base=FLAT, weight=(0.5, 0.25), density=(0.5, 0.5), rescale=False)
    assert torch.equal(merged, expected)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "breadcrumbs"])
def test_mergekits_numerics_round_every_step_of_a_trimmed_task_vector(method: str):
    # in bfloat16 0.7 is 0.69921875, and 0.69921875 · 1.1015625 = 0.7702… is rounded to 0.76953125
    parents = {"base": torch.zeros(8).bfloat16(), "x": torch.full((8,), 1.1015625).bfloat16()}
    values = {"weight": (0.7,), "density": (0.5,), "normalize": False, "rescale": False, "lambda": 1.0}
    facts: dict[Any, Any] = {}
    setting = Setting(method, ("x",), "base", tuple(values.items()))
    [merged] = answered(tiles_of(parents, facts), facts, lambda tile: merge_tile(tile, setting, "BF16", "mergekit"))
    assert merged.dtype == torch.bfloat16
    assert set(merged.tolist()) == {0.0, 0.76953125}
