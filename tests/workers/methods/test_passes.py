"""A method's pass, run by compiled loops for several points at once, has the bits of its formula in torch."""

from __future__ import annotations

import inspect
import zlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from jobs.merge_tasks import Setting
from tests.workers.methods.whole import answered, tiles_of
from workers.merging.tiles import merge_tile, pass_of
from workers.methods import METHODS
from workers.methods.running import run
from workers.methods.tile import Array, Reduction

MODELS = ("a", "b", "c")
STORED = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
COMPILED = [name for name, method in METHODS.items() if method.fused]
SUMS = ("task_arithmetic", "dare_linear", "breadcrumbs", "della_linear")
"""Methods whose simplified settings have neither a divisor nor a λ."""


def parents(rng: np.random.Generator, elements: int, dtype: str) -> dict[str, Array]:
    """A base and siblings so near to it that many task vectors are equal, or zero; with zeros of both signs."""
    base = rng.standard_normal(elements) * 0.02
    base[rng.random(elements) < 0.05] = rng.choice([0.0, -0.0])
    found = {"base": base}
    for name in MODELS:
        steps = rng.integers(-3, 4, elements) * 2.0**-10 * (rng.random(elements) < 0.7)
        found[name] = base + steps
        found[name][rng.random(elements) < 0.03] = rng.choice([0.0, -0.0])
    return {name: values.astype(STORED[dtype]) for name, values in found.items()}


def parameters(rng: np.random.Generator, method: str, models: int) -> tuple[tuple[str, Any], ...]:
    """Numbers that a simplified setting may have."""
    chosen: dict[str, Any] = {
        "weight": tuple(float(rng.choice([0.7, 0.3, 1.0, -0.4, 0.5])) for _ in range(models)),
        "density": tuple(float(rng.choice([0.05, 0.3, 0.5, 0.81])) for _ in range(models)),
        "gamma": tuple(float(rng.choice([0.0, 0.01, 0.2])) for _ in range(models)),
        "epsilon": 1e-3 if method.startswith("ram") else (0.04,) * models,
        "select_topk": float(rng.choice([0.3, 0.8, 1.0])),
        "tall_lambda": tuple(float(rng.choice([0.2, 0.4, 1.0])) for _ in range(models)),
        "k": float(rng.choice([1, 2])),
        "r": 0.1,
        "alpha": 0.2,
        "floor": 1e-6,
        "scale": tuple(float(rng.choice([1.0, 0.3])) for _ in range(models)),
        **{name: bool(rng.random() < 0.5) for name in ("filter_wise", "nuslerp_row_wise", "nuslerp_flatten")},
        "normalize_weights": False,
        "eps": 1e-8,
        "max_iter": 10.0,
        "tol": 1e-5,
        "t": float(rng.choice([0.3, 0.9])) * (1 if method == "slerp" else 2.0**-9),
        "normalize": method not in ("linear", *SUMS) and bool(rng.random() < 0.5),
        "rescale": bool(rng.random() < 0.5),
        "lambda": 1.0 if method in SUMS else float(rng.choice([1.0, 0.7])),
    }
    fused = METHODS[method].fused
    assert fused is not None
    taken = [name.rstrip("_") for name in inspect.signature(fused).parameters]
    return tuple((name, chosen[name]) for name in taken if name in chosen)


def setting(rng: np.random.Generator, method: str) -> Setting:
    rule = METHODS[method]
    base = None if rule.base == "unused" or (rule.base == "optional" and rng.random() < 0.5) else "base"
    most = min(rule.most or 3, 3)
    fewest = max(1 + (method in ("multislerp", "karcher")), rule.fewest - (rule.base == "one of the models"))
    others = list(rng.permutation(MODELS)[: int(rng.integers(fewest, most + 1))])
    models = ("base", others[0]) if rule.base == "one of the models" else tuple(str(name) for name in others)
    return Setting(method, models, base, parameters(rng, method, len(models)))


