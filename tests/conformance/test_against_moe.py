"""Mixtures of experts: transformers loads ours with the weights of mergekit-moe, and the routers of its prompts."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml
from torch import Tensor

from orchestrator.cli import main
from tests.benchmarks.make_checkpoints import write_adapter
from tests.conformance.architectures import TEXT, write_models
from tests.conformance.checkpoints import TOKENIZER, TOKENIZER_FILES
from tests.conformance.oracle import Oracle
from tests.conformance.reference import checkpoint
from workers.making.gates import decoder, hidden_states

SIZES = {**TEXT, "vocab_size": 2048}
DENSE = {
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)),
}
CASES = [("llama", "hidden"), ("llama", "random"), ("qwen2", "hidden"), ("qwen3", "cheap_embed")]


def document(family: Path, gate_mode: str) -> dict[str, Any]:
    experts = [
        {"source_model": str(family / "one"), "positive_prompts": ["fix this", "code"], "negative_prompts": ["a tale"]},
        {"source_model": str(family / "two"), "positive_prompts": ["a tale of a king"], "residual_scale": 0.5},
    ]
    asked: dict[str, Any] = {"base_model": str(family / "base"), "gate_mode": gate_mode, "experts": experts}
    if family.name == "qwen2":
        asked["shared_experts"] = [{"source_model": str(family / "one"), "positive_prompts": ["hello"]}]
    return {**asked, "dtype": "bfloat16", "experts_per_token": 1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with base, one and two of each kind."""
    root = tmp_path_factory.mktemp("mixtures")
    for name, make in DENSE.items():
        write_models(root / name, name, make())
        for who in ("base", "one", "two"):
            for file in TOKENIZER_FILES:
                shutil.copy(TOKENIZER / file, root / name / who / file)
    return root


@pytest.fixture(scope="module")
def states(oracle: Oracle, root: Path) -> Mapping[tuple[str, str], tuple[Any, dict[str, Tensor]]]:
    """Our model, and the weights of mergekit's, of each case."""
    for name, gate_mode in CASES:
        config = root / f"{name}-{gate_mode}.yml"
        config.write_text(yaml.safe_dump(document(root / name, gate_mode)))
        assert main(["moe", str(config), str(root / f"ours-{name}-{gate_mode}"), "-q"]) == 0
        theirs = [str(config), str(root / f"theirs-{name}-{gate_mode}")]
        oracle.ask("program", name="moe", arguments=theirs)

    def load(folder: Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)

    return {
        case: (load(root / f"ours-{'-'.join(case)}"), load(root / f"theirs-{'-'.join(case)}").state_dict())
        for case in CASES
    }


@pytest.mark.parametrize("case", CASES)
def test_transformers_loads_the_weights_of_mergekit(case: tuple[str, str], states: Mapping[Any, Any]) -> None:
    model, theirs = states[case]
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    gates = 0
    for name, tensor in theirs.items():
        if name.endswith("gate.weight"):
            gates += 1
            assert ours[name].shape == tensor.shape
            if case[1] != "random":
                np.testing.assert_allclose(ours[name].float(), tensor.float(), rtol=2.0**-7, atol=1e-3)
                assert float(tensor.float().norm(dim=1).min()) == pytest.approx(1, rel=0.02)
        else:
            assert torch.equal(ours[name], tensor), name
    assert gates == (4 if case[0] == "qwen2" else 2)
    answer = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False)
    assert answer.shape[1] > 3 and bool(model(torch.tensor([[5, 6, 7]])).logits.isfinite().all())


@pytest.mark.parametrize("case", CASES)
def test_the_config_says_what_mergekit_s_says(case: tuple[str, str], states: Mapping[Any, Any]) -> None:
    config = states[case][0].config
    assert (config.num_experts_per_tok, getattr(config, "num_local_experts", None) or config.num_experts) == (1, 2)
    assert config.rms_norm_eps == 1e-6 and config.rope_parameters["rope_theta"] == 10000.0
    assert config.tie_word_embeddings == (case[0] == "qwen2")


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("name", DENSE)
def test_the_states_before_each_layer_are_those_of_the_whole_model(name: str, layers: int, root: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(root / name / "base", num_hidden_layers=layers)
    config.layer_types = ["full_attention"] * layers
    whole: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    whole.config.save_pretrained(root / f"{name}-{layers}")
    tokens = {"input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]), "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]])}
    found = hidden_states(decoder(str(root / f"{name}-{layers}"), whole.state_dict().__getitem__), tokens, average=True)
    with torch.no_grad():
        wanted = whole.eval()(**tokens, output_hidden_states=True).hidden_states[:layers]
    assert torch.equal(found, torch.stack(wanted).sum(dim=2).div(3).sum(dim=1).div(2))


def test_a_base_with_an_adapter_routes_as_the_merged_one(root: Path) -> None:
    write_adapter(root / "llama" / "base", root / "adapter")
    adapted, merged = f"{root}/llama/base+{root}/adapter", root / "merged"
    (root / "merge.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: {adapted}}}]\ndtype: bfloat16\n")
    assert main(["merge", str(root / "merge.yml"), str(merged), "-q"]) == 0
    for number, base in enumerate((adapted, str(merged), str(root / "llama" / "base"))):
        config = {**document(root / "llama", "hidden"), "base_model": base}
        (root / "config.yml").write_text(yaml.safe_dump(config))
        assert main(["moe", str(root / "config.yml"), str(root / f"mixture{number}"), "-q"]) == 0
    first, second, plain = (checkpoint(str(root / f"mixture{number}")) for number in range(3))
    gates = [name for name in first if name.endswith("gate.weight")]
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    assert gates and not any(torch.equal(first[name], plain[name]) for name in gates[1:])
