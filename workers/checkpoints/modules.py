"""The modules of a model, by mergekit's names for them, from the names of its tensors.

A model of one stack is the module `default`. A multimodal one has `text_decoder`, `vision_tower` (or the name of that
part in its tensors) and `multi_modal_projector`; an encoder-decoder has `encoder`, `decoder` and `shared`. Where
mergekit has no definition of the model, its modules are the stacks, each called by the part of the tensors' names
before a layer's number, and `default` for all other tensors. These names are taken too.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from workers.checkpoints.stacks import STACKS, layer_counts, layer_of

TEXT = "text_decoder"
_TOWER = re.compile(
    r"(?:^|\.)(vision_tower|vision_model|vision_encoder|visual|audio_tower|audio_model|audio_encoder)\."
)
_PROJECTOR = re.compile(
    r"(?:^|\.)(multi_?modal_projector|mm_projector|connector|merger|deepstack_merger_list|aligner|embed_vision"
    r"|embed_audio|image_newline|mlp1)(?:\.|$)"
)
_BEFORE_LAYERS = re.compile(
    r"embd|embed(?!_out)|relative_attention_bias|(?:^|\.)(?:wte|wpe|shared|project_in|conv\d|pre_layr?norm|ln_pre|relative_pe|rotary_pos_emb)\."
)


def modules_of(names: Collection[str]) -> Mapping[str, frozenset[str]]:
    """Module to the names of its tensors; every tensor is in one module."""
    found: dict[str, set[str]] = {}
    parts = {part for name in names if (layer := layer_of(name)) for part in layer[0].split(".")}
    both = {"encoder", "decoder"} <= parts
    towers = any(_TOWER.search(name) for name in names)
    for name in names:
        module = "default"
        if towers:
            tower = _TOWER.search(name)
            module = "multi_modal_projector" if _PROJECTOR.search(name) else tower[1] if tower else TEXT
        elif both:
            path = name.split(".")
            module = (
                "encoder" if "encoder" in path else "decoder" if {"decoder", "lm_head", "proj_out"} & {*path} else ""
            )
            module = module or "shared"
        found.setdefault(module, set()).add(name)
    return {module: frozenset(of_module) for module, of_module in found.items()}


def tensors_of(name: str, modules: Mapping[str, frozenset[str]]) -> frozenset[str]:
    """The tensors of the module that a document calls `name`; none if there is no such module."""
    if name in ("vision_tower", "vision_model", "visual"):
        name = next((own for own in modules if _TOWER.search(f"{own}.") and "audio" not in own), name)
    name = TEXT if name == "language_model" else name
    if name in modules:
        return modules[name]
    every = frozenset[str]().union(*modules.values())
    return frozenset(tensor for tensor in every if (layer := layer_of(tensor)) is not None and layer[0] == name)


def stack_of(names: Iterable[str], config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """The stacks of layers among these tensors, each with the number of its layers."""
    counts = layer_counts((name for name in names if "mtp" not in name.split(".")), config)
    named = [(stack, count) for stack, count in counts.items() if stack.rpartition(".")[2] in STACKS]
    return named or [(stack, count) for stack, count in counts.items() if count > 1]


def in_stack(name: str, stack: str) -> int | None:
    """The layer of a tensor of this stack; None for others, and for the positions of T5 that its first layer keeps."""
    layer = layer_of(name)
    return layer[1] if layer is not None and layer[0] == stack and "relative_attention_bias" not in name else None


def is_before_layers(name: str) -> bool:
    """Whether a tensor outside the layers comes before them, as embeddings do; norm and head come after."""
    return _BEFORE_LAYERS.search(name) is not None and "unembed" not in name
