"""The layers of the stacks of a model, counted from names as mergekit's architectures list them."""

from __future__ import annotations

from typing import Any

import pytest

from workers.checkpoints.stacks import layer_counts, layer_of


@pytest.mark.parametrize(
    ("tensor", "layer"),
    [
        ("model.layers.12.mlp.experts.3.up_proj.weight", ("model.layers", 12)),
        ("transformer.h.0.ln_1.bias", ("transformer.h", 0)),
        ("model.embed_tokens.weight", None),
    ],
)
def test_the_layer_is_the_first_number_in_a_name(tensor: str, layer: tuple[str, int] | None):
    assert layer_of(tensor) == layer


STACKS: dict[str, tuple[list[tuple[str, list[int]]], dict[str, Any], dict[str, int]]] = {
    "one stack": ([("model.layers", [0, 1, 2])], {}, {"model.layers": 3}),
    "Qwen2-VL": (
        [("model.layers", [0, 1]), ("visual.blocks", [0, 1, 2, 3]), ("visual.merger.mlp", [0, 2])],
        {},
        {"model.layers": 2, "visual.blocks": 4, "visual.merger.mlp": 1},
    ),
    "T5": ([("encoder.block", [0, 1]), ("decoder.block", [0, 1, 2])], {}, {"encoder.block": 2, "decoder.block": 3}),
    "layers without weights": ([("model.layers", [0, 1, 5])], {}, {"model.layers": 6}),
    "DeepSeek V3 and its layer for multi-token prediction": (
        [("model.layers", [0, 1, 2, 3])],
        {"num_hidden_layers": 3, "num_nextn_predict_layers": 1},
        {"model.layers": 3},
    ),
}


@pytest.mark.parametrize("kind", STACKS)
def test_each_stack_has_its_own_number_of_layers(kind: str):
    stacks, config, counts = STACKS[kind]
    names = [f"{stack}.{number}.w" for stack, numbers in stacks for number in numbers]
    assert layer_counts(["norm.weight", *names], config) == counts
