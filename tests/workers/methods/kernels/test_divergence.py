"""The compiled divergences of softmaxes against numpy's, and their functions against decimal arithmetic."""

from __future__ import annotations

from decimal import Decimal, localcontext
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from workers.methods.kernels import divergence
from workers.methods.kernels.divergence import divergences

SMOOTHING = 1e-8


def pair(shape: tuple[int, int], dtype: Any) -> tuple[Any, Any]:
    rng = np.random.default_rng(shape)
    base = (rng.standard_normal(shape) * 3).astype(dtype)
    return (base.astype(float) + rng.standard_normal(shape) * 0.1).astype(dtype), base


def found(model: Any, base: Any, row: int, *, start: int = 0, unit: int = 1 << 17) -> list[float]:
    return divergences(model, base, row, start=start, unit=unit, smoothing=SMOOTHING).tolist()


def by_numpy(model: Any, base: Any) -> Any:
    """KL of the softmaxes of rows."""
    wide = (each.astype(float) for each in (model, base))
    p, q = (np.exp(values) / np.exp(values).sum(axis=1, keepdims=True) + SMOOTHING for values in wide)
    return (p * np.log(p / q)).sum(axis=1)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(5, 3), (11, 700), (1, 1100)])
@pytest.mark.parametrize("scale", [1, 0.02], ids=["far", "near"])
def test_rows_have_the_divergence_of_their_softmaxes(shape: tuple[int, int], dtype: Any, scale: float):
    model, base = ((each.astype(float) * scale).astype(dtype) for each in pair(shape, dtype))
    expected = by_numpy(model, base)
    assert found(model.ravel(), base.ravel(), shape[1]) == pytest.approx(expected, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("start", "unit"), [(0, 1024), (700, 1024), (1400, 256)], ids=["cut", "early", "wide"])
