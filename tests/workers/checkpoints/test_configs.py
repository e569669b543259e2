"""The fields of configs, by the config classes of transformers and by the contexts that vLLM derives."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig

from workers.checkpoints.configs import completed, context_length, quantisation, rope, text_fields, with_dtype

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
CONTEXTS: dict[str, tuple[dict[str, Any], int | None]] = {
    "plain": ({"max_position_embeddings": 4096}, 4096),
    "no field": ({"vocab_size": 7}, None),
    "the default of a class": ({"model_type": "gemma3", "text_config": {"vocab_size": 7}}, 131072),
    "GPT-2": ({"n_positions": 1024}, 1024),
    "YaRN as the card of Qwen2.5 has it": ({"max_position_embeddings": 32768, "rope_scaling": YARN}, 131072),
    "YaRN as the card of Qwen3 has it": ({"max_position_embeddings": 40960, "rope_scaling": YARN}, 131072),
    "YaRN in the spelling of old": (
        {"max_position_embeddings": 1000, "rope_scaling": {"type": "yarn", "factor": 2}},
        2000,
    ),
    "YaRN of DeepSeek V3": (
        {
            "max_position_embeddings": 163840,
            "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096},
        },
        163840,
    ),
    "linear": ({"max_position_embeddings": 1024, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 4096),
    "dynamic": ({"max_position_embeddings": 1024, "rope_scaling": {"type": "dynamic", "factor": 2.0}}, 2048),
    "Llama 3.1": (
        {
            "max_position_embeddings": 131072,
            "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8192},
        },
        131072,
    ),
    "Phi-3": ({"max_position_embeddings": 131072, "rope_scaling": {"type": "longrope"}}, 131072),
    "Gemma 3": (
        {
            "text_config": {
                "model_type": "gemma3_text",
                "max_position_embeddings": 131072,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            }
        },
        131072,
    ),
    "vision and language": (
        {"max_position_embeddings": 7, "text_config": {"max_position_embeddings": 32768, "rope_scaling": YARN}},
        131072,
    ),
    "omni": ({"thinker_config": {"text_config": {"max_position_embeddings": 99}}}, 99),
}


@pytest.mark.parametrize("kind", CONTEXTS)
def test_the_context_is_the_one_that_vllm_derives(kind: str):
    config, length = CONTEXTS[kind]
    assert context_length(config) == length


def test_the_fields_of_the_language_model_are_those_that_transformers_takes():
    config = AutoConfig.for_model("gemma3", text_config={"vocab_size": 77, "rope_theta": 5.0}).to_dict()
    assert text_fields(config)["vocab_size"] == 77
    assert text_fields(config)["model_type"] == AutoConfig.for_model("gemma3").get_text_config().model_type


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_theta": 5000, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_theta": 5000.0, "rope_type": "linear", "factor": 2.0}},
    ],
)
def test_rope_is_the_same_in_every_spelling(fields: dict[str, Any]):
    assert rope(fields) == (5000.0, {"rope_type": "linear", "factor": 2.0})


def test_no_scaling_has_one_meaning():
    for scaling in (None, {}, {"type": "default"}, {"rope_type": "default", "rope_theta": None}, "a word"):
        assert rope({"rope_scaling": scaling}) == (None, None)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": ["yarn"], "factor": 2},
        {"rope_type": "yarn", "factor": "2"},
        {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": "x"},
        {"rope_type": "linear", "factor": float("inf")},
        [1],
    ],
)
def test_fields_of_no_sense_stretch_nothing(scaling: Any):
    fields = {"max_position_embeddings": 128, "rope_scaling": scaling, "rope_theta": 10**400, "text_config": [1]}
    assert context_length(fields) == 128
    assert rope(fields)[0] is None


def test_a_config_is_completed_by_its_class_and_not_changed():
    config: dict[str, Any] = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "own": 7}
    full = completed(config)
    assert (full["num_key_value_heads"], full["head_dim"], full["hidden_act"], full["own"]) == (4, 16, "silu", 7)
    assert config == {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "own": 7}


@pytest.mark.parametrize("config", [{"model_type": "of tomorrow"}, {"model_type": "llama", "hidden_size": "x"}, {}])
def test_a_config_that_transformers_does_not_take_stays_as_it_is(config: dict[str, Any], capfd: Any):
    assert completed(config) == config
    assert capfd.readouterr() == ("", "")


def test_dtypes_are_set_where_they_are_stated():
    config = {"dtype": "float32", "a": {"dtype": 1}, "text_config": {"torch_dtype": "float32", "b_config": {"c": 1}}}
    assert with_dtype(config, "bfloat16") == {
        "dtype": "bfloat16",
        "a": {"dtype": 1},
        "text_config": {"torch_dtype": "bfloat16", "b_config": {"c": 1}},
    }


def test_a_quantisation_is_found_at_any_depth():
    assert quantisation({"a_config": {"b_config": {"quantization_config": {"quant_method": "awq"}}}}) == "awq"
    assert quantisation({"quantization": {"bits": 4}}) == "quantization"
    assert quantisation({"quantization_config": None, "text_config": {"quantization_config": {}}}) is None
