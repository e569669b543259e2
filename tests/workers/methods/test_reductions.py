"""Facts about whole tensors: exact against numpy, and the same however the tensor is cut into tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.workers.methods.whole import answered, tiles_of
from workers.methods import reductions, tile
from workers.methods.kernels.ranks import Bracket
from workers.methods.reductions import (
    L1,
    MARGINS,
    Cutoff,
    Gram,
    GramOfLines,
    L1Kept,
    Magnitude,
    Sample,
    Selection,
    Variance,
    largest,
    share_of,
    unit_sums,
)
from workers.methods.tile import Reduction, Tile


def tiles_and_facts(deltas: Tensor, units: int = 1) -> tuple[list[Tile], dict[Reduction, Any]]:
    """Tiles of a model whose task vector is `deltas`, `units` of `TILE_ELEMENTS` in each."""
    facts: dict[Reduction, Any] = {}
    return tiles_of({"model": deltas, "base": torch.zeros_like(deltas)}, facts, units=units), facts


def kept_by_us(deltas: Tensor, density: float, units: int = 1) -> Tensor:
    """The mask over the whole tensor."""
    tiles, facts = tiles_and_facts(deltas, units)
    return torch.cat(
        answered(tiles, facts, lambda tile: largest(tile, Magnitude("model", "base"), share_of(tile, density)))
    ).bool()


def known(deltas: Tensor, fact: Reduction, units: int = 1) -> Any:
    """The value of a fact."""
    tiles, facts = tiles_and_facts(deltas, units)
    return answered(tiles, facts, lambda tile: tile.known(fact))[0]


def kept_by_numpy(deltas: Tensor, density: float) -> Tensor:
    """The first ⌊density · n⌋ of a stable descending sort by magnitude."""
    order = np.argsort(-deltas.abs().double().numpy(), kind="stable")
    mask = np.zeros(deltas.numel(), bool)
    mask[order[: max(1, int(density * deltas.numel()))]] = True
    return torch.from_numpy(mask)


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


ADVERSARIAL = {
    "all equal": torch.ones(100),
    "all zero": torch.zeros(70),
    "nearly all zero": torch.cat([torch.zeros(90), torch.tensor([1.0, -2.0, 1.0])]),
    "equal on both sides of every border": torch.tensor([1.0, -1.0, 2.0, -2.0]).repeat(30)[:117],
    "largest at the end": torch.arange(99.0),
    "largest first": -torch.arange(99.0).flip(0),
    "subnormal": torch.arange(80.0) * 1e-45,
    "neighbouring floats": torch.tensor([1.0]).view(torch.int32).add(torch.arange(100, dtype=torch.int32)).view(
        torch.float32
    ),
    "across every exponent": torch.tensor([(-2.0) ** exponent for exponent in range(-60, 60)]),
    "with infinity": torch.cat([torch.ones(40), torch.tensor([math.inf, -math.inf]), torch.zeros(10)]),
    "one element": torch.tensor([-0.0]),
    "steps of bfloat16": (noise(400, 1) * 1e-3).bfloat16().float(),
    "sign of zero": torch.tensor([0.0, -0.0] * 20),
}  # fmt: skip


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("density", [0.01, 0.2, 0.5, 0.77, 0.999])
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_the_largest_are_those_of_a_stable_sort(kind: str, density: float, units: int, small_tiles: int):
    deltas = ADVERSARIAL[kind]
    assert torch.equal(kept_by_us(deltas, density, units), kept_by_numpy(deltas, density))


@pytest.mark.parametrize("density", [0.2, 0.9])
def test_the_largest_are_found_across_tiles_of_the_real_size(density: float):
    # deltas of bfloat16 parents: few distinct magnitudes, a fifth of all elements may share the cutoff
    deltas = (noise(300_001, 2) * 0.02).bfloat16().float() - (noise(300_001, 2) * 0.02 + 1e-4).bfloat16().float()
    ours = kept_by_us(deltas, density)
    assert torch.equal(ours, kept_by_numpy(deltas, density))
    cutoff = deltas[ours].abs().min()
    assert ((deltas.abs() == cutoff) & ~ours).any()


def test_not_a_number_counts_as_the_largest():
    deltas = torch.tensor([1.0, math.nan, 3.0, -math.inf])
    assert kept_by_us(deltas, 0.25).tolist() == [False, True, False, False]
    assert kept_by_us(deltas, 0.5).tolist() == [False, True, False, True]


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


def test_a_magnitude_is_looked_for_again_where_a_sample_misled():
    # every element that a regular sample could look at is zero, and all others are not
    for step in (7, 61, 64):
        deltas = noise(150_000, 9)
        deltas[::step] = 0
        for density in (0.001, 1 - 1 / step):
            assert torch.equal(kept_by_us(deltas, density), kept_by_numpy(deltas, density))


def test_ranks_of_one_tensor_share_one_sample_and_none_keeps_nothing(small_tiles: int):
    deltas = ADVERSARIAL["steps of bfloat16"]
    tiles, facts = tiles_and_facts(deltas)
    score = Magnitude("model", "base")
    for count in (400, 399, 37, 1, 0):
        mask = torch.cat(answered(tiles, facts, lambda tile, count=count: largest(tile, score, count)))
        assert torch.equal(mask.bool(), kept_by_numpy(deltas, count / 400) if count else torch.zeros(400).bool())
    assert [fact for fact in facts if isinstance(fact, Sample)] == [Sample(score)]


def test_the_cutoffs_of_a_grid_are_found_in_one_look_as_alone(small_tiles: int, monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(3)
    raw: Any = {name: rng.integers(-90, 90, 2000).astype(np.float32) for name in ("a", "b", "base")}
    scores = Magnitude("a", "base"), Variance(("a", "b"), "base"), Magnitude("b", "base")
    asked = [Cutoff(score, count, margin) for count in (1, 30, 700, 2000) for margin in MARGINS for score in scores]
    facts: dict[Reduction, Any] = {}
    tiles = tiles_of(raw, facts, units=50)
    for fact in asked:
        answered(tiles, facts, fact.ask)
    looks: list[int] = []
    for name in ("bracketed", "magnitudes_bracketed"):
        found = getattr(reductions, name)
        monkeypatch.setattr(reductions, name, lambda *of, found=found, **unit: looks.append(1) or found(*of, **unit))
    shares: dict[Cutoff, list[Bracket]] = {}
    for each in tiles:
        together = replace(each, asked=asked, _memory={})
        for fact in asked:
            shares.setdefault(fact, []).extend(fact.of(together))
    assert len(looks) == len(scores) * len(tiles) and len(tiles) == 3
    for fact in asked:
        alone = [fact.of(replace(each, _memory={}))[0] for each in tiles]
        assert [each.counts.tolist() for each in shares[fact]] == [each.counts.tolist() for each in alone]
        assert [each.between.tolist() for each in shares[fact]] == [each.between.tolist() for each in alone]
        ranked = np.sort(np.concatenate([fact.score.on_host(replace(each, _memory={})) for each in tiles]))
        threshold = fact.combine(shares[fact])
        assert (threshold is None and fact.margin is not None) or threshold.bits == ranked[-fact.count]


@pytest.mark.parametrize("elements", [1, 15, 16, 83])
@pytest.mark.parametrize("limits", [(0.0, 2.0), (1.0, 1.0), (1.0, 3.0)])
def test_tensors_of_torch_are_bracketed_as_arrays_are(elements: int, limits: tuple[float, float], small_tiles: int):
    rng = np.random.default_rng(elements)
    raw = {"a": rng.integers(-4, 5, elements).astype(np.float32), "base": np.zeros(elements, np.float32)}
    low, high = (int(np.float32(limit).view(np.int32)) for limit in limits)
    (found,), (expected,) = (
        Magnitude("a", "base").bracketed(Tile("x", 0, of, {}), [(low, high)])
        for of in ({name: torch.from_numpy(each) for name, each in raw.items()}, raw)
    )
    assert found.counts.tolist() == expected.counts.tolist()
    assert found.between.tolist() == expected.between.tolist()
