"""The judges must be sharp: each classic mistake in a merge, made here on purpose, is caught."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from tests.conformance import cases
from tests.conformance.exact import Choice, Exact
from tests.conformance.measures import rounded
from tests.conformance.reference import TaskVectors, largest, merged, output_dtype, outputs
from tests.conformance.verdicts import assert_follows_formulas

Values = dict[str, np.ndarray]


def fair(name: str, vectors: TaskVectors, density: float | None = None) -> list[np.ndarray]:
    """Masks as the method would draw them."""
    dice = np.random.default_rng(zlib.crc32(name.encode()))
    everyone = range(len(vectors.deltas))
    if not vectors.dice:
        return [vectors.trimmed(i) for i in everyone]
    return [dice.random(vectors.base.shape) < (density or vectors.chances(i)) for i in everyone]


def right(name: str, expected: Exact | Choice | TaskVectors) -> np.ndarray:
    if not isinstance(expected, TaskVectors):
        return expected.value
    kept = fair(name, expected)
    return expected.combined(kept, scales(expected, kept)).value


def scales(vectors: TaskVectors, kept: list[np.ndarray]) -> list[float]:
    if not vectors.rescale:
        return [1.0] * len(kept)
    return [abs(d).sum() / abs(d[k]).sum() if k.any() else 1.0 for d, k in zip(vectors.deltas, kept, strict=True)]


def rescaled_by_density(name: str, expected: Exact | TaskVectors) -> np.ndarray:
    assert isinstance(expected, TaskVectors)
    return expected.combined(fair(name, expected), [1 / p for p in expected.densities]).value


def loaded_dice(name: str, expected: Exact | TaskVectors) -> np.ndarray:
    assert isinstance(expected, TaskVectors)
    kept = fair(name, expected, density=expected.densities[0] + 0.05)
    return expected.combined(kept, scales(expected, kept)).value


def one_too_many_kept(name: str, expected: Exact | TaskVectors) -> np.ndarray:
    assert isinstance(expected, TaskVectors)
    parts = zip(expected.deltas, expected.densities, strict=True)
    return expected.combined([largest(d, p + 1.01 / d.size) for d, p in parts]).value


def sign_from_a_count(name: str, expected: Exact | TaskVectors) -> np.ndarray:
    assert isinstance(expected, TaskVectors)
    kept = fair(name, expected)
    votes = sum(np.sign(term) for term in expected.terms(kept, [1.0] * len(kept)))
    return expected.combined(kept, sign=np.where(votes >= 0, 1.0, -1.0)).value


def one_flipped(name: str, expected: Exact | Choice | TaskVectors) -> np.ndarray:
    assert isinstance(expected, Choice)
    value, (certain, _) = expected.value.copy(), expected.decided()
    dropped, kept = (exact.value for _, exact in expected.options[:2])
    place = np.argmax(certain & (dropped != kept))
    value.flat[place] = dropped.flat[place] + kept.flat[place] - value.flat[place]
    return value


def weights_in_bf16(name: str, expected: Exact | TaskVectors) -> np.ndarray:
    assert isinstance(expected, Exact)
    return expected.value * float(rounded(np.array(0.7), torch.bfloat16)) / 0.7


def rounded_to_bf16_midway(name: str, expected: Exact | TaskVectors) -> np.ndarray:
    assert isinstance(expected, Exact)
    return rounded(expected.value, torch.bfloat16)


def altered(document: dict[str, Any], shared: dict[str, Any], each: dict[str, Any]) -> dict[str, Any]:
    """The document with other parameters: of the merge, and of each model that has parameters."""

    def more(holder: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        return holder | {"parameters": (holder.get("parameters") or {}) | values}

    models = [more(model, each) if "parameters" in model else model for model in document["models"]]
    return more(document | {"models": models}, shared)


def write(folder: Path, document: dict[str, Any], mistake: Callable[..., np.ndarray]) -> Path:
    dtypes = {output.name: output_dtype(document, output.name) for output in outputs(document)}
    folder.mkdir()
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(rounded(mistake(name, expected), dtypes[name]))).to(dtypes[name])
        for name, expected in merged(document).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        *("linear-bf16", "slerp-strangers-take-the-arc", "ties", "ties-many-equal-magnitudes", "dare-ties-two"),
        *("nuslerp-vectors-of-the-first-axis", "multislerp-wide-eps", "karcher-three-strangers-float32"),
        *("model-stock-rows-kin", "nearswap", "arcee-fusion", "sce-equal-variances", "ram", "ramplus-tl-float32"),
        *("breadcrumbs-half-float32", "breadcrumbs-ties-equal-magnitudes", "della-one", "della-linear-two"),
    ],
)
def test_the_formulas_follow_themselves(name: str, parents: Path, tmp_path: Path) -> None:
    document = cases.parsed(cases.CASES[name], parents)
    assert_follows_formulas(write(tmp_path / "merge", document, right), document)


@pytest.mark.parametrize(
    ("name", "mistake", "complaint"),
    [
        ("linear-three-unnormalized", weights_in_bf16, "elements; at"),
        ("linear-float32", rounded_to_bf16_midway, "elements; at"),
        ("ties-float32-three", one_too_many_kept, "fit no mask"),
        ("ties-many-equal-magnitudes", one_too_many_kept, "kept"),
        ("ties-float32-three", sign_from_a_count, "fit no mask"),
        ("dare-linear-one-0.5", rescaled_by_density, "scaled by|fit no mask"),
        ("dare-linear-two", rescaled_by_density, "scaled by|fit no mask"),
        ("dare-linear-one-0.5", loaded_dice, "expected"),
        ("dare-ties-two", loaded_dice, "expected"),
        ("della-one", loaded_dice, "expected"),
        ("della-linear-one", rescaled_by_density, "scaled by|fit no mask"),
        ("breadcrumbs-half-float32", one_too_many_kept, "fit no mask"),
        ("breadcrumbs-ties-half-float32", sign_from_a_count, "fit no mask"),
        ("arcee-fusion-float32", one_flipped, "fit no option"),
        ("sce-float32", one_flipped, "fit no option"),
        ("ram-float32", one_flipped, "fit no option"),
    ],
)
def test_mistakes_are_caught(
    name: str,
    mistake: Callable[..., np.ndarray],
    complaint: str,
    parents: Path,
    tmp_path: Path,
) -> None:
    document = cases.parsed(cases.CASES[name], parents)
    with pytest.raises(AssertionError, match=complaint):
        assert_follows_formulas(write(tmp_path / "merge", document, mistake), document)


@pytest.mark.parametrize(
    ("name", "shared", "each"),
    [
        ("nuslerp-of-task-vectors", {"nuslerp_flatten": False}, {}),
        ("nuslerp-vectors-of-the-first-axis", {"nuslerp_row_wise": False}, {}),
        ("nuslerp-strangers-float32", {}, {"weight": 1}),
        ("multislerp-of-task-vectors", {"normalize_weights": False}, {}),
        ("multislerp-wide-eps", {"eps": 1e-8}, {}),
        ("karcher-three-strangers", {"max_iter": 0}, {}),
        ("karcher-three-strangers-float32", {"max_iter": 1}, {}),
        ("model-stock-three-float32", {"filter_wise": True}, {}),
        ("nearswap-float32", {"t": 0.00101}, {}),
        ("sce-float32", {"select_topk": 0.41}, {}),
        ("ram-sparse-of-three", {"epsilon": 0.0021}, {}),
        ("ramplus-tl-float32", {"r": 0.51}, {}),
        ("ramplus-tl-float32", {"alpha": 0.6}, {}),
        ("breadcrumbs-half-float32", {}, {"gamma": 0}),
        ("breadcrumbs-ties-gamma-zero", {}, {"gamma": 0.01}),
        ("della-one", {}, {"epsilon": 0}),
        ("della-one", {}, {"epsilon": -0.15}),
        ("della-linear-one", {}, {"density": 0.55}),
    ],
)
def test_another_parameter_is_caught(
    name: str, shared: dict[str, Any], each: dict[str, Any], parents: Path, tmp_path: Path
) -> None:
    document = cases.parsed(cases.CASES[name], parents)
    folder = write(tmp_path / "merge", altered(document, shared, each), right)
    with pytest.raises(AssertionError):
        assert_follows_formulas(folder, document)
