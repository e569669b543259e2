"""Rotary embeddings whose frequencies depend on how long the text is, held still while one text is read in chunks.

transformers asks every forward pass for its largest position. For `longrope` (Phi-3) the first chunks of a long text
would be turned by the short factors and the last by the long ones, and `dynamic` would change under a batch in which an
ended row is decoded beyond the context. Here the whole text decides, before its first chunk.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jobs.errors import BadInput


class RopeByLength:
    """Every such rotary embedding of a model; `use` readies them for texts of one kind."""

    def __init__(self, model: Any, model_type: str) -> None:
        self._long = False
        self._frequencies: list[tuple[Tensor, Tensor, Tensor]] = []
        self._short_length: int | None = None
        for module in model.modules():
            kinds: Any = getattr(module, "rope_type", None)
            if isinstance(kinds, dict):
                if "longrope" in kinds.values():
                    raise BadInput(
                        f"config.json: {model_type} has longrope in some of its layers; take vllm, or another model"
                    )
                module.rope_type = {layer: _still(kind) for layer, kind in kinds.items()}
            elif kinds == "longrope":
                self._hold(module)
            elif isinstance(kinds, str):
                module.rope_type = _still(kinds)

    def is_long(self, tokens: int) -> bool:
        """Whether a text of so many tokens, its answer included, is read with the long factors."""
        return self._short_length is not None and tokens > self._short_length

    def use(self, *, long: bool) -> None:
        """Ready the model for texts that are, or are not, long."""
        if long != self._long:
            for place, short_frequencies, long_frequencies in self._frequencies:
                place.copy_(long_frequencies if long else short_frequencies)
        self._long = long

    def _hold(self, module: Any) -> None:
        self._short_length = int(module.config.rope_parameters["original_max_position_embeddings"])
        place: Tensor = module.inv_freq
        make = ROPE_INIT_FUNCTIONS["longrope"]
        short, long = (make(module.config, place.device, seq_len=self._short_length + more)[0] for more in (0, 1))
        place.copy_(short)
        self._frequencies.append((place, short, long))
        module.rope_type = "default"


def _still(kind: str) -> str:
    """`dynamic` stretches only beyond the context, which no text exceeds: to its end it is the default."""
    return "default" if "dynamic" in kind else kind
