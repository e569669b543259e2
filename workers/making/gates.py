"""The rows of routers: drawn at random, or the directions of prompts in the base model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float32]
SMALLEST_NORM = 1e-8


def drawn(shape: tuple[int, ...], *key: object, uniform: bool = False) -> Floats:
    """Standard normal numbers, or uniform ones within ±√(1 / last extent), as torch begins a linear layer with.

    `key` decides them: a seed and names.
    """
    words = hashlib.sha256(repr(key).encode()).digest()[:16]
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(words, "little")))
    if uniform:
        bound = (1.0 / shape[-1]) ** 0.5
        return generator.uniform(-bound, bound, shape).astype(np.float32)
    return generator.standard_normal(shape, np.float32)


def direction(positive: Tensor, negative: Tensor | None) -> Tensor:
    """`positive` less `negative`, rows × hidden, each row divided by its norm."""
    change = positive if negative is None else positive - negative
    return change / change.norm(p=2, dim=-1, keepdim=True).clamp(min=SMALLEST_NORM)


def embedded(embeddings: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """The sum of the tokens' embeddings over all prompts, divided by its norm: (1, hidden), float32."""
    rows = embeddings[ids].float() * mask.unsqueeze(-1)
    return direction(rows.sum(dim=(0, 1)).unsqueeze(0), None)


def decoder(folder: str, weight: Callable[[str], Tensor]) -> Any:
    """The layers before the last of the model whose config is in `folder`, with its embeddings, in bfloat16.

    A router needs the states before each layer: neither the last layer nor the head. `weight` has a tensor by name.
    """
    import torch
    from transformers import AutoConfig, AutoModel

    from workers.half_products import speed_up

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    with torch.device("meta"):
        model: Any = AutoModel.from_config(config, dtype=torch.bfloat16, trust_remote_code=False)
    model.rotary_emb = type(model.rotary_emb)(config)  # computed, not stored
    model.norm = torch.nn.Identity()  # it would replace the last state
    model.layers = model.layers[:-1]
    names = [name for name, _ in model.named_parameters()]
    model.load_state_dict({name: weight(f"model.{name}").to(torch.bfloat16) for name in names}, assign=True)
    speed_up(model)
    return model.eval()


def hidden_states(model: Any, tokens: Any, *, average: bool) -> Tensor:
    """(layers, hidden): the state before each layer at the last token, or its mean over tokens, mean over prompts.

    `model` comes from `decoder`.
    """
    import torch

    with torch.no_grad():
        output = model(**tokens, output_hidden_states=True, use_cache=False, return_dict=True)
    states = torch.stack([*output.hidden_states[:-1], output.last_hidden_state])  # of no layer, the embeddings alone
    at = states.sum(dim=2) / states.shape[2] if average else states[:, :, -1, :]
    return at.sum(dim=1) / at.shape[1]


def tokenised(tokenizer: Any, prompts: Sequence[str]) -> Any:
    """The prompts as one batch, padded on the left, each after the token that begins a text."""
    begin = tokenizer.bos_token or ""
    return tokenizer(
        [begin + prompt for prompt in prompts], return_tensors="pt", padding=True, add_special_tokens=False
    )
