"""The fields of a config that count the layers of a stack, or that state something of each layer.

Every layer of a stack that is made of layers of others keeps the kind that it has where it comes from: full or sliding
attention, dense or sparse. The names are those of transformers' configs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.errors import BadInput
from workers.checkpoints.configs import TEXT_SECTIONS, completed, is_section

COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth")
ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers", *COUNTS)
DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
INDEXES = (
    "mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices",
    "fullatt_block_indexes", "deepstack_visual_indexes", "global_attn_indexes",
)  # fmt: skip
"""Lists of the layers of one kind."""

PERIODS: Mapping[str, str] = {
    "sliding_window_pattern": "layer_types",
    "_sliding_window_pattern": "layer_types",
    "full_attention_interval": "layer_types",
    "global_attn_every_n_layers": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "interleave_moe_layer_step": "moe_layers",
    "attn_layer_period": "layers_block_type",
    "expert_layer_period": "",
    "moe_layer_freq": "",
    "moe_layer_interval": "",
}
"""Kinds that return every so many layers, and the list that states them layer by layer where the class has one."""

INSEPARABLE = ("num_kv_shared_layers",)
"""The layers of such a stack read each other's results."""

_LIST_OF_LAYERS = re.compile(r"layer|block|pattern|types")
_NO_LIST_OF_LAYERS = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "bad_words_ids")
_TOWER = re.compile(r"(?:^|\.)(vision|visual|vit|image|audio|speech)[^.]*(?:\.|$)")


@dataclass(frozen=True)
class Depth:
    """The layers of one stack as a config states them: the fields that count them, and the kinds of each layer.

    `path` is the section of config.json. `kinds` has a value of each layer by field.
    """

    path: tuple[str, ...]
    counts: tuple[str, ...]
    layers: int
    kinds: Mapping[str, Sequence[Any]]
    fields: Mapping[str, Any]


def depth_of(config: Mapping[str, Any], stack: str, layers: int, where: str) -> Depth:
    """The depth of a stack of `layers` layers, whose tensors' names begin with `stack`.

    `BadInput` if the config does not count them.
    """
    raw_path = _section(config, stack)
    full = completed(config)
    full = _at(full, _section(full, stack))
    fields = {**full, **_at(config, raw_path)}
    wanted = COUNTS
    if config.get("is_encoder_decoder") and not _TOWER.search(stack):
        wanted = DECODER_COUNTS if "decoder" in stack.split(".") else ENCODER_COUNTS
    counts = tuple(name for name in wanted if fields.get(name) == layers)
    if not counts:
        raise BadInput(
            f"{where}: no known field of config.json counts the {layers} layers of {stack}; merge whole models under"
            " `models:`"
        )
    kinds: dict[str, Sequence[Any]] = {
        name: [*value] for name, value in fields.items() if _is_list_of_layers(name, value, layers)
    }
    for name in INDEXES:
        if isinstance(of_kind := fields.get(name), list):
            kinds[name] = [layer in of_kind for layer in range(layers)]
    if isinstance(step := fields.get("decoder_sparse_step"), int) and step > 0:
        dense = kinds.get("mlp_only_layers") or [False] * layers
        kinds["mlp_only_layers"] = [is_dense or (layer + 1) % step != 0 for layer, is_dense in enumerate(dense)]
    if isinstance(first := fields.get("first_k_dense_replace"), int):
        kinds["first_k_dense_replace"] = [layer < first for layer in range(layers)]
    return Depth(raw_path, counts, layers, kinds, fields)


def with_layers(
    config: Mapping[str, Any], depth: Depth, kinds: Mapping[str, Sequence[Any]], from_layers: Sequence[int], place: str
) -> dict[str, Any]:
    """The config with as many layers as `from_layers` has, each of the kinds given, in the stack of `depth`.

    `from_layers` has the number of each layer where it comes from. `BadInput` if the config cannot state these kinds.
    """
    changed: dict[str, Any] = dict.fromkeys(depth.counts, len(from_layers))
    for name, of_layers in kinds.items():
        if name in INDEXES:
            changed[name] = [layer for layer, is_one in enumerate(of_layers) if is_one]
        elif name == "first_k_dense_replace":
            changed[name] = sum(of_layers)
            if not all(of_layers[: changed[name]]):
                raise BadInput(
                    f"{place}: dense layers would follow sparse ones, which {name} of config.json cannot state;"
                    " begin with the dense layers"
                )
        else:
            changed[name] = "".join(of_layers) if isinstance(depth.fields[name], str) else [*of_layers]
    if "mlp_only_layers" in kinds and "decoder_sparse_step" in depth.fields:
        changed["decoder_sparse_step"] = 1
    types = kinds.get("layer_types", ())
    if "max_window_layers" in depth.fields and "sliding_attention" in types:
        changed["max_window_layers"] = [*types].index("sliding_attention")
    for name, list_of_layers in PERIODS.items():
        period = depth.fields.get(name)
        if not isinstance(period, int) or period < 2 or list_of_layers in kinds:
            continue
        if any((layer - origin) % period for layer, origin in enumerate(from_layers)):
            raise BadInput(
                f"{place}: the kinds of layers return every {period} layers ({name} of config.json), which these slices"
                f" disturb; take ranges that begin and end at multiples of {period}"
            )
    for name in INSEPARABLE:
        if depth.fields.get(name):
            raise BadInput(
                f"{place}: {name} of config.json: layers share results, and cannot be taken apart; merge whole models"
                " under `models:`"
            )
    return _changed(config, depth.path, changed)


def without_layers(config: Mapping[str, Any], depth: Depth) -> dict[str, Any]:
    """The config without the fields that say how many layers the stack has and of which kind, to compare the rest."""
    gone = {*depth.counts, *depth.kinds, *PERIODS, "max_window_layers", "decoder_sparse_step"}
    return _changed(config, depth.path, dict.fromkeys(gone))


def _is_list_of_layers(name: str, value: Any, layers: int) -> bool:
    if isinstance(value, str):
        return name.endswith("pattern") and len(value) == layers
    if not isinstance(value, list | tuple) or len(value) != layers or name in (*INDEXES, *_NO_LIST_OF_LAYERS):  # pyright: ignore[reportUnknownArgumentType]
        return False
    return layers > 3 or _LIST_OF_LAYERS.search(name) is not None


def _section(config: Mapping[str, Any], stack: str) -> tuple[str, ...]:
    """The path of the section that describes a stack: of a tower by its name, else of the language model."""
    if tower := _TOWER.search(stack):
        kind = "audio" if tower[1] in ("audio", "speech") else "vision"
        for key, value in config.items():
            if is_section(key, value) and kind in key:
                return (key,)
            if is_section(key, value) and key in TEXT_SECTIONS and (inner := _section(value, stack)):
                return (key, *inner)
        return ()
    for key in TEXT_SECTIONS:
        if is_section(key, config.get(key)):
            return (key, *_section(config[key], stack))
    return ()


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Mapping[str, Any]:
    for key in path:
        config = config[key]
    return config


def _changed(config: Mapping[str, Any], path: Sequence[str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """The config with these fields in the section at `path`; a field of None is taken out."""
    if path:
        return {**config, path[0]: _changed(config[path[0]], path[1:], fields)}
    return {key: value for key, value in {**config, **fields}.items() if fields.get(key, value) is not None}
