"""Rotary embeddings whose frequencies depend on how long the text is, held still while one text is read in chunks.

transformers asks every forward pass for its largest position. For `longrope` (Phi-3) the first chunks of a long text
would be turned by the short factors and the last by the long ones; `dynamic` would change with each chunk, and under a
batch in which an ended row is decoded further. Here the whole text decides, before its first chunk. So the scores of a
text are those of one pass of transformers over all of it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from jobs.errors import BadInput

Frequencies = Callable[[int], Tensor]
"""The frequencies of texts of so many tokens."""


class RopeByLength:
    """Every such rotary embedding of a model; `use` readies them for texts of one stretch.

    The stretch of a text is the number of tokens that its frequencies are made for: 0 within the original context,
    beyond it the text's own with `dynamic`, and one number for all texts with `longrope`. Texts of one stretch can be
    read side by side.
    """

    def __init__(self, model: Any, model_type: str) -> None:
        self._stretch = 0
        self._held: list[tuple[Tensor, Frequencies]] = []
        self._original: int | None = None
        self._grows = False
        for module in model.modules():
            kinds: Any = getattr(module, "rope_type", None)
            if isinstance(kinds, dict):
                if "longrope" in kinds.values():
                    raise BadInput(
                        f"config.json: {model_type} has longrope in some of its layers; take vllm, or another model"
                    )
                # `dynamic` in some layers stretches beyond the stated context alone, which no text of theirs exceeds
                module.rope_type = {layer: "default" if "dynamic" in kind else kind for layer, kind in kinds.items()}
            elif isinstance(kinds, str) and (kinds == "longrope" or "dynamic" in kinds):
                self._hold(module, kinds)

    def stretch(self, tokens: int) -> int:
        """The stretch of a text of so many tokens, its answer included."""
        if self._original is None or tokens <= self._original:
            return 0
        return tokens if self._grows else self._original + 1

    def use(self, stretch: int) -> None:
        """Ready the model for texts of this stretch."""
        if stretch != self._stretch:
            for place, frequencies in self._held:
                place.copy_(frequencies(stretch))
        self._stretch = stretch

    def _hold(self, module: Any, kind: str) -> None:
        config, place = module.config, module.inv_freq
        parameters = config.rope_parameters
        self._grows = kind != "longrope"
        self._original = int(parameters.get("original_max_position_embeddings") or config.max_position_embeddings)
        if self._grows:  # transformers takes the stated context for the original one
            config = copy.deepcopy(config)
            config.max_position_embeddings = self._original
        make, original = ROPE_INIT_FUNCTIONS[kind], self._original
        self._held.append((place, lambda stretch: make(config, place.device, seq_len=stretch or original)[0]))
        place.copy_(self._held[-1][1](0))
        module.rope_type = "default"
