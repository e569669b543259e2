"""Slices and modules against mergekit: the same tensors, the same layers, a config that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.conformance import cases
from tests.conformance.conftest import Ours, merge_ours
from tests.conformance.oracle import Answer
from tests.conformance.reference import checkpoint
from tests.conformance.sliced_cases import SLICED, SLICED_REFUSED


@pytest.mark.parametrize("name", SLICED)
def test_slices_are_mergekit_s(name: str, ours: Ours, mergekit: Mapping[str, Answer], parents: Path) -> None:
    theirs = checkpoint(str(mergekit[f"sliced {name}"].folder))
    folder = ours(SLICED[name])
    merged = checkpoint(str(folder))
    assert merged.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        assert torch.allclose(merged[tensor], expected, rtol=1e-5, atol=1e-7), tensor
    assert AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == layer_count(merged)


@pytest.mark.parametrize("name", SLICED_REFUSED)
def test_slices_that_mergekit_refuses_are_refused(
    name: str, mergekit: Mapping[str, Answer], parents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mergekit[f"sliced {name}"].error
    config = yaml.safe_dump(cases.parsed(SLICED_REFUSED[name], parents), sort_keys=False)
    assert merge_ours(config, tmp_path / "out") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not [*tmp_path.glob("out/*")]


def layer_count(names: Mapping[str, torch.Tensor]) -> int:
    return 1 + max(int(name.split(".")[2]) for name in names if name.startswith("model.layers."))
