"""The fields of config.json, those of nested configs included, under equal names for every version of transformers."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Any

from jobs.errors import BadInput

TEXT_SECTIONS = ("text_config", "language_config", "llm_config", "thinker_config", "decoder")
"""Names of the section that describes the language model of a multimodal checkpoint."""

QUANTISATION = ("quantization_config", "compression_config", "quantization")
"""The keys of transformers, of older compressed-tensors and of MLX."""

STRETCHED = ("linear", "dynamic", "yarn")
"""Types of RoPE whose `factor` multiplies the context; the config of others states the whole context."""


def sections(config: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The config and every config inside it, each with its dotted path: "", "text_config.", "vision_config."."""
    yield path, config
    for key, value in config.items():
        if is_section(key, value):
            yield from sections(value, f"{path}{key}.")


def check_types(config: Mapping[str, Any], where: str) -> None:
    """`BadInput` if a field that a merge reads, in any section, has a value of another type; null is no value."""
    for path, fields in sections(config):
        for key, (kind, name) in _TYPES.items():
            value = fields.get(key)
            right = value is None or (isinstance(value, kind) and (kind is bool or not isinstance(value, bool)))
            if key == "architectures" and isinstance(value, list):
                right = all(isinstance(entry, str) and entry for entry in value)
            if not right:
                shown = json.dumps(value)[:80]
                raise BadInput(
                    f"{where}: config.json: {path}{key} is {shown}, not {name}; fetch it again, or correct it"
                )


_TYPES: Mapping[str, tuple[type, str]] = {
    "architectures": (list, "a list of names"),
    "auto_map": (dict, "a mapping"),
    "dtype": (str, "a name"),
    "max_position_embeddings": (int, "a whole number"),
    "model_type": (str, "a name"),
    "n_positions": (int, "a whole number"),
    "rope_parameters": (dict, "a mapping"),
    "rope_scaling": (dict, "a mapping"),
    "tie_word_embeddings": (bool, "true or false"),
    "torch_dtype": (str, "a name"),
}


def is_section(key: str, value: Any) -> bool:
    """Whether a field is a config of its own, as `text_config` is."""
    return isinstance(value, Mapping) and key not in QUANTISATION and (key.endswith("config") or "model_type" in value)


def text_fields(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of the language model: those of its section, over those of the whole config."""
    for name in TEXT_SECTIONS:
        if is_section(name, config.get(name)):
            return text_fields({**{key: config[key] for key in config if key != name}, **config[name]})
    return config


def rope(fields: Mapping[str, Any]) -> tuple[float | None, Mapping[str, Any] | None]:
    """(theta if it is stated, the scaling or None) of one section, in the spelling of any version of transformers."""
    found = fields.get("rope_parameters") or fields.get("rope_scaling")
    scaling = dict(found) if isinstance(found, Mapping) else {}
    theta = scaling.pop("rope_theta", fields.get("rope_theta"))
    old, kind = scaling.pop("type", "default"), scaling.pop("rope_type", None)
    kind = kind or old
    kind = "longrope" if kind == "su" else kind  # its first name, in Phi-3
    number = float(theta) if isinstance(theta, int | float) and abs(theta) < 1e300 else None
    return number, None if kind == "default" and not scaling else {"rope_type": kind, **scaling}


def context_length(config: Mapping[str, Any]) -> int | None:
    """The most tokens that the model is made for, or None if neither the config nor its class states it."""
    fields = text_fields(config)
    if not {"max_position_embeddings", "n_positions"} & fields.keys():
        fields = text_fields(completed(config))
    stated = next((fields[key] for key in ("max_position_embeddings", "n_positions") if key in fields), None)
    return stretched(stated, rope(fields)[1], str(fields.get("model_type"))) if isinstance(stated, int) else None


def stretched(stated: int, scaling: Mapping[str, Any] | None, model_type: str) -> int:
    """The context of a model with `max_position_embeddings` and a RoPE scaling, in tokens.

    The `factor` multiplies the original context, as in vLLM (`_get_and_verify_max_len`) and on the model card of
    Qwen2.5. Gemma 3 states the product.
    """
    if scaling is None or scaling["rope_type"] not in STRETCHED or model_type.startswith("gemma3"):
        return stated
    factor, original = scaling.get("factor"), scaling.get("original_max_position_embeddings") or stated
    if not isinstance(factor, int | float) or not isinstance(original, int) or not math.isfinite(factor):
        return stated
    return max(stated, int(factor * original))


def quantisation(config: Mapping[str, Any]) -> str | None:
    """The name of the format if the config, or a config inside it, states quantised weights."""
    for _, fields in sections(config):
        for key in QUANTISATION:
            if stated := fields.get(key):
                names = stated if isinstance(stated, Mapping) else {}
                return str(names.get("quant_method") or names.get("format") or key)
    return None


def with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with this dtype in every section that states one."""
    return {
        key: dtype if key in ("dtype", "torch_dtype") else with_dtype(value, dtype) if is_section(key, value) else value
        for key, value in config.items()
    }


def with_vocabulary(config: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """The config with `vocab_size: rows` for the language model, and on top too if it is stated there."""
    for name in TEXT_SECTIONS:
        if is_section(name, config.get(name)):
            stated = {"vocab_size": rows} if "vocab_size" in config else {}
            return {**config, **stated, name: with_vocabulary(config[name], rows)}
    return {**config, "vocab_size": rows}


def with_token_ids(config: Mapping[str, Any], of: Mapping[str, Any]) -> dict[str, Any]:
    """The config with the ids of tokens, such as `eos_token_id`, that the config `of` states in the same section."""
    found = dict(config)
    for key, value in config.items():
        if is_section(key, value) and isinstance(of.get(key), Mapping):
            found[key] = with_token_ids(value, of[key])
        elif key.endswith(("token_id", "token_ids", "token_index")) and key in of:
            found[key] = of[key]
    return found


def with_own_head(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a model whose head is not its embeddings, in every section that ties them."""
    sections = {
        key: with_own_head(value)
        for key, value in config.items()
        if is_section(key, value) and "tie_word_embeddings" in value
    }
    return {**config, **sections, "tie_word_embeddings": False}


def completed(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The config with the defaults of its class in transformers, or as it is where transformers has no such class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return config
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        return CONFIG_MAPPING[kind].from_dict(_copied(config)).to_dict()
    except Exception:  # of any type: the class is a program, and a field may have any value
        return config
    finally:
        logger.setLevel(level)


def _copied(value: Any) -> Any:
    """A copy without tuples and shared parts, because transformers writes into what it is given."""
    if isinstance(value, Mapping):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list | tuple) else value
