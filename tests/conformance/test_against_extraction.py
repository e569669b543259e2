"""Adapters: PEFT merges ours to the fine-tuned model, and mergekit's factors have the same product."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from orchestrator.cli import main
from tests.conformance.architectures import write_family
from tests.conformance.oracle import Oracle
from tests.conformance.reference import checkpoint

RANK = 5
FAMILIES = {"untied": ["--embed-lora"], "fp32": [], "gpt2": [], "mixtral": []}


@pytest.fixture(scope="module")
def folders(
    oracle: Oracle, parents: Path, tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[Path, Path, Path]]:
    """Of each family: base, model, and a folder with our adapters and the answers of mergekit and PEFT."""
    root = tmp_path_factory.mktemp("adapters")
    found: dict[str, tuple[Path, Path, Path]] = {}
    for family, options in FAMILIES.items():
        base, model = parents / family / "base", parents / family / "cos"
        if not base.exists():
            write_family(root / "parents" / family, family)
            base, model = (root / "parents" / family / who for who in ("base", "one"))
        out = root / family
        for name, rank in (("whole", 999), ("narrow", RANK)):
            given = [str(model), str(base), str(out / name), "--rank", str(rank), "-q"]
            assert main(["extract-lora", *given, *options]) == 0
        merged = str(out / "merged.safetensors")
        oracle.ask("merge_adapter", base=str(base), adapter=str(out / "whole"), out=merged)
        if family in ("untied", "fp32"):
            given = ["--model", model, "--base-model", base, "--out-path", out / "theirs", "--max-rank", RANK, *options]
            oracle.ask("program", name="extract_lora", arguments=[*map(str, given)])
        found[family] = base, model, out
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_merges_an_adapter_of_full_rank_to_the_model(
    family: str, folders: Mapping[str, tuple[Path, Path, Path]]
) -> None:
    base, model, out = folders[family]
    merged, tuned, before = load_file(out / "merged.safetensors"), checkpoint(str(model)), checkpoint(str(base))
    compared = 0
    for name in tuned.keys() & merged.keys():
        change = tuned[name].double() - before[name].double()
        allowed = 2.0**-7 * float(change.abs().max()) if tuned[name].dtype == torch.bfloat16 else 1e-8
        np.testing.assert_allclose(merged[name].double(), tuned[name].double(), rtol=2.0**-22, atol=allowed)
        compared += 1
    assert compared >= 15
    if family == "mixtral":
        for layer in range(2):
            experts = merged[f"model.layers.{layer}.mlp.experts.down_proj"]
            stored = [tuned[f"model.layers.{layer}.block_sparse_moe.experts.{e}.w2.weight"] for e in range(4)]
            torch.testing.assert_close(experts, torch.stack(stored).float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("family", ["untied", "fp32"])
def test_products_are_those_of_mergekit(family: str, folders: Mapping[str, tuple[Path, Path, Path]]) -> None:
    out = folders[family][2]
    ours, theirs = (products(load_file(out / who / "adapter_model.safetensors")) for who in ("narrow", "theirs"))
    assert ours.keys() == theirs.keys() and len(ours) >= 21
    for name, product in ours.items():
        largest = float(product.abs().max())  # bfloat16: factors, and the change that mergekit decomposes
        np.testing.assert_allclose(theirs[name], product, rtol=0, atol=(0.05 if family == "untied" else 1e-4) * largest)


def products(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """B·A by module."""
    return {
        name.replace("lora_A", ""): adapter[name.replace("lora_A", "lora_B")].float() @ a.float()
        for name, a in adapter.items()
        if "lora_A" in name
    }
