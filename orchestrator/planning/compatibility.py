"""Whether parents can be merged at all: same architecture, same config, same tokens; and the config of the merge."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jobs.errors import BadInput
from workers.checkpoints.canonical import HEAD, embeddings_in
from workers.checkpoints.configs import completed, is_section, rope, sections, text_fields, with_dtype
from workers.checkpoints.opening import Checkpoint
from workers.checkpoints.vocabularies import Vocabulary, read_vocabulary, vocabulary_files
from workers.storage import open_store

TIED = "tie_word_embeddings"
PARTIAL = "partial_rotary_factor"
OTHER_NAMES_OF_THE_CONTEXT = ("n_ctx", "max_sequence_length", "max_seq_len", "seq_length", "model_max_length")


HARMLESS: Mapping[str, tuple[str, ...]] = {
    "the place of the file and the program that wrote it": (
        "_name_or_path", "_commit_hash", "name_or_path", "transformers_version", "trl_version", "unsloth_version",
        "unsloth_fixed", "unsloth_training", "model_name", "license", "auto_map",
    ),
    "the dtype, which the merge states anew": ("dtype", "torch_dtype"),
    "speed and memory, not values": (
        "use_cache", "_attn_implementation", "attn_implementation", "_attn_implementation_autoset",
        "_experts_implementation", "_flash_attn_2_enabled", "use_flash_attn", "use_flash_attn_2",
        "use_flash_attention", "use_flash_attention_2", "gradient_checkpointing", "use_gradient_checkpointing",
        "low_cpu_mem_usage", "unsloth_tiled_mlp", "pretraining_tp", "ep_size", "torchscript", "chunk_size_feed_forward",
        "use_bfloat16",
    ),
    "the form of the output of a forward pass": (
        "return_dict", "use_return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
        "output_scores", "output_past", "return_dict_in_generate",
    ),
    "training": (
        "initializer_range", "initializer_factor", "router_aux_loss_coef", "aux_loss_alpha", "seq_aux",
        "router_jitter_noise", "loss_type", "ignore_index", "problem_type", "finetuning_task", "task_specific_params",
        "keys_to_ignore_at_inference",
    ),
    "the ends of answers and generation; they belong to the tokenizer and to generation_config.json": (
        "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "unk_token_id", "decoder_start_token_id",
        "forced_bos_token_id", "forced_eos_token_id", "forced_decoder_ids", "suppress_tokens", "begin_suppress_tokens",
        "bad_words_ids", "tokenizer_class", "tokenizer_padding_side", "tokenizer_model_max_length", "padding_side",
        "prefix", "max_length", "min_length", "max_new_tokens", "do_sample", "temperature", "top_p", "top_k",
        "typical_p", "num_beams", "num_beam_groups", "num_return_sequences", "early_stopping", "length_penalty",
        "diversity_penalty", "repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty", "remove_invalid_values", "cache_implementation", "min_p", "penalty_alpha",
        "epsilon_cutoff", "eta_cutoff", "renormalize_logits", "guidance_scale",
    ),
    "names of classes for people": ("id2label", "label2id"),
}  # fmt: skip
"""Fields of a config that parents may state differently, by the reason. Everything else must agree.

