"""della and della_linear: probabilities by rank against arithmetic on paper, and how often they hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jobs.merge_tasks import Setting
from tests.workers.methods.test_passes import parents
from tests.workers.methods.whole import change_tiles, tiles_of
from workers.merging.tiles import pass_of
from workers.methods import coins, selections
from workers.methods.coins import DRAWN, Coin, DrawnBefore, drawn_on_host
from workers.methods.running import run
from workers.methods.tile import NotYetKnown, Reduction


def chances(deltas: list[float], shape: tuple[int, ...], coin: Coin, units: int = 1) -> list[float]:
    """The probability with which each element is kept: the greatest number below which random bits keep it."""
    parents = {"x": torch.tensor(deltas) + 1, "base": torch.ones(len(deltas))}
    limits = np.sort(coin.limits(shape[-1]))
    found: list[float] = []
    for tile in tiles_of(parents, {}, shape=shape, units=units):
        kept = 0
        for limit in limits:
            drawn = replace(tile, _memory={("bits", coin.method, "x"): np.full(tile.elements, limit - 1, np.uint32)})
            kept += drawn_on_host(drawn, coin, "x", "base").array().astype(int)
        found.extend(limits[kept - 1] / 2**32)
    return found


HALF = Coin("della", 0.5, 0.25)


def test_the_probability_grows_by_equal_steps_with_the_rank_in_the_row():
    assert chances([3, -1, 2], (3,), HALF) == pytest.approx([0.75, 0.25, 0.5])
    assert chances([3, -1, 2, 8, 9, 7], (2, 3), HALF) == pytest.approx([0.75, 0.25, 0.5, 0.5, 0.75, 0.25])


def test_of_equal_magnitudes_the_first_counts_as_the_smaller():
    assert chances([2, -2, 2, 0, 0], (5,), HALF) == pytest.approx([0.5, 0.625, 0.75, 0.25, 0.375])


def test_the_rows_of_more_axes_are_along_the_last():
    assert chances([1, 2, 2, 1, 4, 3, 1, 9], (2, 2, 2), HALF) == [0.25, 0.75, 0.75, 0.25, 0.75, 0.25, 0.25, 0.75]


@pytest.mark.parametrize("units", [1, 3])
def test_rows_that_tiles_cut_are_ranked_whole(small_tiles: int, units: int):
    deltas = torch.randn(7 * 11, generator=torch.Generator().manual_seed(3))
    ranks = deltas.abs().view(7, 11).argsort(dim=1).argsort(dim=1)
    expected = 0.25 + 0.5 * ranks.flatten() / 10
    assert chances(deltas.tolist(), (7, 11), HALF, units) == pytest.approx(expected.tolist())


def kept(merge: Any, deltas: Tensor, **more: Any) -> Tensor:
    """What is left of the task vector of one model."""
    parameters = {"weight": (1.0,), "density": (0.5,), "epsilon": (0.25,), "rescale": False, **more}
    merged = merge("della_linear", {"x": deltas.flatten()}, base={"b": torch.zeros(deltas.numel())}, **parameters)
    return merged.view(deltas.shape)


def test_large_elements_are_kept_more_often(merge: Any):
    deltas = torch.arange(1.0, 6.0).repeat(4000, 1)  # p = ¼, ⅜, ½, ⅝, ¾; three standard deviations are 0.024
    left = kept(merge, deltas, shape=(4000, 5))
    assert set(left[:, 4].tolist()) == {0.0, 5.0}
    shares = left.count_nonzero(dim=0) / 4000
    assert shares.tolist() == pytest.approx([0.25, 0.375, 0.5, 0.625, 0.75], abs=0.024)


@pytest.mark.parametrize(("shape", "epsilon"), [((4000, 1), 0.25), ((1000, 4), 0.0)])
def test_rows_of_one_element_and_an_epsilon_of_zero_leave_the_density(
    merge: Any, shape: tuple[int, int], epsilon: float
):
    left = kept(merge, torch.ones(shape), shape=shape, density=(0.3,), epsilon=(epsilon,))
    assert int(left.count_nonzero()) / 4000 == pytest.approx(0.3, abs=0.022)


def test_no_tiling_changes_an_element(merge: Any, monkeypatch: pytest.MonkeyPatch):
    deltas = torch.randn(40, 13, generator=torch.Generator().manual_seed(1))
    whole = kept(merge, deltas, shape=(40, 13), rescale=True)
    change_tiles(monkeypatch, 16)
    for units in (1, 3):
        assert torch.equal(kept(merge, deltas, shape=(40, 13), rescale=True, units=units), whole)


def test_rescale_restores_the_sum_of_magnitudes(merge: Any):
    deltas = torch.randn(40, 13, generator=torch.Generator().manual_seed(1))
    left = kept(merge, deltas, shape=(40, 13), rescale=True)
    assert float(left.abs().sum()) == pytest.approx(float(deltas.abs().sum()), rel=1e-6)


def test_the_seed_decides(merge: Any):
    deltas = torch.ones(8, 8)
    assert torch.equal(kept(merge, deltas, shape=(8, 8)), kept(merge, deltas, shape=(8, 8), seed=0))
    assert not torch.equal(kept(merge, deltas, shape=(8, 8)), kept(merge, deltas, shape=(8, 8), seed=1))


def test_della_elects_a_sign_and_averages(merge: Any):
    # every element of x is 3 and of y −1: where both are kept, x alone agrees; where y alone is kept, y is elected
    models = {"x": torch.full((64,), 3.0), "y": torch.full((64,), -1.0)}
    parameters = {"weight": (1.0, 2.0), "density": (0.5, 0.5), "epsilon": (0.1, 0.1), "rescale": False, "seed": 4}
    merged = merge("della", models, base={"b": torch.zeros(64)}, **parameters)
    assert set(merged.tolist()) == {3.0, -1.0, 0.0}


@pytest.mark.parametrize("method", ["della", "dare_ties"])
@pytest.mark.parametrize("settings", [1, 3, 20])
@pytest.mark.parametrize("share", [1.0, 0.3])
def test_what_a_norm_has_drawn_is_not_drawn_again(
    small_tiles: int, monkeypatch: pytest.MonkeyPatch, method: str, settings: int, share: float
):
    """Of some settings the second model keeps all. With a share, there is room for so much of what is drawn."""
    raw: Any = parents(np.random.default_rng(2), 11 * 13, "BF16")

    def setting(number: int) -> Setting:
        densities = 0.3 + number / 50, 1.0 if number % 3 == 2 else 0.8 - number / 50
        own = (("epsilon", (0.1, 0.2)),) if method == "della" else ()
        given = ("weight", (0.3, 0.6)), ("density", densities), *own, ("normalize", True), ("rescale", True)
        return Setting(method, ("a", "b"), "base", (*given, ("lambda", 1.0)))

    merges = [setting(number) for number in range(settings)]
    draw = coins.draw
    drawn: list[int] = []

    def counted(tile: Any, coins: Any, model: str, base: str) -> Any:
        drawn.append(len(coins))
        return draw(tile, coins, model, base)

    for module in (coins, selections):
        monkeypatch.setattr(module, "draw", counted)

    def merged(facts: dict[Reduction, Any]) -> bytes:
        tiles, asked = tiles_of(raw, facts, units=3, seed=3, shape=(11, 13)), dict[Reduction, None]()
        for each in merges:
            with pytest.raises(NotYetKnown) as question:
                pass_of(tiles[0], each, "F32", "")
            asked |= dict.fromkeys(question.value.reductions)
        tiles = [replace(tile, asked=[*asked]) for tile in tiles]
        facts |= {fact: fact.combine([share for tile in tiles for share in fact.of(tile)]) for fact in asked}
        passes: list[Any] = [pass_of(tiles[0], each, "F32", "") for each in merges]
        drawn.clear()
        found = b""
        for tile in tiles_of(raw, facts, units=4, seed=3, shape=(11, 13)):
            outputs = [np.zeros(tile.elements, raw["base"].dtype) for _ in passes]
            run(passes, tile, outputs, "float32")
            found += b"".join(output.tobytes() for output in outputs)
        return found

    expected, of_merge = merged({}), sum(drawn)
    everything = DrawnBefore()
    assert merged({DRAWN: everything}) == expected and not drawn
    monkeypatch.setattr(coins, "MOST_DRAWN", everything.bytes * share)
    some = DrawnBefore()
    assert merged({DRAWN: some}) == expected
    assert (not drawn) if share == 1 else 0 < sum(drawn) < of_merge