def test_a_row_that_is_cut_has_the_divergence_of_the_whole_but_for_rounding(start: int, unit: int):
    model, base = pair((4, 700), np.float32)
    sums = found(model.ravel(), base.ravel(), 700, start=start, unit=unit)
    whole = found(model.ravel(), base.ravel(), 700)
    assert sums == pytest.approx(by_numpy(model, base), rel=1e-9)
    assert sums != whole
    cut = [place // unit != (place + 699) // unit for place in range(start, start + 2800, 700)]
    assert [one for one, is_cut in zip(sums, cut, strict=True) if not is_cut] == [
        one for one, is_cut in zip(whole, cut, strict=True) if not is_cut
    ]


def by_parts(model: list[float], base: list[float], cut: int) -> float:
    """The divergence of a row that is cut once, in the order of the compiled loop, for at most 2 elements a part."""

    def softmax(row: list[float]) -> list[float]:
        parts = [part for part in (row[:cut], row[cut:]) if part]
        origins = [origin_of(part) for part in parts]
        total = 0.0
        for part, origin in zip(parts, origins, strict=True):
            total += sum(exp(x - origin) for x in part) * exp(origin - max(origins))
        return [exp(x - max(origins)) * (1 / total) + SMOOTHING for x in row]

    def log_of_ratio(p: float, q: float) -> float:
        alike = abs(p - q) <= (p + q) / 16
        return divergence._log_of_ratio(p, q) if alike else divergence._log(np.float64(p / q))

    terms = [p * log_of_ratio(p, q) for p, q in zip(softmax(model), softmax(base), strict=True)]
    return float(sum(terms[:cut]) + sum(terms[cut:]))


def exp(x: float) -> float:
    return float(divergence._exp(np.float64(x)))


def origin_of(part: list[float]) -> float:
    """0 where all numbers are small."""
    return 0.0 if max(abs(x) for x in part) <= 256 else max(part)


@pytest.mark.parametrize("cut", [0, 1, 2])
@pytest.mark.parametrize("step", [1e-3, 0.3, 3, 300])
def test_the_compiled_loop_has_the_bits_of_its_functions(cut: int, step: float):
    rows = np.random.default_rng(cut).standard_normal((40, 2, 2 + cut % 2)) * step
    for model, base in rows:
        sums = found(model, base, model.size, start=8 - cut if cut else 0, unit=8)
        assert sums == [by_parts(model.tolist(), base.tolist(), cut)]


def test_a_row_with_an_element_that_is_no_number_has_no_divergence():
    model = np.array([1, np.nan, 2, np.inf, -np.inf, 1])
    base = np.array([1, 1.5, np.nan, 0, 0.5, 1])
    for unit in (2, 3, 1024):  # the second row is cut, or none
        sums = found(model, base, 2, unit=unit)
        assert np.isnan(sums).tolist() == [True, True, False]
        # softmaxes (0, 1) and (1, √e)/(1 + √e)
        q = np.exp([0, 0.5]) / np.exp([0, 0.5]).sum()
        assert sums[2] == pytest.approx(1e-8 * np.log(1e-8 / q[0]) + (1 + 1e-8) * np.log((1 + 1e-8) / (q[1] + 1e-8)))


def test_the_functions_err_by_less_than_two_units_in_the_last_place():
    rng = np.random.default_rng(0)
    powers = [0.0, *-(10 ** rng.uniform(-12, 2.8, 300)), *rng.uniform(-3, 3, 300), *rng.uniform(0, 256, 100)]
    numbers = [1.0, *10 ** rng.uniform(-8, 8, 300), *1 + 10 ** rng.uniform(-12, -1, 150), *rng.uniform(0.6, 1, 150)]
    with localcontext(prec=40), np.errstate(over="ignore"):
        assert np.isnan(divergence._exp(np.float64(np.nan))) and divergence._exp(np.float64(-np.inf)) < 1e-300
        for x in powers:
            assert abs(divergence._exp(np.float64(x)) - (exact := float(Decimal(x).exp()))) < 2 * np.spacing(exact)
        for x in numbers:
            exact = float(Decimal(float(x)).ln())
            assert abs(divergence._log(np.float64(x)) - exact) <= 2 * np.spacing(abs(exact))
        for x, share in zip(10 ** rng.uniform(-8, 0, 300), 10 ** rng.uniform(-12, np.log10(0.12), 300), strict=True):
            for p, q in ((x, x * (1 + share)), (x * (1 + share), x)):
                assert abs(p - q) <= (p + q) / 16
                exact = float((Decimal(float(p)) / Decimal(float(q))).ln())
                assert abs(divergence._log_of_ratio(p, q) - exact) <= 3 * np.spacing(abs(exact))


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("scale", [0.02, 3, 300])
def test_exponentials_of_two_bytes_are_those_of_wide_numbers(dtype: Any, scale: float):
    rows = (np.random.default_rng(2).standard_normal((2, 30, 70)) * scale).astype(dtype)
    model, base = (each.ravel() for each in rows)
    for unit in (64, 1024):
        assert found(model, base, 70, unit=unit) == found(model.astype(float), base.astype(float), 70, unit=unit)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("first", [0.0, -0.0, -0.5])
@pytest.mark.parametrize("least", [-255, -256, -258, -3000, -np.inf])
@pytest.mark.parametrize("start", [0, 1021, 1022, 1023], ids=["whole", "3 + 1", "2 + 2", "1 + 3"])
def test_a_row_whose_least_number_is_far_below_zero_has_its_divergence(
    dtype: Any, first: float, least: float, start: int
):
    model, base = np.array([first, -2, least, -1], dtype), np.array([first, -1, -1, -1.5], dtype)
    (sums,) = found(model, base, 4, start=start, unit=1024)
    assert [sums] == found(model.astype(float), base.astype(float), 4, start=start, unit=1024)
    expected = by_numpy(model.reshape(1, 4), base.reshape(1, 4))[0]
    assert sums == pytest.approx(expected, rel=1e-9)
