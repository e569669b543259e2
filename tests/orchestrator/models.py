"""Small but real Qwen2 checkpoints, written in a moment: transformers loads them."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, INTERMEDIATE, LAYERS, VOCABULARY = 16, 32, 2, 48
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "use_sliding_window": False,
    "torch_dtype": "bfloat16",
}
TOKENIZER = {
    "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 1}, "unk_token": "a"},
    "added_tokens": [{"id": 2, "content": "<end>"}],
}


def shapes(*, tied: bool = True) -> dict[str, tuple[int, ...]]:
    """Tensor names and shapes, as `Qwen2ForCausalLM` saves them."""
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.q_proj.bias": (HIDDEN,),
        "self_attn.k_proj.weight": (HIDDEN // 2, HIDDEN),
        "self_attn.k_proj.bias": (HIDDEN // 2,),
        "self_attn.v_proj.weight": (HIDDEN // 2, HIDDEN),
        "self_attn.v_proj.bias": (HIDDEN // 2,),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
    }
    found: dict[str, tuple[int, ...]] = {EMBEDDINGS: (VOCABULARY, HIDDEN), "model.norm.weight": (HIDDEN,)}
    found |= {f"model.layers.{number}.{name}": shape for number in range(LAYERS) for name, shape in layer.items()}
    return found if tied else {**found, HEAD: (VOCABULARY, HIDDEN)}


def weights(who: str, *, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> dict[str, Tensor]:
    """Siblings of one base: every tensor is the base's and a small step of `who`'s own."""

    def noise(key: str, shape: tuple[int, ...]) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode())))

    return {
        name: (0.02 * noise(name, shape) + (0 if who == "base" else 1e-3) * noise(f"{who}/{name}", shape)).to(dtype)
        for name, shape in shapes(tied=tied).items()
    }


def write_model(
    folder: Path,
    tensors: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = TOKENIZER,
    files: int = 1,
) -> Path:
    """A checkpoint folder. `config` changes CONFIG, where a value of None takes the field out."""
    folder.mkdir(parents=True, exist_ok=True)
    merged = {**CONFIG, "tie_word_embeddings": HEAD not in tensors, **(config or {})}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in merged.items() if value is not None}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2}))
    if tokenizer is not None:
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    if files == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map: dict[str, str] = {}
    for number in range(files):
        name = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = dict(list(tensors.items())[number::files])
        save_file(part, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def load_model(folder: Path) -> dict[str, Tensor]:
    """All tensors of a checkpoint, from however many files."""
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def write_adapter(folder: Path, parts: Mapping[str, Tensor], **config: Any) -> Path:
    """A LoRA adapter as PEFT saves it, of tensors by their names without `base_model.model.`; rank and alpha are 2."""
    folder.mkdir(parents=True, exist_ok=True)
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": "org/base", **config}
    (folder / "adapter_config.json").write_text(json.dumps(stated))
    save_file({f"base_model.model.{name}": part for name, part in parts.items()}, folder / "adapter_model.safetensors")
    return folder
