"""fisher against the equation of the paper in numpy, and its pass against its formula, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jobs.merge_tasks import Setting, fisher_of
from tests.workers.methods.whole import answered, tiles_of
from workers.merging.tiles import merge_tile, pass_of
from workers.methods.fisher import FISHERS
from workers.methods.running import run

Numbers = NDArray[Any]

NAMES = ("a", "b", "c")
ELEMENTS = 3000


def setting(weights: Sequence[float], floor: float = 1e-6) -> Setting:
    shares = tuple(each / sum(weights) for each in weights)
    return Setting("fisher", NAMES[: len(weights)], None, (("weight", shares), ("floor", floor)))


def parents(models: Mapping[str, Numbers], fishers: Mapping[str, Numbers]) -> tuple[dict[str, Any], dict[Any, Any]]:
    """What a tile has of the models and their Fisher information, and the facts."""
    raw = {**models, **{fisher_of(name): each.astype(np.float32) for name, each in fishers.items()}}
    return raw, {FISHERS: {name: float(each.mean(dtype=np.float64)) for name, each in fishers.items()}}


def merged(models: Mapping[str, Numbers], fishers: Mapping[str, Numbers], chosen: Setting, dtype: str) -> Numbers:
    raw, facts = parents(models, fishers)
    parts = answered(tiles_of(raw, facts), facts, lambda tile: merge_tile(tile, chosen, dtype, ""))
    return torch.cat(parts).numpy()


@pytest.fixture
def models() -> dict[str, Numbers]:
    rng = np.random.default_rng(7)
    return {name: rng.standard_normal(ELEMENTS).astype(np.float32) for name in NAMES}


@pytest.fixture
def fishers() -> dict[str, Numbers]:
    """As gradients have it: over many orders of magnitude, far below one, and of another scale in each model."""
    rng = np.random.default_rng(8)
    return {
        name: (10.0 ** rng.uniform(-16, -9 + index, ELEMENTS)).astype(np.float32) for index, name in enumerate(NAMES)
    }


def test_it_is_the_papers_equation(models: dict[str, Numbers], fishers: dict[str, Numbers], small_tiles: int):
    weights = (0.5, 0.3, 0.2)
    shares = {name: w * fishers[name].astype(np.float64) for name, w in zip(NAMES, weights, strict=True)}
    expected = sum(shares[name] * models[name] for name in NAMES) / sum(shares.values())
    assert merged(models, fishers, setting(weights, 1e-12), "F64") == pytest.approx(expected, rel=1e-6)
    expected = expected.astype(np.float32)
    assert merged(models, fishers, setting(weights, 1e-12), "F32") == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_floor_is_a_fraction_of_the_mean_of_all_models(models: dict[str, Numbers], fishers: dict[str, Numbers]):
    mean = np.mean([fishers[name].astype(np.float64) for name in NAMES])
    floored = {name: np.maximum(fishers[name].astype(np.float64), 0.25 * mean) for name in NAMES}
    expected = sum(floored[name] * models[name] for name in NAMES) / sum(floored.values())
    assert merged(models, fishers, setting((1, 1, 1), 0.25), "F64") == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_elements_without_information_are_the_weighted_mean(models: dict[str, Numbers], fishers: dict[str, Numbers]):
    weights = (0.6, 0.4)
    two = {name: fishers[name] * (np.arange(ELEMENTS) % 3 > 0) for name in NAMES[:2]}
    expected = sum(w * models[name].astype(np.float64) for name, w in zip(NAMES, weights, strict=False))
    found = merged(models, two, setting(weights), "F64")
    assert found[::3] == pytest.approx(expected[::3], rel=1e-12, abs=1e-15)
    assert not np.allclose(found, expected, rtol=1e-3)
    for lacking in ({name: 0 * each for name, each in two.items()}, {"a": two["a"]}):
        assert merged(models, lacking, setting(weights), "F64") == pytest.approx(expected, rel=1e-14, abs=1e-15)


def test_equal_information_is_linear_within_an_ulp_and_equal_models_stay(models: dict[str, Numbers]):
    fishers = dict.fromkeys(NAMES[:2], np.full(ELEMENTS, 3e-11, np.float32))
    linear = Setting("linear", NAMES[:2], None, (("weight", (0.5, 0.5)), ("normalize", False)))
    expected = merged(models, fishers, linear, "F32")
    found = merged(models, fishers, setting((1, 1)), "F32")
    largest = np.maximum(np.abs(models["a"]), np.abs(models["b"]))
    assert (np.abs(found - expected) <= np.spacing(largest)).all()
    alike = {**models, "b": models["a"]}
    assert np.array_equal(merged(alike, fishers, setting((0.3, 0.7)), "F32"), models["a"])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_pass_has_the_bits_of_the_formula(
    models: dict[str, Numbers], fishers: dict[str, Numbers], dtype: str, small_tiles: int
):
    fishers["b"][:7] = 0
    models["c"][5] = np.nan
    chosen = [setting((1, 2)), setting((1, 1)), setting((0.2, 0.5, 0.3)), setting((1, 2), 0.5)]
    raw, facts = parents(models, fishers)
    named = {"float32": "F32", "float64": "F64"}[dtype]
    for tile in tiles_of(raw, facts):
        passes = [pass_of(tile, each, named, "float32") for each in chosen]
        outputs = [np.empty(tile.elements, dtype) for _ in chosen]
        broken, overflowed = run([each for each in passes if each is not None], tile, outputs, dtype)
        for each, output in zip(chosen, outputs, strict=True):
            expected = merge_tile(tile, each, named, "float32").numpy()
            assert output.tobytes() == expected.tobytes()
        assert broken == {name: name == "c" and tile.start == 0 for name in raw}
        assert overflowed == [False, False, tile.start == 0, False]