@pytest.mark.parametrize(("arithmetic", "stored"), [("F32", "BF16"), ("F32", "F16"), ("F64", "F32")])
@pytest.mark.parametrize("method", COMPILED)
def test_a_pass_has_the_bits_of_the_formula(method: str, arithmetic: str, stored: str, small_tiles: int):
    rng = np.random.default_rng(zlib.crc32(f"{method} {arithmetic} {stored}".encode()))
    shape = int(rng.integers(2, 20)), int(rng.integers(5, 40))
    raw: Any = parents(rng, shape[0] * shape[1], stored)
    assert_bits_of_formulas([setting(rng, method) for _ in range(6)], raw, shape, arithmetic, stored)


@pytest.mark.parametrize("size", [1.0, 2.0**-6])
@pytest.mark.parametrize("method", COMPILED)
def test_a_grid_has_the_bits_of_the_formulas(method: str, size: float):
    rng = np.random.default_rng(zlib.crc32(f"{method} {size}".encode()))
    raw: Any = {name: (each * size).astype(each.dtype) for name, each in parents(rng, 23 * 61, "BF16").items()}
    of_first, other = setting(rng, method), setting(rng, method)  # 18 points of the same models, 2 of others
    settings = [
        Setting(method, of_first.models, of_first.base, parameters(rng, method, len(of_first.models)))
        for _ in range(18)
    ]
    assert_bits_of_formulas([*settings[:9], other, *settings[9:], other], raw, (23, 61), "F32", "BF16")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sce_is_no_number_where_its_formula_is_none(value: float):
    rng = np.random.default_rng(12)
    raw: Any = parents(rng, 2000, "BF16")
    raw["a"][1500] = value
    facts: dict[Reduction, Any] = {}
    (tile,) = tiles_of(raw, facts)
    settings = [Setting("sce", ("a", "b"), "base", (("select_topk", share),)) for share in (0.2, 0.7, 1.0)]
    settings.append(Setting("sce", ("b", "c"), "base", (("select_topk", 0.5),)))
    outputs = [np.zeros(tile.elements, STORED["BF16"]) for _ in settings]
    (passes,) = answered([tile], facts, lambda each: [pass_of(each, one, "F32", "") for one in settings])
    run([each for each in passes if each is not None], tile, outputs, "float32")
    for output, each in zip(outputs, settings, strict=True):
        (formula,) = answered([tile], facts, lambda one, each=each: merge_tile(one, each, "F32", ""))
        assert (np.isnan(output.astype(np.float32)) == formula.isnan().numpy()).all()
        assert formula.isnan().any() == ("a" in each.models)


def assert_bits_of_formulas(
    settings: list[Setting], raw: Any, shape: tuple[int, int], arithmetic: str, stored: str
) -> None:
    facts: dict[Reduction, Any] = {}
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
        run(
            [each for each in passes if each is not None],
            tile,
            outputs,
            {"F32": "float32", "F64": "float64"}[arithmetic],
        )
        for formula, output, each in zip(formulas, outputs, settings, strict=True):
            expected = formula[tile.start : tile.start + tile.elements]
            expected = expected.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored])
            width = f"int{8 * output.itemsize}"
            assert (expected.view(getattr(torch, width)).numpy() == output.view(width)).all(), each


def test_bits_do_not_depend_on_tiles_or_on_other_points(small_tiles: int):
    rng = np.random.default_rng(8)
    raw: Any = parents(rng, 333, "BF16")
    settings = [setting(rng, name) for name in ("ties", "dare_ties", "breadcrumbs", "ties", "linear", "ties")]

    def merged(chosen: list[Setting], units: int) -> list[bytes]:
        facts: dict[Reduction, Any] = {}
        parts: list[bytes] = [b""] * len(chosen)
        tiles = tiles_of(raw, facts, units=units, seed=3)
        for tile, passes in zip(
            tiles, answered(tiles, facts, lambda t: [pass_of(t, s, "F32", "") for s in chosen]), strict=True
        ):
            outputs = [np.empty(tile.elements, STORED["BF16"]) for _ in chosen]
            run([each for each in passes if each is not None], tile, outputs, "float32")
            parts = [part + output.tobytes() for part, output in zip(parts, outputs, strict=True)]
        return parts

    together = merged(settings, 100)
    assert merged(settings, 1) == merged(settings, 4) == together
    assert [merged([each], 2)[0] for each in settings] == together
