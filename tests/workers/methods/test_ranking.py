"""Ranks within whole tensors: exact against a stable sort, however the tensor is cut into tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.workers.methods.whole import answered, noise, tiles_and_facts, tiles_of
from workers.methods import ranking
from workers.methods.kernels.ranks import Bracket
from workers.methods.ranking import MARGINS, Cutoff, Magnitude, Sample, Variance, largest, share_of
from workers.methods.tile import Reduction, Tile, units_of


def kept_by_us(deltas: Tensor, density: float, units: int = 1) -> Tensor:
    """The mask over the whole tensor."""
    tiles, facts = tiles_and_facts(deltas, units)
    return torch.cat(
        answered(tiles, facts, lambda tile: largest(tile, Magnitude("model", "base"), share_of(tile, density)))
    ).bool()


def kept_by_numpy(deltas: Tensor, density: float) -> Tensor:
    """The first ⌊density · n⌋ of a stable descending sort by magnitude."""
    order = np.argsort(-deltas.abs().double().numpy(), kind="stable")
    mask = np.zeros(deltas.numel(), bool)
    mask[order[: max(1, int(density * deltas.numel()))]] = True
    return torch.from_numpy(mask)


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
        found = getattr(ranking, name)
        monkeypatch.setattr(ranking, name, lambda *of, found=found, **unit: looks.append(1) or found(*of, **unit))
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
        if threshold is None:
            assert fact.margin is not None
            continue
        assert threshold.bits == ranked[-fact.count]
        assert threshold.equals == fact.count - (ranked > threshold.bits).sum()
        units = [unit for each in tiles for unit in units_of(fact.score.on_host(replace(each, _memory={})))]
        assert threshold.equal_before == [0, *np.cumsum([(unit == threshold.bits).sum() for unit in units])]


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
