"""The yardsticks themselves, against arithmetic on paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.conformance.exact import FLOAT32_STEP, Exact
from tests.conformance.measures import correctly_rounded, explained, find_masks, rounded, ulp_distance
from tests.conformance.reference import TaskVectors, largest, resolved

SMALLEST = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}
DTYPES = list(SMALLEST)


@pytest.mark.parametrize("dtype", DTYPES)
def test_neighbours_are_one_ulp_apart_on_both_sides_of_zero(dtype: torch.dtype) -> None:
    eps, tiny = torch.finfo(dtype).eps, SMALLEST[dtype]
    a = torch.tensor([1.0, 2.0, -1.0, 0.0, 0.0, tiny, 1.0], dtype=dtype)
    b = torch.tensor([1 + eps, 2 - eps, -1 - eps, -0.0, tiny, -tiny, 1.0], dtype=dtype)
    assert ulp_distance(a, b).tolist() == [1, 1, 1, 0, 1, 2, 0]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_is_near_nan_alone(dtype: torch.dtype) -> None:
    nan = float("nan")
    a, b = torch.tensor([nan, nan], dtype=dtype), torch.tensor([nan, 1.0], dtype=dtype)
    assert ulp_distance(a, b).tolist() == [0, 2**62]


def test_ulp_distance_refuses_different_dtypes() -> None:
    with pytest.raises(ValueError, match="cannot be compared"):
        ulp_distance(torch.zeros(2), torch.zeros(2, dtype=torch.float16))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rounding_agrees_with_torch_wherever_float32_holds_the_value(dtype: torch.dtype) -> None:
    values = torch.randn(10_000, generator=torch.Generator().manual_seed(1)) * 10.0 ** torch.arange(-8, 2).repeat(1000)
    assert np.array_equal(rounded(values.double().numpy(), dtype), values.to(dtype).double().numpy())


def test_rounding_is_done_once() -> None:
    just_above_half = 1 + 2.0**-8 + 2.0**-40  # float32 would drop the 2⁻⁴⁰ and bf16 would then round to even: 1.0
    assert rounded(np.array([just_above_half]), torch.bfloat16)[0] == 1 + 2.0**-7


def test_correctly_rounded_means_nearest_and_either_neighbour_of_a_half_way_point() -> None:
    ulp = 2.0**-7  # of bfloat16 in [1, 2)
    actual = torch.tensor([1.0, 1.0, 1 + ulp, 1 + ulp, 1.0], dtype=torch.bfloat16)
    value = np.array([1 + 0.4 * ulp, 1 + 0.5 * ulp, 1 + 0.5 * ulp, 1 + 0.4 * ulp, 1 + 0.50001 * ulp])
    assert correctly_rounded(actual, value).tolist() == [True, True, True, False, False]


def test_rounding_overflows_to_infinity() -> None:
    assert rounded(np.array([1e6, -1e6]), torch.float16).tolist() == [np.inf, -np.inf]


def test_noise_is_measured_by_what_was_added_up_not_by_the_sum() -> None:
    exact = Exact(np.array([1e-9]), np.array([2.0]), operations=2)
    off = torch.tensor([1e-9 + 3 * FLOAT32_STEP])
    assert explained(off, exact).all()
    assert not explained(off, Exact(exact.value, np.array([1e-9]), operations=2)).any()


def test_largest_keeps_the_first_of_equals() -> None:
    assert largest(np.array([1.0, -2.0, 2.0, 0.5]), 0.25).tolist() == [False, True, False, False]
    assert largest(np.array([1.0, 2.0]), 0.1).tolist() == [False, True]


def test_masks_of_a_trimmed_tensor_are_found_and_equal_magnitudes_are_free() -> None:
    delta = np.array([4.0, 1.0, -2.0, 2.0])
    vectors = _vectors(delta, density=0.5, trim="magnitude")  # 4 stays, one of the two 2s with it
    first, second = torch.tensor([5.0, 1.0, -1.0, 1.0]), torch.tensor([5.0, 1.0, 1.0, 3.0])
    for actual in (first, second):
        masks = find_masks(actual, vectors)
        assert masks.unexplained == 0
        assert masks.bounds(0) == (2, 2)
    assert find_masks(torch.tensor([5.0, 2.0, 1.0, 1.0]), vectors).unexplained == 1  # 1 is below the threshold
    assert find_masks(torch.tensor([1.0, 1.0, -1.0, 3.0]), vectors).unexplained == 1  # 4 is above it
    assert find_masks(torch.tensor([5.0, 1.0, -1.0, 3.0]), vectors).bounds(0) == (3, 3)  # explained, but one too many


def test_the_scale_of_a_random_mask_is_found_with_it() -> None:
    delta = np.array([4.0, 1.0, -2.0, 2.0])
    actual = torch.tensor([1 + 4 * 9 / 6, 1.0, 1.0, 1 + 2 * 9 / 6])  # 9 in all, 6 kept
    masks = find_masks(actual, _vectors(delta, density=0.5, trim="random", rescale=True))
    assert masks.unexplained == 0
    assert masks.scales == (1.5,)
    assert masks.sure[0].tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    ("setting", "depth", "value"),
    [
        (0.3, 0.5, 0.3),
        ([0.0, 1.0], 0.25, 0.25),
        ([0.0, 0.5, 0.3], 0.75, 0.4),
        ([{"filter": "mlp", "value": [0, 2]}, {"value": 7}], 0.5, 1.0),
        ([{"filter": "attn", "value": 1}, {"filter": "*", "value": 7}], 0.5, 7),
        ([{"filter": "attn", "value": 1}], 0.5, None),
    ],
)
def test_settings_resolve_to_a_scalar_for_each_tensor(setting: object, depth: float, value: float | None) -> None:
    assert resolved(setting, "model.layers.1.mlp.up_proj.weight", depth) == value


def _vectors(delta: np.ndarray, density: float, trim: str, rescale: bool = False) -> TaskVectors:
    return TaskVectors(
        base=np.ones_like(delta), deltas=(delta,), weights=(1.0,), densities=(density,), trim=trim, consensus=False,
        normalize=False, rescale=rescale, strength=1.0,
    )  # fmt: skip
