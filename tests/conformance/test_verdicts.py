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
from tests.conformance.measures import rounded
from tests.conformance.reference import Exact, TaskVectors, largest, merged, output_dtype, outputs
from tests.conformance.verdicts import assert_follows_formulas

Values = dict[str, np.ndarray]


def fair(name: str, vectors: TaskVectors, density: float | None = None) -> list[np.ndarray]:
    """Masks as the method would draw them."""
    dice = np.random.default_rng(zlib.crc32(name.encode()))
    if vectors.trim == "magnitude":
        return [largest(d, density or p) for d, p in zip(vectors.deltas, vectors.densities, strict=True)]
    return [dice.random(d.shape) < (density or p) for d, p in zip(vectors.deltas, vectors.densities, strict=True)]


def right(name: str, expected: Exact | TaskVectors) -> np.ndarray:
    if isinstance(expected, Exact):
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


def weights_in_bf16(name: str, expected: Exact | TaskVectors) -> np.ndarray:
    assert isinstance(expected, Exact)
    return expected.value * float(rounded(np.array(0.7), torch.bfloat16)) / 0.7


def rounded_to_bf16_midway(name: str, expected: Exact | TaskVectors) -> np.ndarray:
    assert isinstance(expected, Exact)
    return rounded(expected.value, torch.bfloat16)


def write(folder: Path, document: dict[str, Any], mistake: Callable[[str, Exact | TaskVectors], np.ndarray]) -> Path:
    dtypes = {output.name: output_dtype(document, output.name) for output in outputs(document)}
    folder.mkdir()
    tensors = {
        name: torch.from_numpy(np.ascontiguousarray(rounded(mistake(name, expected), dtypes[name]))).to(dtypes[name])
        for name, expected in merged(document).items()
    }
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    "name", ["linear-bf16", "slerp-strangers-take-the-arc", "ties", "ties-many-equal-magnitudes", "dare-ties-two"]
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
    ],
)
def test_mistakes_are_caught(
    name: str,
    mistake: Callable[[str, Exact | TaskVectors], np.ndarray],
    complaint: str,
    parents: Path,
    tmp_path: Path,
) -> None:
    document = cases.parsed(cases.CASES[name], parents)
    with pytest.raises(AssertionError, match=complaint):
        assert_follows_formulas(write(tmp_path / "merge", document, mistake), document)
