"""regmean against least squares by numpy, and its pass against its formula, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from jobs.errors import MergeyardError
from jobs.merge_tasks import Setting
from tests.workers.methods.whole import answered, tiles_of
from workers.merging.tiles import merge_tile, pass_of
from workers.methods.regmean import GRAMS, Grams, Kept
from workers.methods.running import run

Numbers = NDArray[np.float64]

NAMES = ("a", "b", "c")
OUT, IN = 7, 12


def setting(weights: Sequence[float], alpha: float) -> Setting:
    total = sum(weights)
    shares = tuple(each / total for each in weights)
    return Setting("regmean", NAMES[: len(weights)], None, (("weight", shares), ("alpha", alpha)))


def given(grams: Mapping[str, Numbers]) -> dict[Any, Any]:
    """The facts with Gram matrices; one of two axes is a single block."""
    blocks = {name: (gram if gram.ndim == 3 else gram[np.newaxis]).astype(np.float32) for name, gram in grams.items()}
    return {GRAMS: Grams(tuple((name, "gram") for name in grams), blocks.__getitem__, Kept())}


def merged(models: Mapping[str, Numbers], facts: dict[Any, Any], chosen: Setting, units: int = 1) -> Numbers:
    flat: Any = {name: values.reshape(-1) for name, values in models.items()}
    tiles = tiles_of(flat, facts, units=units, shape=(OUT, IN))
    parts = answered(tiles, facts, lambda tile: merge_tile(tile, chosen, "F64", ""))
    return torch.cat(parts).numpy().reshape(OUT, IN)


@pytest.fixture
def layers() -> tuple[dict[str, Numbers], dict[str, Numbers]]:
    """The weights of three layers, and inputs of each: 40 tokens, with a scale and correlations of their own."""
    rng = np.random.default_rng(5)
    mixes = {name: np.eye(IN) + 0.5 * rng.standard_normal((IN, IN)) for name in NAMES}
    inputs = {
        name: rng.standard_normal((40, IN)) @ mix * (1 + index) for index, (name, mix) in enumerate(mixes.items())
    }
    return {name: rng.standard_normal((OUT, IN)) for name in NAMES}, inputs


def gram(inputs: Numbers) -> Numbers:
    return inputs.T @ inputs / len(inputs)


def test_the_merge_solves_the_least_squares_problem(
    layers: tuple[dict[str, Numbers], dict[str, Numbers]], small_tiles: int
):
    models, inputs = layers
    weights = (0.5, 0.3, 0.2)
    rows = [np.sqrt(weight) * inputs[name] for weight, name in zip(weights, NAMES, strict=True)]
    outputs = [row @ models[name].T for row, name in zip(rows, NAMES, strict=True)]
    expected = np.linalg.lstsq(np.vstack(rows), np.vstack(outputs), rcond=None)[0].T
    found = merged(models, given({name: gram(inputs[name]) for name in NAMES}), setting(weights, 1.0))
    assert found == pytest.approx(expected, abs=2e-4)  # alpha is 1 − 10⁻⁶ at most, and the matrices are float32


@pytest.mark.parametrize("alpha", [0.0, 0.6, 0.9])
def test_elements_beside_the_diagonal_count_alpha_times(
    layers: tuple[dict[str, Numbers], dict[str, Numbers]], alpha: float, small_tiles: int
):
    models, inputs = layers
    weights = (0.25, 0.75)
    grams = {name: gram(inputs[name]).astype(np.float32).astype(np.float64) for name in "ab"}
    reduced = {name: alpha * each + (1 - alpha) * np.diag(np.diag(each)) for name, each in grams.items()}
    left = sum(weight * reduced[name] for name, weight in zip("ab", weights, strict=True))
    right = sum(weight * reduced[name] @ models[name].T for name, weight in zip("ab", weights, strict=True))
    found = merged({name: models[name] for name in "ab"}, given(grams), setting(weights, alpha))
    assert found == pytest.approx(np.linalg.solve(left, right).T, rel=1e-9, abs=1e-11)


def test_equal_gram_matrices_give_the_weighted_mean(
    layers: tuple[dict[str, Numbers], dict[str, Numbers]], small_tiles: int
):
    models, inputs = layers
    found = merged(models, given(dict.fromkeys(NAMES, gram(inputs["a"]))), setting((0.5, 0.3, 0.2), 0.9))
    assert found == pytest.approx(0.5 * models["a"] + 0.3 * models["b"] + 0.2 * models["c"], rel=1e-9, abs=1e-11)


def test_channels_without_inputs_get_the_weighted_mean_and_those_of_one_model_its_weights(
    layers: tuple[dict[str, Numbers], dict[str, Numbers]], small_tiles: int
):
    models, inputs = layers
    for name in NAMES:
        inputs[name][:, 3] = 0
        inputs[name][:, 8] *= name == "b"
    found = merged(models, given({name: gram(inputs[name]) for name in NAMES}), setting((0.5, 0.3, 0.2), 0.0))
    assert found[:, 3] == pytest.approx(0.5 * models["a"][:, 3] + 0.3 * models["b"][:, 3] + 0.2 * models["c"][:, 3])
    assert found[:, 8] == pytest.approx(models["b"][:, 8])


def test_fewer_tokens_than_channels_are_enough(layers: tuple[dict[str, Numbers], dict[str, Numbers]], small_tiles: int):
    models, inputs = layers
    few = {name: inputs[name][:2] for name in NAMES}
    found = merged(models, given({name: gram(few[name]) for name in NAMES}), setting((1, 1, 1), 1.0))
    for name in NAMES:  # six tokens in twelve channels: each output can be kept
        assert few[name] @ found.T == pytest.approx(few[name] @ models[name].T, abs=1e-2)


def test_blocks_are_merged_as_if_each_were_a_layer(
    layers: tuple[dict[str, Numbers], dict[str, Numbers]], small_tiles: int
):
    models, inputs = layers
    blocks: dict[str, Numbers] = {}
    for name in NAMES:
        blocks[name] = np.zeros((3, 5, 5))
        for number, first in enumerate((0, 5, 10)):
            part = gram(inputs[name][:, first : first + 5])
            blocks[name][number, : len(part), : len(part)] = part
    found = merged(models, given(blocks), setting((0.5, 0.3, 0.2), 0.9))
    for first in (0, 5, 10):
        size = min(5, IN - first)
        mixed = [
            weight * (0.9 * part + 0.1 * np.diag(np.diag(part)))
            for name, weight in zip(NAMES, (0.5, 0.3, 0.2), strict=True)
            for part in [gram(inputs[name][:, first : first + size])]
        ]
        right = sum(m @ models[name][:, first : first + size].T for m, name in zip(mixed, NAMES, strict=True))
        expected = np.linalg.solve(sum(mixed), right).T
        assert found[:, first : first + size] == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("units", [1, 3])
def test_a_pass_has_the_bits_of_the_formula_whatever_the_tiles(
    layers: tuple[dict[str, Numbers], dict[str, Numbers]], units: int, small_tiles: int
):
    models, inputs = layers
    facts = given({name: gram(inputs[name]) for name in NAMES})
    raw: Any = {name: values.astype(np.float32).reshape(-1) for name, values in models.items()}
    settings = [setting((0.5, 0.3, 0.2), 0.9), setting((0.1, 0.8, 0.1), 0.5)]
    whole = tiles_of(raw, facts, units=9, shape=(OUT, IN))
    expected = [torch.cat([merge_tile(tile, each, "F32", "") for tile in whole]).numpy() for each in settings]
    for tile in tiles_of(raw, facts, units=units, shape=(OUT, IN)):
        outputs = [np.zeros(tile.elements, np.float32) for _ in settings]
        passes = [pass_of(tile, each, "F32", "") for each in settings]
        broken, overflowed = run([each for each in passes if each], tile, outputs, "float32")
        assert not any(broken.values()) and not any(overflowed)
        for output, of_tensor in zip(outputs, expected, strict=True):
            assert (output == of_tensor[tile.start : tile.start + tile.elements]).all()


def test_a_model_without_a_matrix_leaves_the_weighted_mean_and_one_of_weight_0_does_not_count(
    layers: tuple[dict[str, Numbers], dict[str, Numbers]], small_tiles: int
):
    models, inputs = layers
    facts = given({name: gram(inputs[name]) for name in "ab"})
    found = merged(models, facts, setting((0.5, 0.3, 0.2), 0.9))
    assert found == pytest.approx(0.5 * models["a"] + 0.3 * models["b"] + 0.2 * models["c"], rel=1e-9, abs=1e-11)
    two = merged(models, facts, setting((0.5, 0.5), 0.9))
    assert abs(two - (models["a"] + models["b"]) / 2).max() > 0.1


def test_matrices_that_rounding_has_made_singular_end_the_merge(small_tiles: int):
    """In float32, the inputs of two channels that hardly differ can be correlated by more than 1."""
    equal = np.full((IN, IN), 1 + 2e-6) - 2e-6 * np.eye(IN)
    models = {name: np.ones((OUT, IN)) for name in "ab"}
    facts = given(dict.fromkeys("ab", equal))
    with pytest.raises(
        MergeyardError, match=r"^gram: .* of a, b cannot be inverted with alpha 1; take an alpha of 0.999"
    ):
        merged(models, facts, setting((0.5, 0.5), 1.0))
    assert merged(models, facts, setting((0.5, 0.5), 0.999)) == pytest.approx(models["a"])


def test_matrices_are_computed_once_for_all_threads_and_the_last_are_kept_however_large(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(import_module("workers.methods.regmean"), "KEPT_BYTES", 100)
    kept, computed = Kept(), list[str]()

    def matrices(name: str) -> Any:
        def compute() -> Any:
            time.sleep(0.02)
            computed.append(name)
            return (np.zeros(90 if name == "large" else 6),)

        return kept.matrices((name,), compute)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(matrices, ["large"] * 8))
    assert computed == ["large"]
    for name in ("one", "two", "one"):
        matrices(name)
    assert computed == ["large", "one", "two"]
    matrices("large")
    assert computed == ["large", "one", "two", "large"]
