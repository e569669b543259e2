"""Attention over a window of the cache, registered with transformers under `NAME`: sdpa without its detours.

* A chunk that follows cached tokens needs a causal mask aligned to the lower right. PyTorch's flag is aligned to the
  upper left, so transformers builds the mask: half a gigabyte for 131,072 keys and a chunk of 4,096, read again by
  every head, and it keeps a GPU off its flash kernel. Here a GPU's flash kernel aligns the triangle itself. A CPU, and
  a GPU in float32 with grouped heads, which no kernel there takes, attend to the cached tokens and to the chunk apart
  and join the two by their normalisers.
* On a GPU the kernel is flash attention, else memory-efficient attention, else the plain formula. PyTorch from 2.11 on
  would prefer cuDNN on Hopper, which builds a plan for each number of keys, and so for each step of decoding.
* For a masked step of few queries transformers repeats the keys and values for every query of a group; here the queries
  of a group are stacked instead, and the cache is read once.
* A layer with a sliding window reads the columns of the window alone. Its mask has no other columns, and the queries of
  a chunk attend in blocks, each to its own window.
* On a CPU keys and values are kept in float32, whatever the model's dtype: for the one query of a decoding step
  PyTorch's bf16 kernel takes 3 to 5 times as long, and for a prefill the two are alike (measured, heads of 32 to 128).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "mergeyard"
FEW_QUERIES = 64
BLOCK_QUERIES = 512
"""Queries of a sliding window that attend together: a block reads as many columns beyond its window."""


def register() -> str:
    """Make the attention known to transformers; its name, for `attn_implementation`. cuDNN's is off from now on."""
    torch.backends.cuda.enable_cudnn_sdp(False)
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, _mask)
    return NAME


def cache_dtype(device: torch.device, model_dtype: torch.dtype) -> torch.dtype:
    """The layout of cached keys and values, and of masks."""
    return torch.float32 if device.type == "cpu" else model_dtype


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention of queries [batch, heads, q, size] over keys and values [batch, key heads, k, size] → [batch, q, …].

    Without a mask the last query sees every key, the one before it all but the last, and so on. A mask of fewer columns
    than there are keys is that of the last keys. A boolean mask is that of a sliding window over consecutive tokens.
    """
    asked, query = query, query.to(key.dtype)
    if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:
        key, value = (part[:, :, -attention_mask.shape[-1] :] for part in (key, value))
    queries, groups = query.shape[2], query.shape[1] // key.shape[1]
    scale: float | None = kwargs.get("scaling")
    if attention_mask is None and 1 < queries < key.shape[2]:
        if query.device.type == "cpu" and key.shape[3] == value.shape[3]:
            output = _in_two_parts(query, key, value, scale, _flash_on_cpu)
        elif query.device.type != "cpu" and groups > 1 and key.dtype not in (torch.bfloat16, torch.float16):
            output = _in_two_parts(query, key, value, scale, _efficient)
        else:
            bias = causal_lower_right(queries, key.shape[2])
            output = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=scale, enable_gqa=groups > 1)
    elif attention_mask is not None and attention_mask.dtype == torch.bool:
        output = _in_blocks(query, key, value, attention_mask, scale, kwargs.get("sliding_window"))
    elif attention_mask is not None and groups > 1 and queries <= FEW_QUERIES:
        output = _stacked(query, key, value, attention_mask, scale)
    else:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0].to(asked.dtype), None
    return output.transpose(1, 2).to(asked.dtype).contiguous(), None


_Attention = Callable[[Tensor, Tensor, Tensor, bool, float | None], tuple[Tensor, Tensor]]
"""From queries, keys, values, causality and scale to the values and, of each query, the logsumexp of its scores."""


def _flash_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, 0.0, causal, scale=scale)


def _efficient(query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float | None) -> tuple[Tensor, Tensor]:
    """Memory-efficient attention, whose logsumexps are padded to a multiple of 32."""
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    found, weight, *_ = attention(query, key, value, None, True, 0.0, causal, scale=scale)
    return found, weight[..., : query.shape[2]]


def _in_two_parts(query: Tensor, key: Tensor, value: Tensor, scale: float | None, attention: _Attention) -> Tensor:
    """Attention aligned to the lower right: all of the tokens before the chunk, and the chunk's own triangle.

    With softmax weights exp(s) / Z, the whole is the average of the two parts weighted by Z = exp(logsumexp(s)).
    """
    queries, groups = query.shape[2], query.shape[1] // key.shape[1]
    before = key.shape[2] - queries
    stacked = query.reshape(query.shape[0], key.shape[1], groups * queries, query.shape[3])
    past, past_weight = attention(stacked, key[:, :, :before], value[:, :, :before], False, scale)
    own_key, own_value = (part[:, :, before:].repeat_interleave(groups, dim=1) for part in (key, value))
    own, own_weight = attention(query, own_key, own_value, True, scale)
    share = torch.sigmoid(past_weight.reshape(own_weight.shape) - own_weight)[..., None]
    return torch.lerp(own, past.reshape(own.shape), share.to(own.dtype))


def _stacked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """Attention under a mask, with the queries of a group one above the other."""
    groups = query.shape[1] // key.shape[1]
    stacked = query.reshape(query.shape[0], key.shape[1], groups * query.shape[2], query.shape[3])
    output = scaled_dot_product_attention(stacked, key, value, attn_mask=mask.repeat(1, 1, groups, 1), scale=scale)
    return output.reshape(*query.shape[:3], value.shape[3])


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, window: int | None
) -> Tensor:
    """Attention of consecutive tokens, each of which sees at most `window` columns up to its own."""
    queries, before = query.shape[2], key.shape[2] - query.shape[2]
    outputs: list[Tensor] = []
    for begin in range(0, queries, BLOCK_QUERIES):
        end = min(begin + BLOCK_QUERIES, queries)
        seen = slice(max(0, before + begin + 1 - (window or key.shape[2])), before + end)
        block = mask[:, :, begin:end, seen]
        outputs.append(_stacked(query[:, :, begin:end], key[:, :, seen], value[:, :, seen], block, scale))
    return torch.cat(outputs, dim=2)


def _mask(
    *, q_length: int, kv_length: int, kv_offset: int = 0, local_size: int | None = None, **kwargs: Any
) -> Tensor | None:
    """None where all that came before is seen; for a sliding window, a boolean mask of the columns in it."""
    if local_size is None:
        return None
    near = min(kv_length, q_length + local_size - 1)
    first = kv_offset + kv_length - near
    return sdpa_mask(q_length=q_length, kv_length=near, kv_offset=first, local_size=local_size, **kwargs)
