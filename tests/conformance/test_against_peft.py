"""LoRA adapters on their bases, against PEFT's own merge of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conformance.conftest import in_ordinary_runs, merge_ours
from tests.conformance.measures import ulp_distance
from tests.conformance.oracle import Oracle

pytestmark = pytest.mark.oracle

CASES = (
    "plain", "plain-f32", "plain-f16", "rslora", "patterns", "dora", "embeddings", "embeddings-dora", "embeddings-tied",
    "saved", "saved-tied", "biases", "biases-of-lora", "bias-of-b", "bin", "gpt2", "gpt2-dora",
)  # fmt: skip


IN_ORDINARY_RUNS = ("patterns", "dora", "saved-tied", "gpt2")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`make test` takes four of the cases, `make conformance` all."""
    if "name" in metafunc.fixturenames:
        metafunc.parametrize("name", IN_ORDINARY_RUNS if in_ordinary_runs(metafunc.config) else CASES)


def assert_merged_alike(ours: torch.Tensor, theirs: torch.Tensor, base: torch.Tensor | None, tensor: str) -> None:
    """Within one ulp; where terms of the sum nearly cancel, within PEFT's own rounding of the largest ones."""
    far = ulp_distance(ours, theirs) > 1
    if far.any():
        assert base is not None, tensor
        theirs, base = theirs.double(), base.double()
        terms = torch.maximum(base.abs(), (theirs - base).abs())
        if ours.dtype is torch.float32:  # the terms of B·A itself may cancel
            terms = terms.max()
        assert ((ours.double() - theirs).abs() <= 4 * torch.finfo(ours.dtype).eps * terms)[far].all(), tensor


def test_an_adapter_is_applied_as_peft_merges_it(oracle: Oracle, tmp_path: Path, name: str) -> None:
    oracle.ask("write_adapted", folder=str(tmp_path), name=name)
    theirs_of = tmp_path / name
    model = f"{theirs_of / 'base'}+{theirs_of / 'adapter'}"
    assert merge_ours(f"merge_method: passthrough\nmodels: [{{model: '{model}'}}]\n", tmp_path / "out") == 0
    ours, theirs = load_file(tmp_path / "out" / "model.safetensors"), load_file(theirs_of / "merged.safetensors")
    base = load_file(theirs_of / "base" / "model.safetensors")
    if name in ("embeddings-tied", "gpt2", "gpt2-dora"):  # the state dict has the tied head too
        del theirs["lm_head.weight"]
    assert ours.keys() == theirs.keys()
    changed = 0
    for tensor, found in ours.items():
        assert found.dtype is theirs[tensor].dtype, tensor
        assert_merged_alike(found, theirs[tensor], base.get(tensor), tensor)
        changed += tensor in base and not torch.equal(found, base[tensor])
    assert changed > 1 or name == "embeddings-tied"
