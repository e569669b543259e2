"""Which elements of a task vector are kept: by limits, of which some equals count, and by masks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from workers.methods.kernels import consensus
from workers.methods.kernels.consensus import Mixture, Trimmed, run_mixtures
from workers.methods.kernels.masks import Mask
from workers.methods.kernels.memory import BLOCK
from workers.methods.kernels.ranks import EVERY, NONE, Limit, RowFactors, magnitudes

ELEMENTS = 3 * BLOCK + 100


@pytest.mark.parametrize("keep", [0, 1, 500, 900, 1500, ELEMENTS])
@pytest.mark.parametrize("drop", [None, 0, 1, 900, 1500, ELEMENTS])
@pytest.mark.parametrize("limits", [(1, 3), (2, 2), (0, 1)])
def test_only_the_first_of_equals_are_kept_and_only_the_first_dropped(
    keep: int, drop: int | None, limits: tuple[int, int]
):
    model = np.random.default_rng(0).integers(-3, 4, ELEMENTS).astype(np.float32)
    lower, upper = (int(np.float32(limit).view(np.int32)) for limit in limits)
    beyond = None if drop is None else Limit(upper, drop)
    trimmed = Trimmed(0, 1, Limit(lower, keep), beyond)
    out = np.empty(ELEMENTS, np.float32)
    mixture = Mixture(1, ((0, 1.0),), False, False, 1.0)
    run_mixtures([model, np.zeros_like(model)], [trimmed], [mixture], [out], "float32")
    expected: list[float] = []
    left, gone = keep, drop or 0
    for value in model.tolist():
        kept = abs(value) > limits[0]
        if abs(value) == limits[0] and left:
            kept, left = True, left - 1
        if drop is not None and abs(value) > limits[1]:
            kept = False
        if drop is not None and abs(value) == limits[1] and gone:
            kept, gone = False, gone - 1
        expected.append(value if kept else 0.0)
    assert out.tolist() == expected


@pytest.mark.parametrize(("row", "column"), [(1, 0), (700, 650), (5 * BLOCK, 3)])
def test_magnitudes_times_the_factors_of_their_rows_are_held_against_a_limit(row: int, column: int):
    rng = np.random.default_rng(row)
    model, base = rng.standard_normal((2, ELEMENTS)).astype(np.float32)
    factors = RowFactors(rng.random(-(-(column + ELEMENTS) // row)), row, column)
    scores = magnitudes(model, base, factors)
    limit = int(np.median(scores))
    out = np.empty(ELEMENTS, np.float32)
    trimmed = Trimmed(0, 1, Limit(limit), scaled=factors)
    run_mixtures([model, base], [trimmed], [Mixture(1, ((0, 1.0),), False, False, 1.0)], [out], "float32")
    assert out.tolist() == (base + (model - base) * (scores > limit)).tolist()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("factor", [None, 1 / 3, 0.0])
@pytest.mark.parametrize("among", [None, Limit(int(np.float32(0.5).view(np.int32)))], ids=["all", "among"])
def test_a_mask_keeps_what_is_above_a_limit_too_and_a_factor_multiplies_it(
    dtype: str, factor: float | None, among: Limit | None
):
    rng = np.random.default_rng(4)
    model, base = rng.standard_normal((2, ELEMENTS)).astype(dtype)
    model[::97], base[::89] = np.nan, np.inf
    mask, out = rng.random(ELEMENTS) < 0.5, np.empty(ELEMENTS, dtype)
    words = np.uint16(1 << 15) * mask + rng.integers(0, 1 << 15, ELEMENTS, np.uint16)  # the other bits are not its own
    trimmed = Trimmed(0, 1, among, mask=Mask(words, 15), factor=factor)
    run_mixtures([model, base], [trimmed], [Mixture(1, ((0, 1.0),), False, False, 1.0)], [out], dtype)
    with np.errstate(invalid="ignore"):
        kept = mask if among is None else mask & (magnitudes(model, base) > among.bits)
        expected = base + (model - base) * kept * np.dtype(dtype).type(1 if factor is None else factor)
    assert np.array_equal(out, expected, equal_nan=True)


def unused(*_: object) -> None:
    raise AssertionError("the general loop")


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("normalizes", [True, False])
@pytest.mark.parametrize("seed", range(8))
def test_two_trimmed_vectors_of_bfloat16_agree_on_a_sign(
    seed: int, normalizes: bool, odd: int, monkeypatch: pytest.MonkeyPatch
):
    """By words of two elements where addresses are those of words; every second seed has a NaN or an infinity."""
    if not odd and seed % 2 == 0:
        monkeypatch.setitem(consensus._KERNELS, "float32", unused)  # pyright: ignore[reportPrivateUsage]
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, 2000)) * 2
    raw = np.array([*rng.standard_normal((3, count + odd)) * 10.0 ** rng.integers(-4, 3, count + odd)])
    raw[:, rng.random(count + odd) < 0.1] = 0.0
    if seed % 2:
        raw[rng.integers(3), rng.integers(count + odd)] = rng.choice([np.nan, np.inf, -np.inf])
    base, a, b = parents = raw.astype(ml_dtypes.bfloat16)[:, odd:]
    limits = [rng.choice([None, Limit(int(rng.choice(magnitudes(each, base)))), Limit(NONE)]) for each in (a, b)]
    weights, scale = [float(each) for each in rng.choice([1.0, 0.0, -0.3, 0.7], 2)], float(rng.choice([1.0, 0.6]))
    trimmed = [Trimmed(1, 0, limits[0]), Trimmed(2, 0, limits[1])]
    out = np.empty(count + odd, ml_dtypes.bfloat16)[odd:]
    mixture = Mixture(0, ((0, weights[0]), (1, weights[1])), True, normalizes, scale)
    broken = run_mixtures([*parents], trimmed, [mixture], [out], "float32")

    one = np.float32(1)
    with np.errstate(all="ignore"):
        ground = base.astype(np.float32)
        terms = np.array([
            (each.astype(np.float32) - ground)
            * (magnitudes(each, base) > (EVERY if limit is None else limit.bits)).astype(np.float32)
            * np.float32(weight)
            for each, limit, weight in zip((a, b), limits, weights, strict=True)
        ])  # fmt: skip
        sign = np.where(terms[0] + terms[1] >= 0, one, -one)
        turned = terms * sign
        total = np.where(turned < 0, 0 * one, turned)
        divisor = np.where(turned > 0, np.array(weights, np.float32)[:, None], 0 * one).sum(axis=0, dtype=np.float32)
        total = (total[0] + total[1]) * sign
        if normalizes:
            total = total / np.where(divisor == 0, one, divisor)
        expected = (ground + total * np.float32(scale)).astype(ml_dtypes.bfloat16)
    assert np.array_equal(out, expected, equal_nan=True)
    assert (np.signbit(out) == np.signbit(expected))[~np.isnan(expected)].all()
    assert [each.tolist() for each in broken] == [
        [not np.isfinite(each).all() for each in parents] if not np.isfinite(expected).all() else [False] * 3,
        [not np.isfinite(expected).all()],
    ]


@pytest.mark.parametrize("elements", [101, 102])
@pytest.mark.parametrize("place", [0, 1, 100])
@pytest.mark.parametrize("normalizes", [True, False])
def test_a_bfloat16_consensus_is_infinite_from_the_number_on_that_rounds_to_infinity(
    normalizes: bool, place: int, elements: int
):
    """Half a unit in the last place above the largest bfloat16, which is odd, is infinity; below it, that bfloat16."""
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    base, a, b = np.zeros((3, elements), ml_dtypes.bfloat16)
    a[place], b[place] = largest, 1.0
    for part, expected in ((0.4999, largest), (0.5, np.inf)):
        out = np.empty(elements, ml_dtypes.bfloat16)
        mixture = Mixture(0, ((0, 1.0), (1, 0.0)), True, normalizes, 1 + part / 255)
        _, broken = run_mixtures([base, a, b], [Trimmed(1, 0), Trimmed(2, 0)], [mixture], [out], "float32")
        assert (float(out[place]), broken.tolist()) == (expected, [np.isinf(expected)])
        assert not np.delete(out, place).any()
