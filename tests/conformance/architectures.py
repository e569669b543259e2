"""Tiny random models of fifteen architectures, made and saved by transformers: a base and two fine-tunes of it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel

TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
GEMMA: dict[str, Any] = {**TEXT, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 8}
GPT2: dict[str, Any] = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}


ARCHITECTURES: Mapping[str, tuple[str, Callable[[], PretrainedConfig]]] = {
    "llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**TEXT, tie_word_embeddings=False)),
    "tied llama": ("LlamaForCausalLM", lambda: transformers.LlamaConfig(**TEXT, tie_word_embeddings=True)),
    "qwen2": ("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**TEXT)),
    "qwen3": ("Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**TEXT, head_dim=8)),
    "mistral": ("MistralForCausalLM", lambda: transformers.MistralConfig(**TEXT, head_dim=8)),
    "gemma2": ("Gemma2ForCausalLM", lambda: transformers.Gemma2Config(**GEMMA)),
    "gemma3": ("Gemma3ForCausalLM", lambda: transformers.Gemma3TextConfig(**GEMMA)),
    "gemma3 VLM": (
        "Gemma3ForConditionalGeneration",
        lambda: transformers.Gemma3Config(
            text_config=GEMMA,
            vision_config={**VISION, "vision_use_head": False},
            mm_tokens_per_image=4,
            image_token_index=60,
            boi_token_index=61,
            eoi_token_index=62,
        ),
    ),
    "phi3": ("Phi3ForCausalLM", lambda: transformers.Phi3Config(**TEXT)),
    "mixtral": (
        "MixtralForCausalLM",
        lambda: transformers.MixtralConfig(**TEXT, num_local_experts=4, num_experts_per_tok=2),
    ),
    "qwen3 MoE": (
        "Qwen3MoeForCausalLM",
        lambda: transformers.Qwen3MoeConfig(
            **TEXT, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24
        ),
    ),
    "gpt2": ("GPT2LMHeadModel", lambda: transformers.GPT2Config(**GPT2)),
    "bert": ("BertForMaskedLM", lambda: transformers.BertConfig(**{**TEXT, "type_vocab_size": 2})),
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        lambda: transformers.Qwen2VLConfig(
            text_config={
                **TEXT,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
            },
            vision_config={"depth": 2, "embed_dim": 32, "num_heads": 4, "hidden_size": 32, "patch_size": 4},
            image_token_id=60,
            video_token_id=61,
            vision_start_token_id=62,
            vision_end_token_id=63,
        ),
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        lambda: transformers.LlavaConfig(
            text_config=transformers.LlamaConfig(**TEXT),
            vision_config=transformers.CLIPVisionConfig(**VISION),
            image_token_index=60,
        ),
    ),
}
"""Architecture to the name of its class and its config: two layers, 32 wide."""


@contextmanager
def layers(count: int) -> Iterator[None]:
    """Configs with so many layers of text, and two of vision."""
    with ExitStack() as stack:
        for fields, key in ((TEXT, "num_hidden_layers"), (GEMMA, "num_hidden_layers"), (GPT2, "n_layer")):
            stack.enter_context(patch.dict(fields, {key: count}))
        yield


def write_family(folder: Path, architecture: str) -> None:
    """`folder`/base, one and two in bfloat16.

    `one` moves the first five eighths of every tensor, `two` the last five, so that each has elements to itself.
    """
    class_name, config = ARCHITECTURES[architecture]
    torch.manual_seed(zlib.crc32(architecture.encode()))
    write_models(folder, architecture, getattr(transformers, class_name)(config()))


def write_models(folder: Path, architecture: str, model: PreTrainedModel) -> None:
    """`folder`/base, one and two as above, of this model."""
    model = model.to(torch.bfloat16)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for who, begin, end in (("base", 0.0, 0.0), ("one", 0.0, 5 / 8), ("two", 3 / 8, 1.0)):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{architecture}/{who}".encode()))
        for name, tensor in model.state_dict().items():
            tensor.copy_(_stepped(base[name], generator, begin, end))
        model.save_pretrained(folder / who)


def _stepped(base: torch.Tensor, generator: torch.Generator, begin: float, end: float) -> torch.Tensor:
    place = torch.arange(base.numel()).reshape(base.shape) / base.numel()
    step = torch.randn(base.shape, generator=generator)
    return base.float() + (step + step.sign()) * 0.01 * ((begin <= place) & (place < end))
