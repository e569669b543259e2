"""The compiled softmaxes and divergences against numpy's, and their functions against decimal arithmetic."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from workers.methods.kernels import divergence
from workers.methods.kernels.divergence import divergences, exponentials, row_divergences, softmaxes

SMOOTHING = 1e-8


def pair(shape: tuple[int, int], dtype: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(shape)
    base = (rng.standard_normal(shape) * 3).astype(dtype)
    return (base.astype(float) + rng.standard_normal(shape) * 0.1).astype(dtype), base


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 3), (11, 700), (1, 1100)])
def test_rows_have_the_divergence_of_their_softmaxes(shape: tuple[int, int], dtype: Any):
    parents = pair(shape, dtype)
    wide = [each.astype(float) for each in parents]
    found = [softmaxes(each.ravel(), shape[1], 0) for each in parents]
    for (tops, sums), values in zip(found, wide, strict=True):
        assert (tops == values.max(axis=1)).all()
        assert sums == pytest.approx(np.exp(values - values.max(axis=1, keepdims=True)).sum(axis=1), rel=1e-13)
    p, q = (np.exp(values) / np.exp(values).sum(axis=1, keepdims=True) + SMOOTHING for values in wide)
    expected = (p * np.log(p / q)).sum(axis=1)
    model, base = (each.ravel() for each in parents)
    sums = divergences(model, base, *found, shape[1], 0, SMOOTHING)
    assert sums == pytest.approx(expected, rel=1e-9, abs=1e-15)
    assert row_divergences(model, base, shape[1], SMOOTHING).tolist() == sums.tolist()


def test_a_row_is_cut_anywhere():
    model, base = (each.ravel() for each in pair((4, 700), np.float32))
    found = [softmaxes(each, 700, 0) for each in (model, base)]
    whole = divergences(model, base, *found, 700, 0, SMOOTHING)
    before = divergences(model[:900], base[:900], *(each[:, :2] for each in found), 700, 0, SMOOTHING)
    after = divergences(model[900:], base[900:], *(each[:, 1:] for each in found), 700, 200, SMOOTHING)
    assert [before[0], before[1] + after[0], *after[1:]] == pytest.approx(whole.tolist(), rel=1e-9)


def test_a_row_with_an_element_that_is_no_number_has_no_divergence():
    model = np.array([1, np.nan, 2, np.inf, -np.inf, 1])
    base = np.array([1, 1.5, np.nan, 0, 0.5, 1])
    found = [softmaxes(each, 2, 0) for each in (model, base)]
    assert np.isnan(found[0][1]).tolist() == [True, True, False]
    sums = divergences(model, base, *found, 2, 0, SMOOTHING)
    assert np.isnan(sums).tolist() == [True, True, False]
    assert np.array_equal(row_divergences(model, base, 2, SMOOTHING), sums, equal_nan=True)
    # softmaxes (0, 1) and (1, √e)/(1 + √e)
    q = np.exp([0, 0.5]) / np.exp([0, 0.5]).sum()
    assert sums[2] == pytest.approx(1e-8 * np.log(1e-8 / q[0]) + (1 + 1e-8) * np.log((1 + 1e-8) / (q[1] + 1e-8)))


def test_exponentials_of_numbers_that_are_none():
    assert exponentials(np.array([-np.inf, -1e9, 0.0])) == pytest.approx([0, 0, 1], abs=1e-300)
    assert np.isnan(exponentials(np.array([np.nan])))


def test_the_functions_err_by_less_than_two_units_in_the_last_place():
    rng = np.random.default_rng(0)
    powers = [0.0, *-(10 ** rng.uniform(-12, 2.8, 300)), *rng.uniform(-3, 0, 300)]
    numbers = [1.0, *10 ** rng.uniform(-8, 8, 300), *1 + 10 ** rng.uniform(-12, -1, 150), *rng.uniform(0.6, 1, 150)]
    with localcontext(prec=40), np.errstate(over="ignore"):
        for x in powers:
            assert exponentials(np.array([x])) == divergence._exp(np.float64(x))
            assert abs(divergence._exp(np.float64(x)) - (exact := float(Decimal(x).exp()))) < 2 * np.spacing(exact)
        for x in numbers:
            exact = float(Decimal(float(x)).ln())
            assert abs(divergence._log(np.float64(x)) - exact) <= 2 * np.spacing(abs(exact))
