"""The compiled sums follow the tree of `reductions.unit_sums` to the last bit."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.workers.methods.whole import answered, tiles_of
from workers.methods.coins import Coin
from workers.methods.kernels.masks import Mask
from workers.methods.kernels.short_products import products_of_two
from workers.methods.kernels.unit_sums import Product, kept_sums, unit_sums
from workers.methods.ranking import Variance
from workers.methods.reductions import L1, Gram
from workers.methods.selections import L1Kept, Selection, SquaresSelected
from workers.methods.tile import TILE_ELEMENTS, Array, Reduction, Tile, as_tensor, torch_named

DTYPES = (ml_dtypes.bfloat16, np.float16, np.float32, np.float64)


def by_tree(values: torch.Tensor, unit: int) -> list[float]:
    """The definition: the second half of a unit is added to the first until one number is left."""
    rest = np.zeros((-(-values.numel() // unit), unit))
    rest.flat[: values.numel()] = values.double().numpy()
    while rest.shape[1] > 1:
        rest = rest[:, : rest.shape[1] // 2] + rest[:, rest.shape[1] // 2 :]
    return rest[:, 0].tolist()


def bits(sums: NDArray[np.float64] | list[float]) -> list[int]:
    return np.asarray(sums, np.float64).view(np.int64).tolist()


@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.parametrize("dtypes", [DTYPES, DTYPES[:1] * 4], ids=["each", "bfloat16"])
@pytest.mark.parametrize(
    ("elements", "unit"),
    [(1, 4), (16, 16), (117, 16), (1000, 32), (5000, 1024), (9001, 4096), (300_001, TILE_ELEMENTS)],
)
def test_sums_have_the_bits_of_the_tree(elements: int, unit: int, dtypes: Any, arithmetic: str):
    """In the second case parent 2 is in differences alone, whose lines are filled without one of its own."""
    rng = np.random.default_rng(elements)
    values = [rng.standard_normal(elements) * 10.0 ** rng.integers(-20, 4, elements) for _ in dtypes]
    parents: list[Array] = [each.astype(dtype) for each, dtype in zip(values, dtypes, strict=True)]
    for parent in parents:
        parent[rng.random(elements) < 0.1] = -0.0
    products = [Product(0, 1), Product((3, 2), (1, 2)), Product((2, 0)), Product(3), Product((3, 1))]
    products += [Product(1, 1), Product((3, 2), (3, 2))]
    a, b, c, d = (as_tensor(each).to(torch_named(arithmetic)) for each in parents)
    values = [a.double() * b.double(), (d - c).double() * (b - c).double(), (c - a).abs(), d.abs(), (d - b).abs()]
    values += [b.double() ** 2, (d - c).double() ** 2]
    sums = unit_sums(parents, products, unit=unit, dtype=arithmetic)
    for of_product, expected in zip(sums.T, values, strict=True):
        assert bits(of_product) == bits(by_tree(expected, unit))


@pytest.mark.parametrize("based", [False, True], ids=["models", "task vectors"])
@pytest.mark.parametrize(
    ("elements", "unit"),
    [(2, 2048), (2048, 2048), (5002, 2048), (9002, 4096), (20_480, 4096), (300_002, TILE_ELEMENTS)],
)
def test_the_products_of_two_vectors_of_bfloat16_have_the_bits_of_the_tree(elements: int, unit: int, based: bool):
    rng = np.random.default_rng(elements)
    parents: list[Array] = [
        (rng.standard_normal(elements) * 10.0 ** rng.integers(-20, 4, elements)).astype(ml_dtypes.bfloat16)
        for _ in range(3)
    ]
    for parent in parents:
        parent[rng.random(elements) < 0.1] = -0.0
    parents[1][-1] = math.inf  # spoils the last unit alone
    a, b, c = (as_tensor(each).double() for each in parents)
    vectors = (c - a, b - a) if based else (c, b)
    sums = products_of_two(parents[2], parents[1], parents[0] if based else None, unit=unit)
    for of_product, (x, y) in zip(sums.T, [(0, 0), (0, 1), (1, 1)], strict=True):
        expected = by_tree(vectors[x] * vectors[y], unit)
        assert bits(np.nan_to_num(of_product, nan=1e301)) == bits(np.nan_to_num(expected, nan=1e301))


@pytest.mark.parametrize("arithmetic", ["float32", "float64"])
@pytest.mark.parametrize("dtypes", [DTYPES[:1] * 2, DTYPES[1:3], DTYPES[3:] * 2], ids=str)
@pytest.mark.parametrize(("elements", "unit"), [(1, 4), (117, 16), (5000, 1024), (300_001, TILE_ELEMENTS)])
def test_sums_of_what_is_kept_have_the_bits_of_the_tree(elements: int, unit: int, dtypes: Any, arithmetic: str):
    rng = np.random.default_rng(elements)
    model, base = (rng.standard_normal(elements).astype(dtype) for dtype in dtypes)
    model[elements // 2] = math.inf  # spoils the sum of its unit, kept or not
    masks = [rng.random(elements) < share for share in (0, 0.1, 0.5, 1)]
    a, b = (as_tensor(each).to(torch_named(arithmetic)) for each in (model, base))
    words = rng.integers(0, 1 << 12, elements, np.uint16)
    for bit, mask in enumerate(masks):
        words += mask * np.uint16(1 << (12 + bit))
    given = [Mask(words, 12 + bit) for bit in range(4)], [Mask(mask.astype(np.uint16)) for mask in masks]
    mixed = [*given[0][:2], *given[1][2:]]
    for squares, of_call in product((False, True), (*given, mixed)):
        sizes = (a - b).double().square() if squares else (a - b).abs()
        found = kept_sums(model, base, of_call, squares=squares, unit=unit, dtype=arithmetic)
        for of_mask, mask in zip(found.T, masks, strict=True):
            expected = by_tree(sizes * torch.from_numpy(mask.astype(np.float64)), unit)
            assert bits(np.nan_to_num(of_mask, posinf=1e300)) == bits(np.nan_to_num(expected, posinf=1e300))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_unit_alone(value: float):
    parent = np.ones(48, np.float32)
    parent[20] = value
    sums = unit_sums([parent], [Product(0, 0), Product(0)], unit=16, dtype="float32")
    assert np.isfinite(sums).tolist() == [[True, True], [False, False], [True, True]]


def test_facts_are_equal_on_arrays_and_on_tensors():
    """Tensors take the path of a GPU."""
    rng = np.random.default_rng(3)
    arrays = {name: rng.standard_normal(200_000).astype(ml_dtypes.bfloat16) for name in "abc"}
    on_host = Tile("x", 0, arrays, {})
    elsewhere = Tile("x", 0, {name: as_tensor(each) for name, each in arrays.items()}, {})
    for fact in (
        Gram(("a", "b"), None, "float64"),
        L1("a", "b", "float32"),
        L1("a", "b", "float64"),
        Gram((*"abc",), None, "float32"),
    ):
        assert bits(np.array(fact.of(on_host))) == bits(np.array(fact.of(elsewhere)))
    for dtype in ("float32", "float64"):
        deltas = Gram(("a", "b"), "c", dtype)
        assert bits(np.array(deltas.of(on_host))) == bits(np.array(deltas.of(elsewhere)))


def test_a_gram_matrix_is_that_of_numpy():
    rng = np.random.default_rng(4)
    arrays = {name: rng.integers(-9, 10, 1000).astype(np.float32) for name in "abcd"}
    tile = Tile("x", 0, arrays, {})
    for base in (None, "d"):
        vectors = np.array([arrays[name] - (arrays[base] if base else 0) for name in "abc"])
        fact = Gram((*"abc",), base, "float32")
        assert (fact.combine(fact.of(tile)) == vectors @ vectors.T).all()  # integers: every sum is exact


@pytest.mark.parametrize(
    "kept",
    [Selection(most=90_000), Selection(most=50_000, but=7000), Selection(but=1), Selection(coin=Coin("dare_ties", 0.3)),
     Selection(most=3), Selection(coin=Coin("dare_ties", 1.0))],
)  # fmt: skip
def test_the_sum_of_what_is_kept_is_equal_on_arrays_and_on_tensors(kept: Selection):
    rng = np.random.default_rng(5)
    arrays = {name: rng.standard_normal(200_000).astype(ml_dtypes.bfloat16) for name in "ab"}  # with many equal |δ|
    fact = L1Kept("a", "b", kept, "float32")
    known: list[list[int]] = []
    for raw in (arrays, {name: as_tensor(each) for name, each in arrays.items()}):
        facts: dict[Reduction, Any] = {}
        tiles = tiles_of(raw, facts)
        known.append(bits([entry for share in answered(tiles, facts, fact.of) for entry in share]))
    assert known[0] == known[1]


def test_settings_of_a_grid_are_summed_together_as_alone():
    rng = np.random.default_rng(6)
    arrays = {name: rng.standard_normal(300_000).astype(ml_dtypes.bfloat16) for name in "abc"}
    kept = [Selection(coin=Coin("dare_linear", share / 20)) for share in range(1, 20)]
    kept += [Selection(coin=Coin("della", 0.5, spread / 10)) for spread in range(4)] + [Selection(coin=Coin("d", 0.5))]
    kept += [Selection(most=count) for count in (9, 70_000)] + [Selection(most=70_000, but=900)]
    asked: list[Reduction] = [L1Kept(model, "c", each, "float32") for each in kept for model in "ab"]
    counts = (None, 0, 7, 90_000)
    asked += [
        SquaresSelected(model, "c", Variance(("a", "b"), "c"), each, "float64") for each in counts for model in "ab"
    ]
    facts: dict[Reduction, Any] = {}
    tiles = tiles_of(arrays, facts, shape=(600, 500))
    for fact in asked:
        answered(tiles, facts, fact.ask)
    for tile in tiles:
        together = replace(tile, asked=asked, _memory={})
        for fact in asked:
            assert bits(np.array(fact.of(together))) == bits(np.array(fact.of(replace(tile, _memory={}))))
