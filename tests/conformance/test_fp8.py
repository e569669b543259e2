"""FP8 checkpoints, against the weights that transformers loads from them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from tests.conformance.conftest import merge_ours


def test_blocks_of_fp8_are_what_transformers_dequantises(tmp_path: Path) -> None:
    torch.manual_seed(1)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=40, max_position_embeddings=64, **shape)).bfloat16()
    model.save_pretrained(tmp_path / "fp8")
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        if name.endswith("proj.weight"):
            rows, columns = weight.shape
            scale = weight.float().reshape(rows // 64, 64, columns // 128, 128).abs().amax((1, 3)) / 448
            spread = scale.repeat_interleave(64, 0).repeat_interleave(128, 1)
            tensors |= {name: (weight.float() / spread).to(torch.float8_e4m3fn), f"{name}_scale_inv": scale}
        else:
            tensors[name] = weight.clone()
    save_file(tensors, tmp_path / "fp8" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "fp8" / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [64, 128]}
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(config))

    assert merge_ours(f"merge_method: passthrough\nmodels: [{{model: {tmp_path / 'fp8'}}}]\n", tmp_path / "out") == 0
    ours = load_file(tmp_path / "out" / "model.safetensors")
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path / "fp8", dtype=torch.bfloat16, trust_remote_code=False
    ).state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
