"""Whether parents can be merged at all: same architecture, same shapes, same tokens, same idea of context length."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.errors import BadInput
from workers.checkpoints.opening import LARGEST_TOKENIZER, Checkpoint
from workers.checkpoints.safetensors import read_json
from workers.storage import open_store

HEAD, EMBEDDINGS = "lm_head.weight", "model.embed_tokens.weight"


def context_fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a config that decide the context, with equal names and values for every transformers version.

    A field that the config does not state is left out, and disagrees with nothing.
    """
    rope = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", config.get("rope_theta"))
    kind = rope.pop("rope_type", rope.pop("type", "default"))
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    fields = {
        "max_position_embeddings": config.get("max_position_embeddings"),
        "rope_theta": None if theta is None else float(theta),
        "rope_scaling": None if kind == "default" and not rope else {"rope_type": kind, **rope},
        "sliding_window": window,
        "tie_word_embeddings": config.get("tie_word_embeddings"),
        "vocab_size": config.get("vocab_size"),
    }
    always_stated = ("rope_scaling", "sliding_window")
    return {name: value for name, value in fields.items() if value is not None or name in always_stated}


_SPELLINGS = {
    "rope_theta": ("rope_theta", "rope_parameters"),
    "rope_scaling": ("rope_scaling", "rope_parameters"),
    "sliding_window": ("sliding_window", "use_sliding_window", "max_window_layers", "layer_types"),
}


def merged_config(donor: Checkpoint, context_from: Checkpoint, dtype: str) -> dict[str, Any]:
    """The donor's config.json with the context fields of another parent and the merged weights' dtype."""
    config = dict(donor.config)
    for field in context_fields(donor.config) | context_fields(context_from.config):
        for spelling in _SPELLINGS.get(field, (field,)):
            config.pop(spelling, None)
            if spelling in context_from.config:
                config[spelling] = context_from.config[spelling]
    for spelling in ("dtype", "torch_dtype"):
        if spelling in config:
            config[spelling] = dtype
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = dtype
    return config


def check_parents(parents: Sequence[Checkpoint], place: str, *, config_from: str | None, own_tokenizer: bool) -> None:
    """Refuses parents that do not fit together, with the values side by side.

    `config_from` and `own_tokenizer` say that the job decided itself whose config and whose tokenizer to take.
    """
    first = parents[0]
    for other in parents[1:]:
        if first.config.get("model_type") != other.config.get("model_type"):
            raise BadInput(
                f"{place}: {first.name} is a {first.config.get('model_type')}, {other.name} a"
                f" {other.config.get('model_type')}; parents share one architecture"
            )
    if config_from is None:
        _check_context(parents, place)
    if not own_tokenizer:
        _check_tokenizers(parents, place)


def _check_context(parents: Sequence[Checkpoint], place: str) -> None:
    stated = [(parent.name, _tying(parent) | context_fields(parent.config)) for parent in parents]
    for field in dict.fromkeys(name for _, fields in stated for name in fields):
        values = [(name, fields[field]) for name, fields in stated if field in fields]
        if any(value != values[0][1] for _, value in values):
            side_by_side = ", ".join(f"{name} {json.dumps(value)}" for name, value in values)
            raise BadInput(
                f"{place}: the parents disagree on {field}: {side_by_side}; say whose holds with `config_from: PARENT`"
            )


def _tying(parent: Checkpoint) -> dict[str, Any]:
    """`tie_word_embeddings` as the tensors show it, if their names allow that."""
    return {"tie_word_embeddings": HEAD not in parent.tensors} if EMBEDDINGS in parent.tensors else {}


def _check_tokenizers(parents: Sequence[Checkpoint], place: str) -> None:
    with_tokenizer = [parent for parent in parents if "tokenizer.json" in parent.side_files]
    vocabularies = [(parent.name, _vocabulary(parent)) for parent in with_tokenizer]
    for name, vocabulary in vocabularies[1:]:
        first_name, first = vocabularies[0]
        if vocabulary == first:
            continue
        token = next(
            token
            for token in sorted({**first, **vocabulary}, key=lambda token: first.get(token, 1 << 60))
            if first.get(token) != vocabulary.get(token)
        )
        raise BadInput(
            f"{place}: the tokenizers of {first_name} and {name} differ (token {token!r} is"
            f" {first.get(token, 'missing')} and {vocabulary.get(token, 'missing')});"
            " say whose to take with `tokenizer_source: PARENT` if you know that the rest agrees"
        )


def _vocabulary(parent: Checkpoint) -> dict[str, int]:
    """Token to id, of a tokenizer.json (https://huggingface.co/docs/tokenizers)."""
    tokenizer = read_json(open_store(parent.url), parent.side_files["tokenizer.json"], LARGEST_TOKENIZER)
    vocabulary = tokenizer.get("model", {}).get("vocab", {})
    if isinstance(vocabulary, list):  # unigram: [token, score] in the order of ids
        vocabulary = {entry[0]: index for index, entry in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens", [])}}
