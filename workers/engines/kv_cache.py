"""Keys and values of many rows in memory set aside once: a decoding step writes its tokens and copies nothing else.

transformers' own `DynamicCache` copies the whole cache at every step; its `StaticCache` attends to every column it may
ever use. Here a forward pass sees a *window*: some rows, and the columns from where they begin to where they have got.
All layers keep all columns, those with a sliding window too: their masks do the forgetting.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


class _Layer(CacheLayerMixin):
    """One layer's buffer of shape [rows, heads, columns, head size], made when the first keys show their shape."""

    is_sliding = False
    is_croppable = False

    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.rows, self.columns, self.kept = rows, columns, dtype
        self.window, self.first, self.end = slice(0, rows), 0, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set the memory aside; zeros, because a masked column still enters a product with weight 0."""
        self.keys, self.values = (
            torch.zeros(self.rows, new.shape[1], self.columns, new.shape[-1], dtype=self.kept, device=new.device)
            for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append to the window; all of its keys and values so far, as views."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.end + key_states.shape[2]
        self.keys[self.window, :, self.end : end] = key_states
        self.values[self.window, :, self.end : end] = value_states
        self.end = end
        return self.keys[self.window, :, self.first : end], self.values[self.window, :, self.first : end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass over `query_length` more tokens will see, and the position of the first."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Columns filled in the window."""
        return self.end - self.first

    def get_max_length(self) -> int:
        """Columns there are."""
        return self.columns


class KeyValueBuffer(Cache):
    """A cache of `rows` × `columns` tokens, kept as `dtype`, for a model of `layers` layers."""

    def __init__(self, layers: int, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[_Layer(rows, columns, dtype) for _ in range(layers)])
        self.rows, self.columns = rows, columns

    def look(self, rows: slice, first: int, end: int) -> None:
        """Let the next pass append at column `end` of these rows, and see them from column `first`."""
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            layer.window, layer.first, layer.end = rows, first, end

    def copy(self, source: tuple[int, int], target: tuple[int, int], length: int) -> None:
        """Copy `length` columns between two places (row, first column); they may overlap."""
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            for memory in (layer.keys, layer.values):
                if memory is not None and length:
                    part = memory[source[0], :, source[1] : source[1] + length]
                    part = part.clone() if source[0] == target[0] else part
                    memory[target[0], :, target[1] : target[1] + length] = part


def hidden(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask for a boolean one: 0 where visible, the lowest number of `dtype` elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
