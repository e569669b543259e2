"""The stacks of layers of a model, from the names of its tensors."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from workers.checkpoints.configs import sections

_NUMBER = re.compile(r"\.(\d+)\.")
STACKS = ("layers", "layer", "blocks", "block", "h")


def layer_of(tensor: str) -> tuple[str, int] | None:
    """(the stack, the layer in it): the name before its first number, and that number; None without a number."""
    found = _NUMBER.search(tensor)
    return (tensor[: found.start()], int(found[1])) if found else None


def layer_counts(tensors: Iterable[str], config: Mapping[str, Any]) -> Mapping[str, int]:
    """Stack to number of layers, as mergekit counts them: each module of a multimodal model has its own.

    A stack has all numbers from 0, or the name of one. Others are one layer, as `mlp.0` and `mlp.2` in the projector of
    Qwen2-VL. The layers for multi-token prediction, which follow the last layer of a stack, are not counted.
    """
    found: dict[str, set[int]] = defaultdict(set)
    for tensor in tensors:
        if (layer := layer_of(tensor)) is not None:
            found[layer[0]].add(layer[1])
    predicting = {
        fields["num_hidden_layers"] + fields["num_nextn_predict_layers"]: fields["num_hidden_layers"]
        for _, fields in sections(config)
        if isinstance(fields.get("num_hidden_layers"), int) and isinstance(fields.get("num_nextn_predict_layers"), int)
    }
    counts = {stack: 1 + max(layers) for stack, layers in found.items()}
    return {
        stack: predicting.get(count, count) if count == len(found[stack]) or stack.rpartition(".")[2] in STACKS else 1
        for stack, count in counts.items()
    }