Each dropout is one of them too, for training.
"""

_HARMLESS = frozenset(field for fields in HARMLESS.values() for field in fields)


def merged_config(donor: Checkpoint, context_from: Checkpoint, dtype: str) -> dict[str, Any]:
    """The config.json of a merge: `context_from` states everything that must agree, the donor the rest.

    The dtype is that of the merged weights, in nested configs too.
    """
    config = {
        key: of[key]
        for key in {**donor.config, **context_from.config}
        if key in (of := donor.config if _is_harmless(key) else context_from.config)
    }
    return with_dtype(config if config.keys() & {"dtype", "torch_dtype"} else {**config, "dtype": dtype}, dtype)


def check_architecture(parents: Sequence[Checkpoint], place: str) -> None:
    """Refuses parents of different architectures."""
    first = parents[0]
    for other in parents[1:]:
        if first.config.get("model_type") != other.config.get("model_type"):
            raise BadInput(
                f"{place}: {first.name} is a {first.config.get('model_type')}, {other.name} a"
                f" {other.config.get('model_type')}; parents share one architecture"
            )


def untied_one(parents: Sequence[Checkpoint]) -> Checkpoint | None:
    """The first parent with a head of its own, if others tie theirs to the embeddings; None if all agree.

    A tied head is a head with the values of the embeddings, so that an untied merge holds both. None also for a parent
    that unties a head that it does not have.
    """
    if len({is_tied(parent, parent.config) for parent in parents}) == 1:
        return None
    untied = [parent for parent in parents if not is_tied(parent, completed(parent.config))]
    with_head = all(any(name.endswith(HEAD) for name in parent.tensors) for parent in untied)
    return untied[0] if untied and len(untied) < len(parents) and with_head else None


def check_configs(parents: Sequence[Checkpoint], place: str, remedy: str, *, tying: bool = True) -> None:
    """Refuses parents whose configs disagree on anything that is not `HARMLESS`, with the values side by side.

    `remedy` is the setting that names the parent whose config holds. Without `tying`, heads may be tied or not.
    """

    def head(parent: Checkpoint, config: Mapping[str, Any]) -> dict[str, Any]:
        return {TIED: is_tied(parent, config)} if tying else {}

    stated = [_fields(parent.config) | head(parent, parent.config) for parent in parents]
    differing = _differing(stated, lambda value: value)  # an unstated field may have a default that is not off
    if not differing:
        return
    full = [(parent, completed(parent.config)) for parent in parents]
    meant = [_fields(config, all_stated=config is not parent.config) | head(parent, config) for parent, config in full]
    if found := _differing(meant):
        field = next((name for name in differing if name in found), differing[0])
        values = ", ".join(
            f"{parent.name} {_clipped(own[field] if own.get(field) is not None else all_of_it.get(field))}"
            for parent, own, all_of_it in zip(parents, stated, meant, strict=True)
        )
        raise BadInput(f"{place}: the parents disagree on {field}: {values}; say whose holds with {remedy}")


def _clipped(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def _differing(
    configs: Sequence[Mapping[str, Any]], reading: Callable[[Any], Any] = lambda value: value or None
) -> list[str]:
    """The fields that do not agree. No field, null, false and zero agree: each switches something off."""
    names = dict.fromkeys(name for fields in configs for name in fields)
    values = {name: [reading(fields.get(name)) for fields in configs] for name in names}
    values["architectures"] = [stated for stated in values.get("architectures", ()) if stated is not None]
    return [name for name, stated in values.items() if any(value != stated[0] for value in stated)]


def _fields(config: Mapping[str, Any], *, all_stated: bool = False) -> dict[str, Any]:
    """Every field that matters, by its dotted path, with equal names and values for every transformers version.

    With `all_stated` the config has the defaults of its class, so that a missing field means no field.
    """
    found: dict[str, Any] = {}
    for path, section in sections(config):
        fields = {key: section[key] for key in section if not _is_harmless(key) and not is_section(key, section[key])}
        theta, scaling = rope(fields)
        for spelling in ("rope_theta", "rope_parameters", "rope_scaling", TIED):
            fields.pop(spelling, None)
        part = (scaling or {}).get(PARTIAL, fields.get(PARTIAL))
        scaling = {key: value for key, value in (scaling or {}).items() if key != PARTIAL}
        fields |= {
            "rope_theta": theta,
            "rope_scaling": None if scaling in ({}, {"rope_type": "default"}) else scaling,
            PARTIAL: None if all_stated and part == 1 else part,
        }
        if fields.get("layer_types"):  # made from the pattern
            fields.pop("sliding_window_pattern", None)
            fields.pop("_sliding_window_pattern", None)
        if fields.get("hidden_activation"):
            fields.setdefault("hidden_act", fields["hidden_activation"])
        for name in OTHER_NAMES_OF_THE_CONTEXT:
            if fields.get(name) in (fields.get("max_position_embeddings"), fields.get("n_positions")):
                fields.pop(name, None)
        if fields.pop("use_sliding_window", True) is False:
            fields.pop("sliding_window", None)
        if not fields.get("sliding_window"):
            fields.pop("max_window_layers", None)
        hidden, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
        if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
            fields["head_dim"] = fields.get("head_dim") or hidden // heads  # not every class has it as a field
        found |= {f"{path}{key}": value for key, value in fields.items()}
    return found


def _is_harmless(field: str) -> bool:
    return field in _HARMLESS or "dropout" in field or "pdrop" in field


def is_tied(parent: Checkpoint, config: Mapping[str, Any]) -> bool:
    """Whether the head is the embeddings: as the parent's config states it, else its tensors, else `config`."""
    stated = text_fields(parent.config).get(TIED)
    if stated is None and embeddings_in(parent.tensors) is not None:
        return not any(name.endswith(HEAD) for name in parent.tensors)
    return bool(text_fields(config).get(TIED) if stated is None else stated)


def check_tokenizers(parents: Sequence[Checkpoint], place: str) -> None:
    """Refuses parents whose vocabularies differ; a parent without a tokenizer agrees with all."""
    have = [(parent, files) for parent in parents if (files := vocabulary_files(parent.side_files))]
    for other, files in have[1:]:
        first, first_files = have[0]
        shared = [name for name in first_files if name in files]
        shared = shared[:1] if "tokenizer.json" in shared else shared
        for one, another in [(name, name) for name in shared] or [(first_files[0], files[0])]:
            vocabularies = _vocabulary(first, one), _vocabulary(other, another)
            difference = vocabularies[0].difference(vocabularies[1])
            if difference is not None:
                remedy = "say whose to take with `tokenizer_source: PARENT` if you know that the rest agrees"
                if all(vocabulary.tokens for vocabulary in vocabularies):
                    remedy = "choose one with `tokenizer_source: PARENT`, or take the tokens of all with `union`"
                raise BadInput(
                    f"{place}: the tokenizers of {first.name} and {other.name} differ ({difference}); {remedy}"
                )


def _vocabulary(parent: Checkpoint, name: str) -> Vocabulary:
    return read_vocabulary(open_store(parent.url), parent.side_files, name)
