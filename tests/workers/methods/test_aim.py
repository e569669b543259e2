"""AIM against the equation of its paper in numpy, and its pass against its formula, bit for bit."""

from __future__ import annotations

import zlib
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.workers.methods.test_passes import COMPILED, STORED, parents, setting
from tests.workers.methods.whole import answered, tiles_of
from workers.merging.tiles import merge_tile, pass_of
from workers.methods import METHODS
from workers.methods.aim import ACTIVATIONS, fits, relative
from workers.methods.running import run

SHAPES = {
    "linear": ((7, 12), (1, 12)),
    "transposed": ((12, 7), (12, 1)),
    "norm": ((84,), (84,)),
    "experts": ((3, 4, 7), (3, 1, 7)),
    "experts, transposed": ((3, 7, 4), (3, 7, 1)),
    "one channel": ((84, 1), (1, 1)),
}
WITH_BASE = [name for name in COMPILED if METHODS[name].base in ("required", "optional")]


def by_the_paper(
    base: NDArray[np.float64], merged: NDArray[np.float64], means: NDArray[np.float64], omega: float
) -> NDArray[np.float64]:
    """Equation of arXiv 2502.02421: δ ← δ·(1 − a(1 − ω)), a the mean activation over the largest of its layer."""
    largest = means.max(axis=tuple(range(1, means.ndim)) if means.ndim > 2 else None, keepdims=True)
    return base + (merged - base) * (1 - means / largest * (1 - omega))


@pytest.mark.parametrize("kind", SHAPES)
def test_a_task_vector_shrinks_by_the_activation_of_its_input_channel(kind: str, small_tiles: int):
    shape, of_means = SHAPES[kind]
    rng = np.random.default_rng(zlib.crc32(kind.encode()))
    base, model = rng.standard_normal(shape), rng.standard_normal(shape)
    means = rng.exponential(size=of_means)
    raw: Any = {"base": base.reshape(-1), "a": model.reshape(-1)}
    chosen = replace(setting(rng, "task_arithmetic"), models=("a",), parameters=(("weight", (0.7,)),), omega=0.4)
    chosen = replace(chosen, parameters=(*chosen.parameters, ("normalize", False), ("lambda", 1.0)))
    tiles = tiles_of(raw, {ACTIVATIONS: relative(means)}, shape=shape)
    merged = torch.cat([merge_tile(tile, chosen, "F64", "") for tile in tiles]).numpy().reshape(shape)
    expected = by_the_paper(base, base + 0.7 * (model - base), means, 0.4)
    assert merged == pytest.approx(expected, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize(("arithmetic", "stored"), [("F32", "BF16"), ("F32", "F16"), ("F64", "F32")])
@pytest.mark.parametrize("method", WITH_BASE)
def test_a_pass_has_the_bits_of_the_formula(
    method: str, arithmetic: str, stored: str, small_tiles: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("workers.methods.running.MERGED_UNITS", 2)
    rng = np.random.default_rng(zlib.crc32(f"{method} {arithmetic} {stored}".encode()))
    shape, of_means = [*SHAPES.values()][int(rng.integers(len(SHAPES)))]
    raw: Any = parents(rng, 84, stored)
    facts: dict[Any, Any] = {ACTIVATIONS: relative(rng.exponential(size=of_means))}
    merges = [replace(setting(rng, method), base="base") for _ in range(2)]
    settings = [replace(each, omega=omega) for each in merges for omega in (0.2, 0.6, None)]
    formulas = [
        torch.cat(
            answered(
                tiles_of(raw, facts, units=1, seed=3, shape=shape),
                facts,
                lambda each, s=s: merge_tile(each, s, arithmetic, ""),
            )
        )
        for s in settings
    ]
    tiles = [tile for units in (1, 3) for tile in tiles_of(raw, facts, units=units, seed=3, shape=shape)]
    for tile in tiles:
        passes = [pass_of(tile, each, arithmetic, "") for each in settings]
        outputs = [np.zeros(tile.elements, STORED[stored]) for _ in settings]
        run([each for each in passes if each], tile, outputs, {"F32": "float32", "F64": "float64"}[arithmetic])
        for formula, output, each in zip(formulas, outputs, settings, strict=True):
            expected = formula[tile.start : tile.start + tile.elements]
            expected = expected.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored])
            width = f"int{8 * output.itemsize}"
            assert (expected.view(getattr(torch, width)).numpy() == output.view(width)).all(), each


def test_points_that_differ_in_omega_are_merged_once(small_tiles: int):
    rng = np.random.default_rng(5)
    merge = setting(rng, "task_arithmetic")
    [tile] = tiles_of(parents(rng, 12, "BF16"), {ACTIVATIONS: relative(np.ones(12))})
    passes: Any = [pass_of(tile, replace(merge, omega=omega), "F32", "") for omega in (0.2, 0.4, 0.6)]
    assert len({id(each.merged) for each in passes}) == 1


def test_a_broken_parent_and_an_overflow_are_reported():
    raw: Any = {
        "base": np.array([0, 60000, 0, 0], np.float16),
        "a": np.array([0, 65504, 1, 2], np.float16),
        "b": np.array([0, 65504, np.nan, 2], np.float16),
    }
    rng = np.random.default_rng(6)
    merge = replace(setting(rng, "task_arithmetic"), omega=0.5)
    [tile] = tiles_of(raw, {ACTIVATIONS: relative(np.array([0.0, 0.0, 1.0, 1.0]))})
    settings = [
        replace(merge, models=(model,), parameters=(("weight", (weight,)), ("normalize", False), ("lambda", 1.0)))
        for model, weight in (("a", 1.0), ("a", 2.0), ("b", 1.0))
    ]
    outputs = [np.zeros(4, np.float16) for _ in settings]
    passes: Any = [pass_of(tile, each, "F32", "") for each in settings]
    broken, overflowed = run(passes, tile, outputs, "float32")
    assert overflowed == [False, True, True]
    assert broken["b"] and not broken["base"] and not broken["a"]
    assert outputs[0].tolist() == [0, 65504, 0.5, 1]


def test_mergekits_arithmetic_merges_in_its_dtype_and_relaxes_in_float32():
    raw: Any = {name: np.array([values], ml_dtypes.bfloat16) for name, values in {"base": 1.0, "a": 1.25}.items()}
    merge = replace(setting(np.random.default_rng(7), "task_arithmetic"), models=("a",), omega=0.4)
    merge = replace(merge, parameters=(("weight", (1.0,)), ("normalize", False), ("lambda", 1.0)))
    [tile] = tiles_of(raw, {ACTIVATIONS: relative(np.ones(1))})
    merged = merge_tile(tile, merge, "BF16", "mergekit")
    assert merged.dtype == torch.float32
    assert merged.tolist() == pytest.approx([1 + 0.25 * 0.4], rel=1e-7)


@pytest.mark.parametrize(
    ("of_means", "shape", "fitting"),
    [
        ((1, 12), (7, 12), True),
        ((12, 1), (12, 7), True),
        ((12,), (12,), True),
        ((3, 1, 7), (3, 4, 7), True),
        ((1, 12), (12, 7), False),
        ((1, 1), (7, 12), False),
        ((12,), (7, 12), False),
        ((1, 1, 7), (3, 4, 7), False),
        ((7, 12), (7, 12), False),
    ],
)
def test_statistics_fit_a_tensor_by_its_input_channels(
    of_means: tuple[int, ...], shape: tuple[int, ...], fitting: bool
):
    assert fits(of_means, shape) == fitting
