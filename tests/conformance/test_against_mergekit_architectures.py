"""Slices with gradients and filters over the architectures that mergekit merges under the same names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conformance.deep_cases import ALIKE, LAYER_TYPES, slices, stack
from tests.conformance.oracle import Answer
from tests.conformance.reference import checkpoint
from tests.conformance.test_architectures import run_merge


@pytest.mark.parametrize("architecture", ALIKE)
def test_slices_with_gradients_and_filters_are_mergekit_s(
    architecture: str, deep: Callable[[str], Path], mergekit: Mapping[str, Answer], tmp_path: Path
) -> None:
    assert_alike(mergekit[f"slices of {architecture}"], slices(deep(architecture)), tmp_path / "merge")


@pytest.mark.parametrize("architecture", ALIKE)
def test_a_stack_is_mergekit_s_where_it_has_one(
    architecture: str, deep: Callable[[str], Path], mergekit: Mapping[str, Answer], tmp_path: Path
) -> None:
    answer = mergekit[f"stack of {architecture}"]
    if architecture in LAYER_TYPES:
        assert "validate_layer_type" in (answer.error or "")
    else:
        assert_alike(answer, stack(deep(architecture)), tmp_path / "merge")


def assert_alike(answer: Answer, document: Mapping[str, Any], out: Path) -> None:
    """Our tensors are mergekit's, but for the order of float32 sums."""
    assert answer.error is None, answer.error
    run_merge(document, out)
    merged, expected = checkpoint(str(out)), checkpoint(str(answer.folder))
    assert merged.keys() == expected.keys()
    for name, tensor in merged.items():
        assert torch.allclose(tensor, expected[name], rtol=1e-5, atol=1e-7), name
