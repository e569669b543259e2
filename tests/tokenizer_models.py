"""Tiny Llama checkpoints with tiny tokenizers of their own, for merges of vocabularies."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

HIDDEN = 8
EMBEDDINGS, HEAD = "model.embed_tokens.weight", "lm_head.weight"
LETTERS = "abcdefgh"
SPECIAL = ("<s>", "</s>")
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "float32",
}


def tokenizer(merges: Sequence[str], added: Sequence[str] = (), *, kind: str = "BPE") -> dict[str, Any]:
    """A tokenizer.json: `<s>`, `</s>`, eight letters, and the products of the merges; `added` are special tokens."""
    tokens = [*SPECIAL, *LETTERS, *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    beside = [*SPECIAL, *added]
    model = {"type": kind, "vocab": vocabulary, "unk_token": None}
    return {
        "version": "1.0",
        "added_tokens": [
            {"id": vocabulary.get(token, len(tokens) + number - 2), "content": token, **flags}
            for number, token in enumerate(beside)
        ],
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {**model, "merges": [*merges]} if kind == "BPE" else {**model, "unk_token": "a"},
    }


def write_model(
    folder: Path,
    of: Mapping[str, Any] | None,
    *,
    rows: int | None = None,
    tied: bool = False,
    template: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A checkpoint with that tokenizer; its embeddings have a row for each token, or `rows`."""
    folder.mkdir(parents=True)
    size = rows if rows is not None else largest_id(of or {}) + 1
    layer = "model.layers.0."
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDINGS: (size, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        **{f"{layer}self_attn.{name}_proj.weight": (HIDDEN, HIDDEN) for name in "qkvo"},
        **{f"{layer}mlp.{name}_proj.weight": (HIDDEN, HIDDEN) for name in ("gate", "up", "down")},
        **{f"{layer}{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")},
        **({} if tied else {HEAD: (size, HIDDEN)}),
    }
    tensors = {
        name: torch.randn(
            shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{folder.name}/{name}".encode()))
        ).to(dtype)
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**CONFIG, "vocab_size": size, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "temperature": 0.5}))
    if of is not None:
        (folder / "tokenizer.json").write_text(json.dumps(of))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if template is not None:
        (folder / "chat_template.jinja").write_text(template)
    return folder


def largest_id(of: Mapping[str, Any]) -> int:
    """The largest id of a tokenizer.json."""
    return max([*of["model"]["vocab"].values(), *(entry["id"] for entry in of["added_tokens"])])
