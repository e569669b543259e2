"""Sums over whole tensors: exact against numpy, and the same however the tensor is cut into tiles."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from tests.workers.methods.whole import answered, known, noise, tiles_of
from workers.methods import tile
from workers.methods.reductions import L1, Gram, GramOfLines, unit_sums
from workers.methods.selections import L1Kept, Selection
from workers.methods.tile import Reduction


@pytest.mark.parametrize("count", [1, 15, 16, 17, 100, 1000])
def test_sums_do_not_depend_on_how_tiles_are_grouped(count: int, small_tiles: int):
    values = noise(count, 5) * 10.0 ** torch.randint(-8, 8, (count,), generator=torch.Generator().manual_seed(6))
    whole = unit_sums(values)
    assert len(whole) == math.ceil(count / small_tiles)
    for units in (1, 2, 5):
        step = units * small_tiles
        assert [total for at in range(0, count, step) for total in unit_sums(values[at : at + step])] == whole
    assert math.fsum(whole) == pytest.approx(math.fsum(values.double().tolist()), rel=1e-12, abs=1e-300)


def test_sums_of_a_tile_of_the_real_size_are_in_float64():
    values = torch.full((tile.TILE_ELEMENTS + 3,), 0.1)
    assert unit_sums(values) == pytest.approx([tile.TILE_ELEMENTS * float(values[0]), 3 * float(values[0])], rel=1e-15)


@pytest.mark.parametrize("units", [1, 4])
def test_dot_products_and_norms_are_those_of_the_whole_tensor(units: int, small_tiles: int):
    deltas = noise(100, 7).bfloat16()
    exact = deltas.double()
    for fact, expected in (
        (Gram(("model",), None, "float64"), exact @ exact),
        (L1("model", "base", "float32"), exact.abs().sum()),
    ):
        (found,) = np.ravel(known(deltas, fact, units))
        assert found == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("along", ["rows", "columns"])
@pytest.mark.parametrize("base", [None, "c"])
@pytest.mark.parametrize("shape", [(7, 11), (3, 5, 4), (2, 40)])
def test_products_of_lines_are_those_of_each_line(
    along: Any, base: str | None, shape: tuple[int, ...], small_tiles: int
):
    parents = {name: noise(math.prod(shape), seed) for seed, name in enumerate("abc")}
    facts: dict[Reduction, Any] = {}
    fact = GramOfLines(("a", "b"), base, along)
    by_torch = answered(tiles_of(parents, facts, shape=shape), facts, lambda tile: tile.known(fact))[0]
    vectors = [(parents[name].double() - (parents["c"].double() if base else 0)).view(shape) for name in "ab"]
    matrices = [each.reshape(-1, shape[-1]) if along == "rows" else each.reshape(shape[0], -1).T for each in vectors]
    for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
        expected = (matrices[a] * matrices[b]).sum(dim=1)
        assert by_torch[a, b].tolist() == pytest.approx(expected.tolist(), rel=1e-13, abs=1e-13)
    arrays, of_arrays = {name: values.numpy() for name, values in parents.items()}, {}
    for units in (1, 3):
        tiles = tiles_of(arrays, of_arrays, units=units, shape=shape)
        assert (answered(tiles, of_arrays, lambda tile: tile.known(fact))[0] == by_torch).all()
        of_arrays.clear()


def test_infinities_of_both_signs_sum_to_nan(small_tiles: int):
    parents = {"a": torch.tensor([math.inf] * small_tiles + [-math.inf] * small_tiles), "b": torch.ones(32)}
    facts: dict[Reduction, Any] = {}
    (products, *_) = answered(
        tiles_of(parents, facts), facts, lambda tile: tile.known(Gram(("a", "b"), None, "float64"))
    )
    assert np.isnan(products[0, 1])


def test_the_kept_mass_is_that_of_the_largest(small_tiles: int):
    deltas = noise(100, 8)
    kept = known(deltas, L1Kept("model", "base", Selection(most=30), "float32"))
    assert kept == pytest.approx(math.fsum(sorted(deltas.abs().double().tolist())[-30:]), rel=1e-14)
