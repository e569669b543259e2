"""Keys and values of many rows in memory set aside once: a decoding step writes its tokens and copies nothing else.

transformers' own `DynamicCache` copies the whole cache at every step; its `StaticCache` attends to every column it may
ever use. Here a forward pass sees a *window*: one row, or the first rows up to the columns of the fullest of them, each
of which appends where it has got to itself. All layers keep all columns. Those with a sliding window read the
columns of the window.
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
        self.window, self.end = slice(0, rows), 0
        self.cells: tuple[Tensor, Tensor, Tensor] | None = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Set the memory aside; zeros, because a masked column still enters a product with weight 0."""
        self.keys, self.values = (
            torch.zeros(self.rows, new.shape[1], self.columns, new.shape[-1], dtype=self.kept, device=new.device)
            for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write to the window; all of its keys and values so far, as views."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        for memory, new in ((self.keys, key_states), (self.values, value_states)):
            if self.cells is None:
                memory[self.window, :, self.end : self.end + new.shape[2]] = new
            else:
                rows, queries, columns = self.cells
                memory[rows, :, columns] = new[rows, :, queries].to(memory.dtype)
        if self.cells is None:
            self.end += key_states.shape[2]
        return self.keys[self.window, :, : self.end], self.values[self.window, :, : self.end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass over `query_length` more tokens will see, and the position of the first."""
        return self.get_seq_length() + (query_length if self.cells is None else 0), 0

    def get_seq_length(self) -> int:
        """Columns filled in the window."""
        return self.end

    def get_max_length(self) -> int:
        """Columns there are."""
        return self.columns


class KeyValueBuffer(Cache):
    """A cache of `rows` × `columns` tokens, kept as `dtype`, for a model of `layers` layers."""

    def __init__(self, layers: int, rows: int, columns: int, dtype: torch.dtype) -> None:
        super().__init__(layers=[_Layer(rows, columns, dtype) for _ in range(layers)])
        self.rows, self.columns = rows, columns

    def append(self, row: int, end: int) -> None:
        """Let the next pass append at column `end` of this row, and see all before."""
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            layer.window, layer.end, layer.cells = slice(row, row + 1), end, None

    def scatter(self, rows: int, end: int, cells: tuple[Tensor, Tensor, Tensor]) -> None:
        """Let the next pass, over the first `rows` rows, see their columns before `end`.

        `cells` are the rows, the queries and the columns of what is written, three vectors of one length: query
        `cells[1][i]` of row `cells[0][i]` goes to column `cells[2][i]`. What is not named is not written.
        """
        for layer in self.layers:
            assert isinstance(layer, _Layer)
            layer.window, layer.end, layer.cells = slice(0, rows), end, cells

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one row to another."""
        if source != target and length:
            for memory in self._memories():
                memory[target, :, :length] = memory[source, :, :length]

    def clear(self, row: int, first: int, end: int) -> None:
        """Set columns to 0: a NaN that a row left would enter the sums of the next one there, masked or not."""
        if first < end:
            for memory in self._memories():
                memory[row, :, first:end] = 0

    def _memories(self) -> list[Tensor]:
        layers = [layer for layer in self.layers if isinstance(layer, _Layer)]
        return [memory for layer in layers for memory in (layer.keys, layer.values) if memory is not None]


def hidden(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive mask for a boolean one: 0 where visible, the lowest number of `dtype` elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, torch.finfo(dtype).min)
