"""The compiled weighted sum has the bits of the torch formula, for every dtype, and of the dtypes' conversions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from workers.methods.kernels import weighted_sum
from workers.methods.kernels.memory import BLOCK
from workers.methods.kernels.weighted_sum import Sum, WeightedSums
from workers.methods.passes import WeightedSum
from workers.methods.running import run
from workers.methods.tile import Array, Inputs, Tile, as_tensor, torch_named

NARROW = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
DTYPES = {**NARROW, "float32": np.dtype(np.float32), "float64": np.dtype(np.float64)}
EVERY_HALF = np.arange(1 << 16, dtype=np.uint16)


def same(ours: Array, theirs: torch.Tensor) -> bool:
    """Whether the bits are equal; one NaN is as good as another."""
    expected = as_tensor(ours)
    equal = ours.view(f"u{ours.itemsize}") == theirs.view(getattr(torch, f"uint{8 * ours.itemsize}")).numpy()
    return bool((equal | (expected.isnan() & theirs.isnan()).numpy()).all())


def converted(values: Array, arithmetic: str, dtype: str) -> tuple[Array, bool, bool]:
    """`values` through a sum of one term, and whether they have, and the output has, a number that is not finite."""
    output = np.empty(values.size, DTYPES[dtype])
    parents, points = WeightedSums(1, [Sum(((0, 1.0),))], arithmetic).run([values], [output])
    return output, bool(parents[0]), bool(points[0])


@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.parametrize("dtype", NARROW)
def test_every_16_bit_number_is_read_exactly(dtype: str, arithmetic: str):
    halves = EVERY_HALF.view(NARROW[dtype])
    assert same(converted(halves, arithmetic, arithmetic)[0], as_tensor(halves).to(torch_named(arithmetic)))


def floats_to_round() -> Array:
    """Every float32 near a tie of float16 or bfloat16, both edges of every exponent, and random bits."""
    ends = np.array([0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF], np.uint32)
    tops = (EVERY_HALF.astype(np.uint32) << 16)[:, None] | ends
    random = np.random.default_rng(0).integers(0, 1 << 32, 300_000, np.uint32)
    return np.concatenate([tops.ravel(), random]).view(np.float32)


@pytest.mark.parametrize("dtype", NARROW)
def test_float32_is_rounded_as_torch_rounds_it(dtype: str):
    floats = floats_to_round()
    ours = converted(floats, "float32", dtype)[0]
    assert same(ours, torch.from_numpy(floats).to(torch_named(dtype)))
    assert (np.isnan(ours) == np.isnan(floats)).all()


def test_a_bfloat16_nan_has_the_bits_that_torch_writes_on_x86():
    output = converted(np.array([math.nan, -math.nan], np.float32), "float32", "bfloat16")[0]
    assert output.view(np.uint16).tolist() == [0xFFFF, 0xFFFF]


@pytest.mark.parametrize("dtype", DTYPES)
def test_float64_is_rounded_as_torch_rounds_it(dtype: str):
    doubles = np.random.default_rng(1).integers(0, 1 << 63, 10_000, np.uint64).view(np.float64)
    doubles = np.concatenate([doubles, torch.from_numpy(floats_to_round()).double().numpy() * (1 + 2.0**-40)])
    for arithmetic in ("float32", "float64"):
        theirs = torch.from_numpy(doubles).to(torch_named(arithmetic)).to(torch_named(dtype))
        assert same(converted(doubles, arithmetic, dtype)[0], theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, BLOCK - 1, BLOCK, 2 * BLOCK + 6])
def test_one_number_that_is_not_finite_is_noticed(dtype: str, value: float, place: int):
    values = np.full(2 * BLOCK + 7, 3, DTYPES[dtype])
    assert converted(values, "float64", "float32")[1:] == (False, False)
    values[place] = value
    assert converted(values, "float64", dtype)[1:] == (True, True)


def test_only_the_point_that_overflows_is_noticed():
    parent = np.full(5, 3e4, np.float16)
    outputs = [np.empty(5, np.float16) for _ in range(3)]
    parents, points = WeightedSums(1, [Sum(((0, c),)) for c in (1, 3, -2)], "float32").run([parent], outputs)
    assert (parents.tolist(), points.tolist()) == ([False], [False, True, False])


# ---- whole passes, against the formula in torch


def by_torch(each: WeightedSum, tile: Tile, arithmetic: str) -> torch.Tensor:
    """The definition of a weighted sum."""
    inputs = Inputs(tile, each.models, each.base, arithmetic)
    places = torch.arange(tile.start, tile.start + tile.elements)
    index = {"tensor": 0, "rows": places // tile.row, "columns": places % tile.row}[each.along]
    terms: list[torch.Tensor] = []
    for model, coefficient in enumerate(each.coefficients):
        value = inputs.model(model) if each.base is None else inputs.delta(model)
        factor = torch.as_tensor(coefficient, dtype=torch.float64).to(torch_named(arithmetic))
        terms.append(value * (factor if factor.dim() == 0 else factor[index]))
    return inputs.sum(terms) if each.base is None else inputs.base + inputs.sum(terms)


def numbers(rng: np.random.Generator, count: int, dtype: str) -> Array:
    """Of many magnitudes, with zeros of both signs, subnormals, and a few that are not finite."""
    values = rng.standard_normal(count) * 10.0 ** rng.integers(-9, 3, count)
    special = np.array([0.0, -0.0, 1e-40, -1e-7, 65504, math.inf, -math.inf, math.nan])
    values[rng.random(count) < 0.02] = 0.0
    chosen = rng.random(count) < 0.02
    values[chosen] = rng.choice(special, int(chosen.sum()))
    return values.astype(DTYPES[dtype])


def random_pass(rng: np.random.Generator, names: Sequence[str], shape: tuple[int, int]) -> WeightedSum:
    along: Any = rng.choice(["tensor", "rows", "columns"])
    size = {"tensor": None, "rows": shape[0], "columns": shape[1]}[along]
    base, *others = rng.permutation([*names]).tolist()
    models = tuple(others[: rng.integers(1, len(others) + 1)])
    coefficients = tuple(rng.choice([1.0, rng.normal()]) if size is None else rng.normal(size=size) for _ in models)
    return WeightedSum(models, coefficients, base if rng.random() < 0.5 else None, along)


@pytest.mark.parametrize("seed", range(60))
def test_random_passes_have_the_bits_of_torch(seed: int):
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(1, 40)), int(rng.choice([1, 3, 64, 200, 1500])))
    elements = shape[0] * shape[1]
    start = int(rng.integers(elements))
    count = int(rng.integers(1, elements - start + 1))
    names = [f"m{place}" for place in range(rng.integers(2, 6))]
    raw = {name: numbers(rng, count, rng.choice([*DTYPES])) for name in names}
    arithmetic, dtype = rng.choice([("float32", "bfloat16"), ("float32", "float16"), ("float64", "float32")])
    passes = [random_pass(rng, names, shape) for _ in range(rng.integers(1, 5))]
    tile = Tile("x", start, raw, {}, shape=shape)
    outputs = [np.empty(count, DTYPES[dtype]) for _ in passes]
    broken, overflowed = run(passes, tile, outputs, arithmetic)
    used = {name for each in passes for name in (*each.models, *([each.base] if each.base else []))}
    assert broken == {name: not np.isfinite(raw[name]).all() for name in used}
    assert overflowed == [not np.isfinite(output).all() for output in outputs]
    for each, output in zip(passes, outputs, strict=True):
        assert same(output, by_torch(each, tile, arithmetic).to(torch_named(dtype)))


def unused(*_: object) -> None:
    raise AssertionError("the general loop")


@pytest.mark.parametrize("odd", [0, 1])
@pytest.mark.parametrize("seed", range(20))
def test_random_passes_of_bfloat16_have_the_bits_of_torch(seed: int, odd: int, monkeypatch: pytest.MonkeyPatch):
    """Sums of few terms have a loop of their own, over words of two elements where each address is one of words.

    Every second seed has numbers that are not finite, and others sums of three terms: these take the general loop.
    """
    rng = np.random.default_rng(seed)
    count, names = 2 * int(rng.integers(1, 5_000)), "abcd"
    raw = {name: numbers(rng, count + odd, "bfloat16")[odd:] for name in names}
    for values in raw.values() if seed % 2 == 0 else ():
        values[~np.isfinite(values)] = 7
    if seed % 4 == 0 and not odd:
        monkeypatch.setitem(weighted_sum._KERNELS, "float32", unused)  # pyright: ignore[reportPrivateUsage]
    passes: list[WeightedSum] = []
    for _ in range(rng.integers(1, 5)):
        base, *models = rng.permutation([*names])[: rng.integers(2, 4 + (seed % 4 == 2))].tolist()
        if len(models) > 1 and rng.random() < 0.5:
            base = None
        factors = tuple(rng.choice([1.0, 0.0, rng.normal()]) for _ in models)
        passes.append(WeightedSum(tuple(models), factors, base))
    tile = Tile("x", 0, raw, {}, shape=(count,))
    outputs = [np.empty(count, DTYPES["bfloat16"]) for _ in passes]
    broken, overflowed = run(passes, tile, outputs, "float32")
    used = {name for each in passes for name in (*each.models, *([each.base] if each.base else []))}
    assert broken == {name: not np.isfinite(raw[name]).all() for name in used}
    assert overflowed == [not np.isfinite(output).all() for output in outputs]
    for each, output in zip(passes, outputs, strict=True):
        assert same(output, by_torch(each, tile, "float32").bfloat16())


@pytest.mark.parametrize("elements", [8193, 8194])
@pytest.mark.parametrize("place", [0, 1, 4095, 4096, 8192])
@pytest.mark.parametrize("models", ["a", "ab"])
@pytest.mark.parametrize("base", [None, "zero"])
def test_a_bfloat16_sum_is_infinite_from_the_number_on_that_rounds_to_infinity(
    base: str | None, models: str, place: int, elements: int
):
    """Half a unit in the last place above the largest bfloat16, which is odd, is infinity; below it, that bfloat16."""
    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)
    raw = {name: np.full(elements, number, ml_dtypes.bfloat16) for name, number in (("a", 1), ("b", 0), ("zero", 0))}
    raw["a"][place], raw["b"][place] = largest, 2.0**120  # the unit
    for part, expected in ((0.4999, largest), (0.5, math.inf)):
        factors = (1.0, part)[: len(models)]
        if models == "a":  # the largest times so much
            factors = (1 + part / 255,)
        output = np.empty(elements, ml_dtypes.bfloat16)
        tile = Tile("x", 0, raw, {}, shape=(elements,))
        _, overflowed = run([WeightedSum(tuple(models), factors, base)], tile, [output], "float32")
        assert (float(output[place]), overflowed) == (expected, [math.isinf(expected)])
        assert (np.delete(output, place) == 1).all()


def test_bits_do_not_depend_on_the_cut_or_on_the_other_points():
    rng = np.random.default_rng(9)
    raw = {name: rng.standard_normal(5000).astype(np.float32) for name in "abc"}
    passes = [random_pass(rng, "abc", (50, 100)) for _ in range(4)]
    together = [np.empty(5000, ml_dtypes.bfloat16) for _ in passes]
    run(passes, Tile("x", 0, raw, {}, shape=(50, 100)), together, "float32")
    for each, output in zip(passes, together, strict=True):
        for start in range(0, 5000, 1237):
            part = {name: values[start : start + 1237] for name, values in raw.items()}
            alone = np.empty(len(part["a"]), ml_dtypes.bfloat16)
            run([each], Tile("x", start, part, {}, shape=(50, 100)), [alone], "float32")
            assert (alone.view(np.uint16) == output[start : start + 1237].view(np.uint16)).all()


@pytest.mark.parametrize("others", [0, 200])
def test_sums_that_are_prepared_once_are_told_apart_by_every_bit(others: int):
    """0.0 equals −0.0, and a sum over other models or in float64 has the same numbers."""
    raw: dict[str, Any] = {name: np.full(3, value, np.float32) for name, value in zip("abc", (1, 3, 0.1), strict=True)}

    def sums(models: str, *factors: float, base: str | None = None, arithmetic: str = "float32") -> list[float]:
        output = np.empty(3, arithmetic)
        run([WeightedSum(tuple(models), factors, base)], Tile("x", 0, raw, {}, shape=(3,)), [output], arithmetic)
        return [math.copysign(1, output[0]), float(output[0])]

    for _ in range(2):
        for other in range(others):  # more than are kept
            assert sums("ab", 1.0, float(other))[1] == 1 + 3 * other
        assert sums("a", 0.0) == [1, 0] and sums("a", -0.0) == [-1, 0]
        assert sums("ab", 0.5, 0.25)[1] == 1.25 and sums("ba", 0.5, 0.25)[1] == 1.75
        assert sums("b", 0.5, base="a")[1] == 2 and sums("b", 0.5)[1] == 1.5
        assert sums("c", 3.0)[1] != sums("c", 3.0, arithmetic="float64")[1]


def test_nothing_is_written_beside_the_output():
    memory = np.full(2 * BLOCK, 7, np.uint16)
    output = memory[5 : 5 + BLOCK + 3].view(ml_dtypes.bfloat16)
    WeightedSums(1, [Sum(((0, 2.0),))], "float32").run([np.ones(BLOCK + 3, np.float32)], [output])
    assert (memory[:5] == 7).all() and (memory[BLOCK + 8 :] == 7).all() and (output == 2).all()
