"""Magnitudes, brackets and ranks against numpy."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from workers.methods.kernels import ranks
from workers.methods.kernels.masks import Mask
from workers.methods.kernels.ranks import (
    EVERY,
    NONE,
    Bracket,
    Limit,
    RowFactors,
    above,
    below_by_rank,
    bracketed,
    magnitudes,
    magnitudes_bracketed,
)

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


def as_lists(bracket: Bracket) -> list[tuple[int, int, int, list[int]]]:
    units = np.split(bracket.between, np.cumsum(bracket.counts[:-1, 3])) if len(bracket.counts) else []
    counts = bracket.counts.tolist()
    assert [len(unit) for unit in units] == [inside for *_, inside in counts]
    return [(above, high, low, unit.tolist()) for (above, high, low, _), unit in zip(counts, units, strict=True)]


def test_magnitudes_are_scaled_row_by_row_and_rounded_once():
    # 1.5 − 1, |0.5 − 1.5| and 2 − 2 times 0.1; then |1 − 5| times 1e-40, 3 − 0 times NaN: rows of three, the first cut
    model, base = np.array([1.5, 0.5, 2, 1, 3], np.float32), np.array([1, 1.5, 2, 5, 0], np.float32)
    found = magnitudes(model[1:], base[1:], RowFactors(np.array([0.1, 1e-40]), 3, 1)).view(np.float32)
    assert found.tolist() == [float(np.float32(0.1)), 0.0, float(np.float32(4e-40)), float(np.float32(3e-40))]
    assert magnitudes(model[:1], base[:1], RowFactors(np.array([-np.nan]), 3, 0)).tolist() == [0x7FC00000]


@pytest.mark.parametrize(("elements", "unit"), [(0, 16), (1, 16), (5000, 2048), (5000, 256), (67, 16)])
@pytest.mark.parametrize(("low", "high"), [(0, 2**31 - 1), (40, 60), (60, 60), (0, 0), (101, 2**31 - 1)])
def test_a_bracket_counts_its_ends_and_holds_what_is_between(elements: int, unit: int, low: int, high: int):
    bits = np.random.default_rng(elements).integers(0, 101, elements, np.int32)
    expected = [
        (
            sum(number > high for number in part),
            part.count(high),
            part.count(low) if low < high else 0,
            [number for number in part if low < number < high],
        )
        for part in (bits[start : start + unit].tolist() for start in range(0, elements, unit))
    ]
    (found,) = bracketed(bits, [(low, high)], unit=unit)
    assert as_lists(found) == expected


@pytest.mark.parametrize(("elements", "unit"), [(5000, 512), (5000, 16), (300, 16), (7 * 512, 2048)])
@pytest.mark.parametrize("room", [1, 3000, 10_000])
def test_brackets_are_the_same_whatever_memory_there_is(
    elements: int, unit: int, room: int, monkeypatch: pytest.MonkeyPatch
):
    bits = np.random.default_rng(elements).integers(0, 101, elements, np.int32)
    ends = [(0, 101), (40, 60), (50, 50), (0, 2**31 - 1), (99, 100)]
    expected = [as_lists(bracketed(bits, [each], unit=unit)[0]) for each in ends]
    monkeypatch.setattr(ranks, "MOST_BETWEEN", room)
    assert [as_lists(each) for each in bracketed(bits, ends, unit=unit)] == expected
    model, base = np.arange(elements, dtype=np.float32) % 7, np.zeros(elements, np.float32)
    factors = RowFactors(np.random.default_rng(1).random(1 + (elements + 30) // 100), 100, 30)
    scaled = magnitudes(model, base, factors)
    between = [(int(low), int(high)) for low, high in np.sort(np.random.default_rng(2).choice(scaled, (5, 2)))]
    found = magnitudes_bracketed(model, base, between, unit=unit, factors=factors)
    assert [as_lists(each) for each in found] == [as_lists(bracketed(scaled, [each], unit=unit)[0]) for each in between]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_brackets_of_two_tensors_are_those_of_their_magnitudes(dtype: type):
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(5001).astype(dtype) for _ in range(2))
    bits = magnitudes(a, b)
    first, second, third = sorted(bits[:3].tolist())
    ends = [(first, second), (second, third), (0, third)]
    found = magnitudes_bracketed(a, b, ends, unit=2048)
    assert [as_lists(each) for each in found] == [as_lists(each) for each in bracketed(bits, ends, unit=2048)]
    factors = RowFactors(rng.random(1 + 5001 // 700 + 1), 700, 650)
    scaled = magnitudes(a, b, factors)
    found = magnitudes_bracketed(a, b, ends, unit=2048, factors=factors)
    assert [as_lists(each) for each in found] == [as_lists(each) for each in bracketed(scaled, ends, unit=2048)]


def test_the_greatest_number_can_be_an_end():
    bits = np.array([2**31 - 1, 0, 2**31 - 2, 5], np.int32)
    one, other = bracketed(bits, [(5, 2**31 - 2), (5, 2**31 - 1)], unit=16)
    assert as_lists(one) == [(1, 1, 1, [])]
    assert as_lists(other) == [(0, 1, 1, [2**31 - 2])]


@pytest.mark.parametrize("elements", [0, 1, 511, 5000])
@pytest.mark.parametrize("settings", [1, 5, 16])
@pytest.mark.parametrize("last", [Limit(EVERY), Limit(NONE), Limit(4), Limit(4, 30), Limit(4, 300)], ids=str)
def test_a_limit_has_what_is_above_it_and_the_first_of_its_equals(elements: int, settings: int, last: Limit):
    rng = np.random.default_rng(elements + settings)
    bits = rng.integers(0, 9, elements, np.int32)
    limits = [Limit(int(rng.integers(0, 9)), int(rng.choice([0, 1, 30, 300, 700, 10_000]))) for _ in range(settings)]
    limits[-1] = last
    words = above(bits, limits)
    for place, limit in enumerate(limits):
        expected, left = [], limit.equals or 0
        for number in bits.tolist():
            expected.append(number > limit.bits or (number == limit.bits and left > 0))
            left -= number == limit.bits
        assert Mask(words, place).array().tolist() == expected
    assert all(word < 1 << settings for word in words.tolist())


@pytest.mark.parametrize(("rows", "row"), [(1, 2), (7, 3), (5, 600), (3, 5000), (1, 70_000)])
@pytest.mark.parametrize("most", [0, 200, 2**24, 2**31 - 1])
@pytest.mark.parametrize("falling", [False, True])
@pytest.mark.parametrize("near", [0.01, 1])
def test_a_number_is_held_against_the_limit_of_the_rank_that_a_stable_sort_gives(
    rows: int, row: int, most: int, falling: bool, near: float
):
    rng = np.random.default_rng(row)
    bits = rng.integers(0, most, (rows, row), np.int32, endpoint=True)
    ranks = np.argsort(np.argsort(bits, axis=1, kind="stable"), axis=1, kind="stable").ravel()
    limits = np.sort(rng.integers(1, 2**32, row, np.uint32))[:: -1 if falling else 1].copy()
    exactly = limits[ranks] - rng.integers(0, 2, ranks.size, np.uint32)  # not below the limit, or just below it
    numbers = np.where(rng.random(ranks.size) < near, exactly, rng.integers(0, 2**32, ranks.size, np.uint32))
    several = [limits, limits[::-1].copy(), np.full(row, 1 << 31, np.uint32), limits]
    words = below_by_rank(bits.ravel(), row, numbers, several)
    for bit, each in enumerate(several):
        assert (Mask(words, bit).array() == (numbers < each[ranks])).all()
    part = slice(row // 3, bits.size - row // 2)
    words = below_by_rank(bits.ravel(), row, numbers[part].copy(), [limits], row // 3)
    assert (words == (numbers < limits[ranks])[part]).all()


@pytest.mark.parametrize("settings", [1, 2, 15, 16])
def test_every_setting_has_a_bit_of_its_own(settings: int):
    rng = np.random.default_rng(settings)
    bits, numbers = rng.integers(0, 99, (7, 50), np.int32), rng.integers(0, 2**32, 350, np.uint32)
    ranks = np.argsort(np.argsort(bits, axis=1, kind="stable"), axis=1, kind="stable").ravel()
    limits = [rng.integers(0, 2**32, 50, np.uint32) for _ in range(settings)]
    words = below_by_rank(bits.ravel(), 50, numbers, limits)
    for bit, each in enumerate(limits):
        assert (Mask(words, bit).array() == (numbers < each[ranks])).all()
    assert words.max() < 1 << settings


def test_magnitudes_that_are_infinite_or_no_number_have_ranks():
    bits = np.random.default_rng(8).standard_normal((40, 300)).astype(np.float32).view(np.int32) & 0x7FFFFFFF
    bits[::2, 7], bits[::3, 20:60], bits[::4, 299] = 0x7F800000, 0x7FC00000, 0x7FFFFFFF
    ranks = np.argsort(np.argsort(bits, axis=1, kind="stable"), axis=1, kind="stable").ravel()
    limits = np.random.default_rng(9).integers(1, 2**32, 300, np.uint32)
    numbers = np.random.default_rng(10).integers(0, 2**32, bits.size, np.uint32)
    assert (below_by_rank(bits.ravel(), 300, numbers, [limits]) == (numbers < limits[ranks])).all()
