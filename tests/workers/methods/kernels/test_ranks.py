"""Magnitudes and brackets against numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from workers.methods.kernels.ranks import bracketed, magnitudes

DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)


@pytest.mark.parametrize("model", DTYPES)
@pytest.mark.parametrize("base", DTYPES)
def test_magnitudes_are_those_of_the_difference_in_float32(model: type, base: type):
    rng = np.random.default_rng(0)
    a, b = (np.append(rng.standard_normal(3000), [0, np.inf, np.nan, 1e-42]).astype(dtype) for dtype in (model, base))
    with np.errstate(invalid="ignore"):
        difference = a.astype(np.float32) - b.astype(np.float32)
    bits = magnitudes(a, b)
    finite = np.isfinite(difference)
    assert (bits.view(np.float32)[finite] == abs(difference)[finite]).all()
    assert (bits[np.isnan(difference)] > np.float32(np.inf).view(np.int32)).all() and bits.min() >= 0
    assert (magnitudes(a[::3], b[::3]) == bits[::3]).all()


@pytest.mark.parametrize("elements", [0, 1, 5000])
@pytest.mark.parametrize(("low", "high"), [(0, 2**31 - 1), (40, 60), (60, 60), (0, 0), (101, 2**31 - 1)])
def test_a_bracket_holds_what_is_between_its_ends_and_both_ends(elements: int, low: int, high: int):
    bits = np.random.default_rng(elements).integers(0, 101, elements, np.int32)
    above, inside = bracketed(bits, low, high)
    assert above == (bits > high).sum()
    assert inside.tolist() == [number for number in bits.tolist() if low <= number <= high]


def test_the_greatest_number_can_be_an_end():
    bits = np.array([2**31 - 1, 0, 2**31 - 2, 5], np.int32)
    assert bracketed(bits, 5, 2**31 - 2)[0] == 1
    assert bracketed(bits, 5, 2**31 - 1)[1].tolist() == [2**31 - 1, 2**31 - 2, 5]
