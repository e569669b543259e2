"""Planning reads headers alone: what will be made, in which files, by which tasks, and what is refused at the desk."""

from __future__ import annotations

import base64
import json
import struct
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import BadInput, ObjectMissing
from jobs.job import Job, load_job
from jobs.merge_tasks import DTYPE_BITS
from orchestrator.planning.compatibility import HARMLESS
from orchestrator.planning.plan import MOST_UPLOADS, Plan, make_plan
from tests.growth import growth
from tests.orchestrator.models import CONFIG, EMBEDDINGS, HEAD, HIDDEN, LAYERS, TOKENIZER, shapes, weights, write_model
from workers.methods import METHODS

Planning = Callable[..., Plan]
Jobs = Callable[..., Job]

TIES = """
  merge_method: ties
  base_model: base
  models:
  - {model: cos, parameters: {weight: 0.5, density: "${d}"}}
  - {model: fmt, parameters: {weight: 0.5, density: "${d}"}}
  - {model: base}
"""
TWO = """
  merge_method: linear
  models:
  - {model: cos, parameters: {weight: "${a}"}}
  - {model: fmt, parameters: {weight: "${b}"}}
"""
EVEN = TWO.replace('"${a}"', "1").replace('"${b}"', "1")


def refusal(plan: Planning, **more: Any) -> str:
    with pytest.raises(BadInput) as refused:
        plan(**more)
    line = str(refused.value)
    assert len(line.splitlines()) == 1
    return line


# ---- files


def test_one_shard_has_the_plain_name_and_no_index(plan: Planning):
    layout = plan().points[0].layout
    assert [shard.name for shard in layout.shards] == ["model.safetensors"]
    assert layout.index is None
    assert {tensor.name: tensor.shape for tensor in layout.shards[0].tensors} == shapes()


def test_shards_are_named_and_cut_as_promised(plan: Planning):
    layout = plan(shard_size=3000).points[0].layout
    count = len(layout.shards)
    assert count > 3
    assert [shard.name for shard in layout.shards] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    names = [tensor.name for shard in layout.shards for tensor in shard.tensors]
    assert Counter(names) == Counter(list(shapes()))
    for shard, following in zip(layout.shards, layout.shards[1:], strict=False):
        assert shard.bytes <= 3000 or len(shard.tensors) == 1
        assert shard.bytes + following.tensors[0].bytes > 3000, "one more tensor would have fitted"
    assert layout.index == {
        "metadata": {"total_size": sum(2 * torch.Size(shape).numel() for shape in shapes().values())},
        "weight_map": {tensor.name: shard.name for shard in layout.shards for tensor in shard.tensors},
    }


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(plan: Planning):
    layout = plan(shard_size=1).points[0].layout
    assert [len(shard.tensors) for shard in layout.shards] == [1] * len(shapes())


def test_layers_come_in_their_natural_order(plan: Planning, parents: Path):
    for who in ("cos", "fmt"):
        tensors = {f"model.layers.{number}.w": torch.ones(2) for number in (10, 2, 0)}
        write_model(parents / who, tensors, config={"tie_word_embeddings": True})
    (shard,) = plan().points[0].layout.shards
    assert [tensor.name for tensor in shard.tensors] == [f"model.layers.{number}.w" for number in (0, 2, 10)]


def test_wider_dtypes_come_first_in_a_file(plan: Planning, parents: Path):
    for who in ("cos", "fmt"):
        tensors = weights(who)
        tensors["model.layers.0.a"] = torch.tensor([True])
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        write_model(parents / who, tensors)
    recipe = EVEN
    (shard,) = plan(recipe=recipe, grid="").points[0].layout.shards
    widths = [DTYPE_BITS[tensor.dtype] for tensor in shard.tensors]
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == {32, 16, 8}


# ---- points


def test_equal_merges_are_planned_once(plan: Planning):
    planned = plan(recipe=TWO, grid="{points: [{a: 0.7, b: 0.3}, {a: 1.4, b: 0.6}, {a: 7, b: 3}, {a: 1, b: 1}]}")
    first = planned.points[0].name
    assert [point.same_as for point in planned.points] == [None, first, first, None]
    assert len(planned.units) == 2
    assert sum(len(task.points) for task in planned.tasks([], 1)) == 2


def test_density_one_is_the_merge_without_trimming(plan: Planning):
    planned = plan(recipe=TIES, grid="{d: [1, 0.5]}")
    assert [point.same_as for point in planned.points] == [None, None]
    assert planned.points[0].settings != planned.points[1].settings


def test_points_with_other_configs_are_not_the_same(plan: Planning, parents: Path):
    recipe = EVEN + '  tokenizer_source: "${t}"\n'
    planned = plan(recipe=recipe, grid="{t: [cos, fmt]}")
    assert [point.same_as for point in planned.points] == [None, None]
    assert planned.points[0].digest == planned.points[1].digest
    assert len(planned.units) == 2


def test_points_that_share_a_shard_have_units_of_their_own(plan: Planning):
    recipe = EVEN.replace("1}", '[{filter: embed_tokens, value: "${w}"}, {value: 1}]}', 1)
    planned = plan(recipe=recipe, grid="{w: [1, 2, 3]}", shard_size=3000)
    shards = len(planned.points[0].layout.shards)
    contents = {content for point in planned.points for content in point.contents}
    assert len(contents) == shards + 2
    assert len(planned.units) == 3 * shards
    assert sorted(planned.units.values()) == sorted(
        f"points/{point.name}/{shard.name}" for point in planned.points for shard in point.layout.shards
    )


def test_plans_of_the_same_job_are_the_same(plan: Planning):
    first, second = plan(shard_size=3000), plan(shard_size=3000)
    assert first.document() == second.document()
    assert first.units == second.units


def test_a_plan_is_another_when_its_parents_recipe_or_seed_are(plan: Planning, parents: Path):
    first = plan().digest
    assert plan(grid="{w: [0.25, 0.75]}").digest != first
    assert plan(seed=1).digest == first, "linear draws nothing"
    assert plan(workers="{memory: 2GB, cpus: 2}").digest == first
    write_model(parents / "cos", weights("cos"), config={"attention_dropout": 0.5})
    assert plan().digest != first


def test_a_method_whose_bits_have_changed_has_other_keys_and_no_other_method_has(
    plan: Planning, monkeypatch: pytest.MonkeyPatch
):
    fusion = "{merge_method: arcee_fusion, dtype: float32, base_model: cos, models: [{model: fmt}]}"
    half = "{name: half, " + fusion[1:]
    even = "{merge_method: linear, dtype: float32, models: [{model: half}, {model: fmt}], parameters: {weight: 1}}"
    recipes = (" " + fusion, f"\n- {half}\n- {even}\n", EVEN)

    def keys() -> list[tuple[str, tuple[str, ...]]]:
        points = [plan(recipe=recipe, grid="").points[0] for recipe in recipes]
        return [(point.digest, point.units) for point in points]

    before = keys()
    changed = {**METHODS, "arcee_fusion": replace(METHODS["arcee_fusion"], revision=7)}
    monkeypatch.setattr("orchestrator.planning.content_keys.METHODS", changed)
    alike = [[one == other for one, other in zip(*both, strict=True)] for both in zip(before, keys(), strict=True)]
    assert alike == [[False, False], [False, False], [True, True]]


@pytest.mark.parametrize("workers", [1, 2, 7, 100])
@pytest.mark.parametrize("shard_size", [1, 3000, "1GB"])
def test_tasks_cover_every_missing_unit_once(plan: Planning, workers: int, shard_size: object):
    planned = plan(grid="{w: {from: 0.1, to: 0.9, step: 0.1}}", shard_size=shard_size)
    done = set(list(planned.units)[::3])
    tasks = planned.tasks(done, workers)
    assert sorted(unit.unit for task in tasks for unit in task.points) == sorted(planned.units.keys() - done)
    for task in tasks:
        for unit in task.points:
            assert planned.units[unit.unit] == unit.key
            assert unit.receipt == f"receipts/{unit.unit[:2]}/{unit.unit}.json"
    assert len(tasks) >= min(workers, len(planned.units) - len(done))


def test_a_task_never_holds_more_files_open_than_a_process_may(plan: Planning):
    planned = plan(grid="{w: {from: 0.001, to: 0.999, num: 999}}", workers="{memory: 64GB}")
    assert max(len(task.points) for task in planned.tasks([], 1)) <= MOST_UPLOADS


def test_the_time_to_plan_points_grows_as_their_number(job: Jobs, parents: Path):
    def planned(count: int) -> None:
        made = make_plan(job(grid=f"{{w: {{from: 0, to: 1, num: {count + 1}}}}}"))
        tasks = made.tasks([], 8)
        assert (len(made.points), sum(len(task.points) for task in tasks)) == (count + 1, count + 1)

    assert growth(planned, 500, 5000, at_most=15) <= 15, "10 if linear, 100 if quadratic"


def test_points_that_are_not_written_cost_nothing_a_shard(plan: Planning):
    planned = plan(grid="{w: {from: 0.1, to: 0.9, num: 50}}", shard_size=3000).keeping(["w0.1"])
    planned.document()
    assert {unit.point for task in planned.tasks([], 4) for unit in task.points} == {"w0.1"}
    named = [point.name for point in planned.points if {"contents", "units"} & vars(point).keys()]
    assert named == ["w0.1"]


# ---- parents that do not fit together

DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "max_position_embeddings": ({"max_position_embeddings": 1024}, "max_position_embeddings: cos 512, fmt 1024"),
    "rope_theta": ({"rope_theta": 1e6}, "rope_theta: cos 10000.0, fmt 1000000.0"),
    "rope_scaling": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        'rope_scaling: cos null, fmt {"rope_type": "yarn", "factor": 4.0}',
    ),
    "rope_parameters": (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        "rope_theta: cos 10000.0, fmt 500000.0",
    ),
    "sliding_window": (
        {"use_sliding_window": True, "sliding_window": 128},
        "sliding_window: cos null, fmt 128",
    ),
    "vocab_size": ({"vocab_size": 64}, "vocab_size: cos 48, fmt 64"),
    "heads": ({"num_attention_heads": 4, "num_key_value_heads": 2}, "num_attention_heads: cos 2, fmt 4"),
    "activation": ({"hidden_act": "gelu"}, 'hidden_act: cos "silu", fmt "gelu"'),
    "norm epsilon": ({"rms_norm_eps": 1e-5}, "rms_norm_eps: cos 1e-06, fmt 1e-05"),
    "softcap": ({"final_logit_softcapping": 30.0}, "final_logit_softcapping: cos null, fmt 30.0"),
    "partial rotary": ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: cos null, fmt 0.5"),
    "attention multiplier": ({"attention_multiplier": 7.0}, "attention_multiplier: cos null, fmt 7.0"),
    "head": (
        {"architectures": ["Qwen2ForSequenceClassification"]},
        'architectures: cos ["Qwen2ForCausalLM"], fmt ["Qwen2ForSequenceClassification"]',
    ),
    "a field of tomorrow": ({"mixing": {"kind": "b"}}, 'mixing: cos null, fmt {"kind": "b"}'),
    "a nested RoPE": (
        {"text_config": {"rope_theta": 1e6, "hidden_size": 16}},
        "text_config.hidden_size: cos null, fmt 16",
    ),
}


@pytest.mark.parametrize("field", DISAGREEMENTS)
def test_parents_whose_configs_disagree_are_refused_side_by_side(field: str, plan: Planning, parents: Path):
    config, values = DISAGREEMENTS[field]
    write_model(parents / "fmt", weights("fmt"), config=config)
    line = refusal(plan)
    assert line == f"job.yaml:5: the parents disagree on {values}; say whose holds with `config_from: PARENT`"


@pytest.mark.parametrize("field", DISAGREEMENTS)
def test_the_config_that_was_chosen_holds(field: str, plan: Planning, parents: Path):
    config, _ = DISAGREEMENTS[field]
    write_model(parents / "fmt", weights("fmt"), config=config)
    expected = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    assert plan(config_from="cos").points[0].layout.config == CONFIG
    assert plan(config_from="fmt").points[0].layout.config == expected


def test_old_and_new_spellings_of_rope_agree(plan: Planning, parents: Path):
    new = {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    write_model(parents / "fmt", weights("fmt"), config=new)
    plan()


HARMLESS_CHANGES: dict[str, dict[str, Any]] = {
    "where and by whom": {"_name_or_path": "someone/model", "transformers_version": "4.40.0"},
    "dtype": {"torch_dtype": "float32", "dtype": "float32"},
    "training": {"attention_dropout": 0.5, "initializer_range": 0.1},
    "ends": {"eos_token_id": [1, 2], "bos_token_id": 7, "pad_token_id": 2},
    "speed": {"use_cache": False, "use_flash_attention_2": True, "low_cpu_mem_usage": True},
    "programs of training": {"trl_version": "0.19", "tokenizer_padding_side": "right", "loss_type": "ForCausalLM"},
    "a default, as null": {"head_dim": None},
    "generation, as older versions of transformers state it": {"num_beams": 1, "top_k": 50, "max_length": 20},
    "a default, stated": {
        "head_dim": 8,
        "pad_token_id": None,
        "rope_scaling": None,
        "layer_types": ["full_attention"] * 2,
    },
    "off, in other words": {"final_logit_softcapping": None, "mlp_bias": False, "quantization_config": None},
    "no architectures": {"architectures": None},
}


@pytest.mark.parametrize("kind", HARMLESS_CHANGES)
def test_fields_that_change_no_value_may_differ(kind: str, plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt"), config=HARMLESS_CHANGES[kind])
    plan()


@pytest.mark.parametrize(("model_type", "agree"), [("gpt_neox", False), ("qwen2", True)])
def test_a_field_that_is_off_agrees_with_none_only_if_off_is_its_default(
    model_type: str, agree: bool, plan: Planning, parents: Path
):
    """`use_parallel_residual` is on in a GPTNeoXConfig that does not state it, and unknown to a Qwen2Config."""
    for who, config in (("cos", {}), ("fmt", {"use_parallel_residual": False})):
        write_model(parents / who, weights(who), config={"model_type": model_type, "architectures": None, **config})
    if agree:
        plan()
    else:
        assert "the parents disagree on use_parallel_residual: cos true, fmt false; say whose" in refusal(plan)


SIBLINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "Gemma 3 of transformers 4.50": (
        {"model_type": "gemma3_text", "num_hidden_layers": 6},
        {},
        {"sliding_window_pattern": 6},
    ),
    "Gemma 2 with one activation": (
        {"model_type": "gemma2", "hidden_activation": "gelu_pytorch_tanh"},
        {"hidden_act": None},
        {"hidden_act": "gelu_pytorch_tanh"},
    ),
    "Phi-3 of transformers 4.49": ({"model_type": "phi3", "pad_token_id": 0}, {}, {"partial_rotary_factor": 1.0}),
    "the first name of longrope": (
        {"model_type": "phi3", "pad_token_id": 0},
        {"rope_scaling": {"type": "su", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
        {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}},
    ),
    "GPT-NeoX of transformers 4.45": (
        {"model_type": "gpt_neox"},
        {"rotary_pct": 0.25, "rotary_emb_base": 10000},
        {"partial_rotary_factor": 0.25, "rope_theta": 10000.0},
    ),
    "GPT-2 of old": ({"model_type": "gpt2", "n_positions": 512}, {"n_ctx": 512}, {}),
    "Llama of old": ({"model_type": "llama"}, {"max_sequence_length": 512}, {}),
}


@pytest.mark.parametrize("kind", SIBLINGS)
def test_siblings_of_several_transformers_versions_agree(kind: str, plan: Planning, parents: Path):
    common, cos, fmt = SIBLINGS[kind]
    for who, own in (("cos", cos), ("fmt", fmt)):
        write_model(parents / who, weights(who), config={"architectures": None, "rope_theta": None, **common, **own})
    plan()


def test_a_part_of_rope_that_only_one_class_has_by_default_is_compared(plan: Planning, parents: Path):
    for who, part in (("cos", {}), ("fmt", {"partial_rotary_factor": 1.0})):  # the default of Phi is 0.5
        write_model(parents / who, weights(who), config={"model_type": "phi", "architectures": None, **part})
    assert "the parents disagree on partial_rotary_factor: cos 0.5, fmt 1.0;" in refusal(plan)


def test_every_harmless_field_has_one_reason():
    fields = [field for of_one in HARMLESS.values() for field in of_one]
    assert len(fields) == len(set(fields))


def test_a_long_list_that_differs_is_cut(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt"), config={"long_factor": [1.5] * 500})
    line = refusal(plan)
    assert "the parents disagree on long_factor: cos null, fmt [1.5, 1.5, " in line
    assert " …; say whose holds" in line and len(line) < 400


def vision_language(**text: Any) -> dict[str, Any]:
    """The config of a small Gemma 3, with changes of its text_config."""
    own = {"model_type": "gemma3_text", "max_position_embeddings": 512, "rope_theta": 1e6, "dtype": "float32", **text}
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": 48}
    vision = {"model_type": "siglip_vision_model", "num_hidden_layers": 3, "dtype": "float32"}
    plain: dict[str, Any] = dict.fromkeys(CONFIG, None)
    return plain | {"model_type": "gemma3", "dtype": "float32", "text_config": own | sizes, "vision_config": vision}


@pytest.mark.parametrize(
    ("change", "values"),
    [
        ({"rope_theta": 1e4}, "text_config.rope_theta: cos 1000000.0, fmt 10000.0"),
        ({"max_position_embeddings": 1024}, "text_config.max_position_embeddings: cos 512, fmt 1024"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings: cos true, fmt false"),
        ({"final_logit_softcapping": 30.0}, "text_config.final_logit_softcapping: cos null, fmt 30.0"),
    ],
)
def test_configs_inside_a_config_are_compared(change: dict[str, Any], values: str, plan: Planning, parents: Path):
    write_model(parents / "cos", weights("cos"), config=vision_language())
    write_model(parents / "fmt", weights("fmt"), config=vision_language(**change))
    assert f"the parents disagree on {values}; say whose holds with `config_from: PARENT`" in refusal(plan)
    config = plan(config_from="fmt").points[0].layout.config
    assert config["text_config"] == {**vision_language(**change)["text_config"], "dtype": "bfloat16"}
    assert (config["dtype"], config["vision_config"]["dtype"]) == ("bfloat16", "bfloat16")


def test_each_stack_of_a_model_has_gradients_of_its_own(plan: Planning, parents: Path):
    names = [f"language_model.model.layers.{number}.w" for number in range(5)]
    names += [f"vision_tower.encoder.layers.{number}.w" for number in range(3)]
    names += ["projector.mlp.0.w", "projector.mlp.2.w", "lm_head.w"]
    for who in ("cos", "fmt"):
        write_model(parents / who, {name: torch.ones(2).bfloat16() for name in names}, config=vision_language())
    recipe = EVEN.replace("weight: 1}", "weight: [0, 1]}", 1)
    layout = plan(recipe=recipe + "  dtype: bfloat16\n", grid="").points[0].layout
    (shard,) = layout.shards
    assert {tensor.name: layout.positions[tensor.setting] for tensor in shard.tensors} == dict(
        zip(names, [0, 0.25, 0.5, 0.75, 1, 0, 0.5, 1, 1, 1, 0], strict=True)
    )


def test_the_config_states_the_dtype_of_most_numbers(plan: Planning, parents: Path):
    for who in ("cos", "fmt"):
        write_model(parents / who, {**weights(who), "model.norm.weight": torch.ones(16)})
    layout = plan(recipe=EVEN, grid="").points[0].layout
    (shard,) = layout.shards
    assert layout.config["torch_dtype"] == "bfloat16"
    assert {tensor.name for tensor in shard.tensors if tensor.dtype == "F32"} == {"model.norm.weight"}


def test_a_window_that_is_not_used_does_not_matter(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt"), config={"sliding_window": 4096, "use_sliding_window": False})
    plan()


def test_tokenizers_that_differ_are_refused_with_the_token(plan: Planning, parents: Path):
    vocabulary = {"model": {"type": "WordLevel", "vocab": {"a": 0, "c": 1}}, "added_tokens": TOKENIZER["added_tokens"]}
    write_model(parents / "fmt", weights("fmt"), tokenizer=vocabulary)
    assert refusal(plan) == (
        "job.yaml:5: the tokenizers of cos and fmt differ (token 'b' is 1 and missing); choose one with"
        " `tokenizer_source: PARENT`, or take the tokens of all with `union`"
    )
    recipe = EVEN + "  tokenizer_source: fmt\n"
    assert plan(recipe=recipe, grid="").points[0].layout.tokenizer_from == "fmt"


PIECES = ("<unk>", "▁the", "▁a")


def sentencepiece(*pieces: str, scores: bool = False) -> bytes:
    """A ModelProto: field 1, each a message whose field 1 is the piece, and field 2 its score: 0, -1, …"""
    messages = [bytes([0x0A, len(piece.encode())]) + piece.encode() for piece in pieces]
    if scores:
        messages = [message + b"\x15" + struct.pack("<f", -at) for at, message in enumerate(messages)]
    return b"".join(bytes([0x0A, len(message)]) + message for message in messages)


def tekken(*tokens: bytes) -> bytes:
    vocabulary = [{"rank": at, "token_bytes": base64.b64encode(token).decode()} for at, token in enumerate(tokens)]
    sizes = {"default_num_special_tokens": 3, "default_vocab_size": 5}
    return json.dumps({"config": sizes, "vocab": vocabulary}).encode()


def tiktoken(*tokens: bytes) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % at for at, token in enumerate(tokens))


OTHER_TOKENIZERS: dict[str, tuple[dict[str, bytes], dict[str, bytes], str]] = {
    "sentencepiece": (
        {"tokenizer.model": sentencepiece(*PIECES)},
        {"tokenizer.model": sentencepiece(*PIECES[::-1])},
        "token '<unk>' is 0 and 2",
    ),
    "sentencepiece, not readable": (
        {"spiece.model": b"\x0a\x05one"},
        {"spiece.model": b"\x0a\x05two"},
        "the bytes of spiece.model, which cannot be read as a vocabulary",
    ),
    "ids of vocab.json": ({"vocab.json": b'{"a":0,"b":1}'}, {"vocab.json": b'{"a":1,"b":0}'}, "token 'a' is 0 and 1"),
    "merges.txt": (
        {"vocab.json": b'{"a":0,"b":1}', "merges.txt": b"#version: 0.2\na b\nb a\n"},
        {"vocab.json": b'{"a":0,"b":1}', "merges.txt": b"b a\na b\n"},
        "merge 0 is 'a b' and 'b a'",
    ),
    "added tokens": (
        {"vocab.json": b'{"a":0}', "added_tokens.json": b'{"<x>": 1}'},
        {"vocab.json": b'{"a":0}', "tokenizer_config.json": b'{"added_tokens_decoder": {"2": {"content": "<x>"}}}'},
        "token '<x>' is 1 and 2",
    ),
    "vocab.txt": ({"vocab.txt": b"a\nb\n"}, {"vocab.txt": b"a\nc\n"}, "token 'b' is 1 and missing"),
    "tiktoken": (
        {"qwen.tiktoken": tiktoken(b"a", b"b")},
        {"qwen.tiktoken": tiktoken(b"b", b"a")},
        "token 'a' is 0 and 1",
    ),
    "tiktoken of Llama 3": (
        {"tokenizer.model": tiktoken(b"a", b" b")},
        {"tokenizer.model": tiktoken(b"a", b" c")},
        "'Ġb' is 1 and missing",
    ),
    "tekken": ({"tekken.json": tekken(b"a", b"b")}, {"tekken.json": tekken(b"b", b"a")}, "token 'a' is 3 and 4"),
    "two kinds": (
        {"tokenizer.json": b'{"model": {"vocab": {"<unk>": 0, "\\u2581a": 1, "\\u2581the": 2, "more": 3}}}'},
        {"tokenizer.model": sentencepiece(*PIECES)},
        "token '▁a' is 1 and 2",
    ),
    "scores of sentencepiece": (
        {"spiece.model": sentencepiece("a", "b", scores=True)},
        {"spiece.model": sentencepiece("a", "b")},
        "the score of 'b' is -1 and 0",
    ),
    "scores of tokenizer.json": (
        {"tokenizer.json": b'{"model": {"vocab": [["a", -1], ["b", -2]]}}'},
        {"tokenizer.json": b'{"model": {"vocab": [["a", -1], ["b", -3]]}}'},
        "the score of 'b' is -2 and -3",
    ),
    "the type of the model": (
        {"tokenizer.json": b'{"model": {"type": "BPE", "vocab": {"a": 0}}}'},
        {"tokenizer.json": b'{"model": {"type": "WordPiece", "vocab": {"a": 0}}}'},
        "the model is BPE and WordPiece",
    ),
    "the second of two files": (
        {"source.spm": sentencepiece("a", "b"), "target.spm": sentencepiece("c", "d")},
        {"source.spm": sentencepiece("a", "b"), "target.spm": sentencepiece("d", "c")},
        "token 'c' is 0 and 1",
    ),
    "codes beside vocab.txt": (
        {"vocab.txt": b"a\nb\n", "bpe.codes": b"a b 7\n"},
        {"vocab.txt": b"a\nb\n", "bpe.codes": b"b a 7\n"},
        "the bytes of bpe.codes, which cannot be read as a vocabulary",
    ),
    "ids that are no numbers": (
        {"tokenizer.json": b'{"model": {"vocab": {"a": "0"}}}'},
        {"tokenizer.json": b'{"model": {"vocab": {"a": [0]}}}'},
        "the bytes of tokenizer.json, which cannot be read as a vocabulary",
    ),
    "merges of tokenizer.json": (
        {"tokenizer.json": b'{"model": {"vocab": {"a": 0}, "merges": ["a b", "c d"]}}'},
        {"tokenizer.json": b'{"model": {"vocab": {"a": 0}, "merges": [["a", "b"], ["d", "c"]]}}'},
        "merge 1 is 'c d' and 'd c'",
    ),
}


def write_tokenizers(parents: Path, cos: dict[str, bytes], fmt: dict[str, bytes]) -> None:
    for who, files in (("cos", cos), ("fmt", fmt)):
        (parents / who / "tokenizer.json").unlink()
        for name, data in files.items():
            (parents / who / name).write_bytes(data)


@pytest.mark.parametrize("kind", OTHER_TOKENIZERS)
def test_tokenizers_of_every_format_are_compared(kind: str, plan: Planning, parents: Path):
    cos, fmt, difference = OTHER_TOKENIZERS[kind]
    write_tokenizers(parents, cos, fmt)
    line = refusal(plan)
    assert "the tokenizers of cos and fmt differ" in line
    assert f"{difference}); " in line and "with `tokenizer_source: PARENT`" in line
    sources = ["fmt", *(["union"] if "`union`" in line else [])]
    assert len(sources) == 1 + ("cannot be read" not in line)
    for source in sources:
        plan(recipe=EVEN + f"  tokenizer_source: {source}\n", grid="")


@pytest.mark.parametrize(
    ("cos", "fmt"),
    [
        ({"spiece.model": b"\x0a\x05one"}, {"spiece.model": b"\x0a\x05one"}),
        ({"tokenizer.model": sentencepiece(*PIECES)}, {"tokenizer.model": sentencepiece(*PIECES), "merges.txt": b"a"}),
        (
            {"tokenizer.json": b'{"model": {"vocab": {"<unk>": 0, "\\u2581the": 1, "\\u2581a": 2, "more": 3}}}'},
            {"tokenizer.model": sentencepiece(*PIECES)},
        ),
        (
            {"tokenizer.json": b'{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 1, "content": "<x>"}]}'},
            {"vocab.json": b'{"a": 0}', "added_tokens.json": b'{"<x>": 1}'},
        ),
        (
            {"tokenizer.json": b'{"model": {"vocab": {"a": 0}, "merges": ["a b"]}}'},
            {"tokenizer.json": b'{"model": {"vocab": {"a": 0}, "merges": [["a", "b"]]}}'},
        ),
        ({"tekken.json": tekken(b"a", b"b", b"c")}, {"tekken.json": tekken(b"a", b"b", b"not used")}),
        (
            {"vocab.json": b'{"a": 0, "b": 1}', "merges.txt": b"#version: 0.2\r\na b\r\n"},
            {"vocab.json": b'{"a": 0, "b": 1}', "merges.txt": b"#version: 0.2\na b\n"},
        ),
        (
            {"tokenizer.json": b'{"model": {"vocab": {"a": 0, "\\u2028": 1, "\\u0120b": 2}}}'},
            {"vocab.txt": "a\n\u2028\nĠb\n".encode()},
        ),
        (
            {"tokenizer.json": b'{"model": {"vocab": {"a": 0, "\\u0120b": 1}}, "added_tokens": []}'},
            {"tokenizer.model": tiktoken(b"a", b" b")},
        ),
    ],
    ids=[
        "not readable, equal",
        "sentencepiece",
        "two kinds",
        "BPE of two kinds",
        "merges in two spellings",
        "tekken beyond its size",
        "line ends of Windows",
        "lines of vocab.txt",
        "tiktoken and tokenizer.json",
    ],
)
def test_vocabularies_that_agree_pass_in_whatever_format(
    cos: dict[str, bytes], fmt: dict[str, bytes], plan: Planning, parents: Path
):
    write_tokenizers(parents, cos, fmt)
    plan()


def test_a_tokenizer_that_only_one_parent_has_disagrees_with_nobody(plan: Planning, parents: Path):
    (parents / "cos" / "tokenizer.json").unlink()
    plan()


def test_a_missing_tensor_is_named_with_both_parents(plan: Planning, parents: Path):
    tensors = weights("fmt")
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    write_model(parents / "fmt", tensors)
    assert refusal(plan) == (
        "job.yaml:5: 1 of 26 tensors are not in all parents (model.layers.1.self_attn.q_proj.bias is not in fmt);"
        " take parents with the same layers and parts"
    )


def merged_names(plan: Plan) -> set[str]:
    return {tensor.name for shard in plan.points[0].layout.shards for tensor in shard.tensors}


def test_buffers_that_transformers_computes_are_left_out(plan: Planning, parents: Path):
    buffers = {
        "model.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.layers.0.self_attn.masked_bias": torch.tensor(-1e9),  # of GPT-2 before transformers 4.30
    }
    write_model(parents / "fmt", {**weights("fmt"), **buffers})
    assert merged_names(plan()) == set(shapes())


@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "OfItsOwnCode"])
@pytest.mark.parametrize("who", [["cos"], ["fmt"], ["cos", "fmt"]])
def test_a_head_that_repeats_the_embeddings_is_left_out(
    plan: Planning, parents: Path, who: list[str], architecture: str
):
    for name in ("cos", "fmt"):
        tensors = weights(name)
        extra = {HEAD: tensors[EMBEDDINGS].clone()} if name in who else {}
        config = {"tie_word_embeddings": True, "architectures": [architecture]}
        write_model(parents / name, {**tensors, **extra}, config=config)
    assert merged_names(plan()) == set(shapes())


def test_a_head_of_its_own_beside_tied_embeddings_stays(plan: Planning, parents: Path):
    for name in ("cos", "fmt"):
        write_model(parents / name, weights(name, tied=False), config={"tie_word_embeddings": True})
    assert HEAD in merged_names(plan())


@pytest.mark.parametrize("donor_has_prefix", [True, False])
def test_a_tensor_is_found_with_and_without_the_prefix_of_its_class(
    plan: Planning, parents: Path, donor_has_prefix: bool
):
    bare = {name.removeprefix("model."): tensor for name, tensor in weights("fmt").items()}
    who = "fmt" if donor_has_prefix else "cos"
    write_model(parents / who, bare)
    planned = plan()
    assert merged_names(planned) == (set(shapes()) if donor_has_prefix else set(bare))
    tensor = next(
        t for shard in planned.points[0].layout.shards for t in shard.tensors if t.name.endswith("norm.weight")
    )
    assert set(tensor.sources) == {"cos", "fmt"}


def test_a_class_that_transformers_does_not_have_needs_equal_names(plan: Planning, parents: Path):
    for name in ("cos", "fmt"):
        tensors = weights(name)
        bare = {key.removeprefix("model."): tensor for key, tensor in tensors.items()}
        write_model(parents / name, bare if name == "fmt" else tensors, config={"architectures": ["OfItsOwnCode"]})
    assert "52 of 52 tensors are not in all parents (embed_tokens.weight is not in cos" in refusal(plan)


def test_the_remedy_for_vocabularies_of_other_sizes_helps(plan: Planning, parents: Path):
    from transformers import AutoModelForCausalLM

    tensors = {**weights("fmt"), EMBEDDINGS: torch.ones(64, HIDDEN).bfloat16()}
    write_model(parents / "fmt", tensors, config={"vocab_size": 64})
    for name in ("cos", "fmt"):
        (parents / name / "tokenizer.json").unlink()
    assert "give the smaller 64 rows with `model.resize_token_embeddings(64)`" in refusal(plan)
    model = AutoModelForCausalLM.from_pretrained(parents / "cos", dtype="auto")
    model.resize_token_embeddings(64)
    model.save_pretrained(parents / "cos")
    assert merged_names(plan()) == set(shapes())


def test_shapes_that_differ_are_shown_side_by_side(plan: Planning, parents: Path):
    write_model(parents / "fmt", {**weights("fmt"), "model.norm.weight": torch.ones(17).bfloat16()})
    assert refusal(plan) == (
        "job.yaml:5: tensor model.norm.weight is [16] in cos and [17] in fmt; only equal shapes can be merged"
    )


def test_shapes_are_refused_before_configs_because_no_setting_helps(plan: Planning, parents: Path):
    tensors = {**weights("fmt"), EMBEDDINGS: torch.ones(48, 18).bfloat16()}
    write_model(parents / "fmt", tensors, config={"hidden_size": 18})
    assert f"tensor {EMBEDDINGS} is [48, 16] in cos and [48, 18] in fmt" in refusal(plan)
    assert f"tensor {EMBEDDINGS} is [48, 16] in cos and [48, 18] in fmt" in refusal(plan, config_from="cos")


def test_other_architectures_are_refused(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt"), config={"model_type": "llama"})
    assert refusal(plan) == "job.yaml:5: cos is a qwen2, fmt a llama; parents share one architecture"


def test_integers_of_two_kinds_are_refused(plan: Planning, parents: Path):
    for who, dtype in (("cos", torch.int8), ("fmt", torch.int16)):
        write_model(parents / who, {**weights(who), "table": torch.zeros(2).to(dtype)})
    assert refusal(plan) == (
        "job.yaml:5: tensor table is stored as I16 and I8; integers are copied, not merged: store it in one dtype in"
        " all parents"
    )


def test_parents_without_numbers_are_refused(plan: Planning, parents: Path):
    for who in ("cos", "fmt"):
        write_model(parents / who, {"table": torch.zeros(2, dtype=torch.int32)})
    assert refusal(plan) == "job.yaml:5: the parents hold no floating-point tensors; there is nothing to merge"


# ---- tied and untied heads


@pytest.mark.parametrize("stated", [False, None])
def test_a_merge_of_a_tied_and_an_untied_parent_has_a_head(stated: bool | None, plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt", tied=False), config={"tie_word_embeddings": stated})
    planned = plan()
    layout = planned.points[0].layout
    (head,) = [tensor for shard in layout.shards for tensor in shard.tensors if tensor.name == HEAD]
    cos, fmt = planned.parents["cos"], planned.parents["fmt"]
    assert head.sources == {"cos": cos.tensors[EMBEDDINGS], "fmt": fmt.tensors[HEAD]}
    assert layout.config["tie_word_embeddings"] is False
    assert any("the merge has a head of its own" in remark for remark in planned.remarks)


def test_an_untied_parent_without_a_head_is_refused(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt"), config={"tie_word_embeddings": False})
    assert "the parents disagree on tie_word_embeddings: cos true, fmt false" in refusal(plan)


def test_a_config_that_is_silent_is_judged_by_its_head(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt"), config={"tie_word_embeddings": None})
    assert HEAD not in {tensor.name for shard in plan().points[0].layout.shards for tensor in shard.tensors}


def test_the_tied_config_drops_the_head_and_the_untied_one_keeps_it(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt", tied=False))
    (tied,) = plan(config_from="cos").points[0].layout.shards
    assert {tensor.name for tensor in tied.tensors} == set(shapes())
    layout = plan(config_from="fmt").points[0].layout
    (head,) = [tensor for tensor in layout.shards[0].tensors if tensor.name == HEAD]
    opened = plan(config_from="fmt").parents
    assert head.sources == {"cos": opened["cos"].tensors[EMBEDDINGS], "fmt": opened["fmt"].tensors[HEAD]}
    assert layout.config["tie_word_embeddings"] is False


def test_the_head_of_a_multimodal_model_is_untied_as_the_config_says(plan: Planning, parents: Path):
    named = {f"language_model.{name}": tensor for name, tensor in weights("cos", tied=False).items()}
    head, embeddings = f"language_model.{HEAD}", f"language_model.{EMBEDDINGS}"
    write_model(parents / "fmt", named, config=vision_language(tie_word_embeddings=False))
    del named[head]
    write_model(parents / "cos", named, config=vision_language(tie_word_embeddings=True))
    (tied,) = plan(config_from="cos").points[0].layout.shards
    assert {tensor.name for tensor in tied.tensors} == named.keys()
    for untied in (plan(), plan(config_from="fmt")):
        (kept,) = [tensor for tensor in untied.points[0].layout.shards[0].tensors if tensor.name == head]
        assert kept.sources["cos"] == untied.parents["cos"].tensors[embeddings]
        assert untied.points[0].layout.config["text_config"]["tie_word_embeddings"] is False


# ---- parents that cannot be read


def test_a_parent_that_is_not_there_is_refused_on_its_line(plan: Planning, parents: Path):
    (parents / "cos").rename(parents / "gone")
    assert refusal(plan) == (f"job.yaml:3: no folder {parents}/cos; give a path, or hf://, s3://, gs:// or az://")


def test_an_empty_parent_is_refused(plan: Planning, parents: Path):
    for path in (parents / "cos").iterdir():
        path.unlink()
    with pytest.raises(ObjectMissing, match=r"parent cos \(.*/parents/cos\): nothing there; check the path"):
        plan()


def test_a_damaged_parent_is_bad_input(plan: Planning, parents: Path):
    path = parents / "cos" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    line = refusal(plan)
    assert line.startswith(f"parent cos: {path}: the tensors end at byte ")
    assert line.endswith("it is truncated or has a tail")


def test_relative_parents_count_from_the_given_folder(job_text: Callable[..., str], parents: Path):
    text = job_text().replace(f"{parents}/", "../parents/")
    (parents.parent / "jobs").mkdir()
    planned = make_plan(load_job(text, "job.yaml"), relative_to=parents.parent / "jobs")
    assert planned.parents["cos"].url == str(parents / "cos")


def test_plan_json_pins_what_was_seen(plan: Planning, parents: Path):
    document = json.loads(json.dumps(plan().document()))
    for who in ("cos", "fmt"):
        assert document["parents"][who]["url"] == str(parents / who)
        (file,) = document["parents"][who]["files"].values()
        assert file["size"] == (parents / who / "model.safetensors").stat().st_size
        assert file["etag"]


# ---- chat templates

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
OTHER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
THREE = """
  merge_method: linear
  base_model: base
  models:
  - {model: base, parameters: {weight: 1}}
  - {model: cos, parameters: {weight: 1}}
  - {model: fmt, parameters: {weight: 1}}
  chat_template: auto
"""


def with_templates(parents: Path, **templates: str) -> None:
    for who, template in templates.items():
        (parents / who / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(
    ("templates", "chosen"),
    [
        ({"base": OTHER, "cos": PLAIN, "fmt": f"\n{PLAIN}\n"}, PLAIN),
        ({"base": OTHER, "cos": PLAIN}, OTHER),
        ({"cos": PLAIN, "fmt": OTHER}, PLAIN),
        ({"fmt": OTHER}, OTHER),
        ({}, None),
    ],
    ids=["the commonest", "a tie: the tokenizer's", "a tie: the first", "the only one", "none"],
)
def test_chat_template_auto_is_the_commonest_of_the_parents(
    plan: Planning, parents: Path, templates: dict[str, str], chosen: str | None
):
    with_templates(parents, **templates)
    assert plan(recipe=THREE, grid="").points[0].layout.chat_template == chosen


def test_a_damaged_config_of_a_tokenizer_is_bad_input(plan: Planning, parents: Path):
    (parents / "cos" / "tokenizer_config.json").write_text("[]")
    line = refusal(plan, recipe=THREE, grid="")
    assert line == f"{parents}/cos/tokenizer_config.json: a JSON object was expected"


def test_a_broken_template_of_a_parent_is_refused_by_the_parents_name(plan: Planning, parents: Path):
    with_templates(parents, fmt="{% for m in messages %}{{ m.content }}")
    said = refusal(plan, recipe=THREE, grid="")
    assert said.startswith("job.yaml:13: parent fmt: the chat template is not Jinja (")
    assert said.endswith("; name a template in place of `auto`")
    plan(recipe=THREE.replace("auto", "chatml"), grid="")


def test_a_chat_template_that_does_not_compile_is_refused_at_its_line(plan: Planning):
    said = refusal(plan, recipe=EVEN + "  chat_template: '{% for m in messages %}'\n", grid="")
    assert said.startswith("job.yaml:10: the chat template is not Jinja (")
    plan(recipe=EVEN + "  chat_template: '{% for m in messages %}{{ m.content }}{% endfor %}'\n", grid="")


def test_a_run_is_another_when_the_commonest_template_is(plan: Planning, parents: Path):
    with_templates(parents, fmt=OTHER)
    first = plan(recipe=THREE, grid="").digest
    with_templates(parents, fmt=PLAIN)
    assert plan(recipe=THREE, grid="").digest != first


# ---- the files beside the weights

BASED = """
  merge_method: linear
  base_model: base
  models:
  - {model: base, parameters: {weight: 1}}
  - {model: cos, parameters: {weight: 1}}
  - {model: fmt, parameters: {weight: 1}}
"""


def test_the_tokenizer_of_the_others_stands_in_for_a_first_parent_without_one(plan: Planning, parents: Path):
    (parents / "base" / "tokenizer.json").unlink()
    (parents / "base" / "chat_template.jinja").write_text(PLAIN)
    (parents / "cos" / "chat_template.jinja").write_text(OTHER)
    planned = plan(recipe=BASED, grid="")
    layout = planned.points[0].layout
    assert layout.copied == {"generation_config.json": "base", "tokenizer.json": "cos", "chat_template.jinja": "cos"}
    assert planned.remarks == ("base has no tokenizer; the points get that of cos",)


def test_others_that_do_not_agree_on_a_tokenizer_are_refused(plan: Planning, parents: Path):
    (parents / "base" / "tokenizer.json").unlink()
    (parents / "fmt" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"z": 0}}}))
    assert "the tokenizers of cos and fmt differ" in refusal(plan, recipe=BASED, grid="")
    assert plan(recipe=BASED + "  tokenizer_source: fmt\n", grid="").points[0].layout.tokenizer_from == "fmt"


def test_a_merge_without_any_tokenizer_is_said(plan: Planning, parents: Path):
    for who in ("base", "cos", "fmt"):
        (parents / who / "tokenizer.json").unlink()
    planned = plan(recipe=BASED, grid="")
    assert planned.remarks == ("no parent has a tokenizer, so the points have none",)
    said = refusal(plan, recipe=BASED + "  tokenizer_source: base\n", grid="")
    assert said == "job.yaml:13: base has no tokenizer; no parent has one, take tokenizer_source out"


def test_a_named_tokenizer_that_is_not_there_is_refused(plan: Planning, parents: Path):
    (parents / "fmt" / "tokenizer.json").unlink()
    said = refusal(plan, recipe=BASED + "  tokenizer_source: fmt\n", grid="")
    assert said == "job.yaml:13: fmt has no tokenizer; name one that has: base, cos"
    plan(recipe=BASED + "  tokenizer_source: cos\n", grid="")


CODE = {"AutoConfig": "configuration_x.X", "AutoModel": "x/modeling_x.X", "AutoModelForCausalLM": "org/x--modeling_x.X"}


def test_auto_map_names_only_code_that_is_there(plan: Planning, parents: Path):
    (parents / "cos" / "configuration_x.py").write_text("X = 1")
    write_model(parents / "cos", weights("cos"), config={"auto_map": CODE})
    plain, asked = plan(recipe=EVEN, grid=""), plan(recipe=EVEN, grid="", copy_code="true")
    assert plain.points[0].layout.config["auto_map"] == {"AutoModelForCausalLM": CODE["AutoModelForCausalLM"]}
    assert asked.points[0].layout.config["auto_map"] == {name: CODE[name] for name in CODE if name != "AutoModel"}
    assert plain.remarks == (
        "not copied from cos, because it is code: configuration_x.py; `copy_code: true` copies it",
    )
    assert asked.remarks == ()
    assert plain.digest != asked.digest


def test_a_key_for_code_leaves_other_runs_as_they_are(plan: Planning):
    assert plan(copy_code="no").digest == plan().digest
    assert plan(copy_code="no").job.digest() == plan().job.digest()
    assert plan(copy_code="yes").job.digest() != plan().job.digest()


def test_a_side_file_too_large_for_a_drivers_memory_is_left_out_and_said(plan: Planning, parents: Path):
    with (parents / "cos" / "more.json").open("wb") as file:
        file.truncate(100_000_001)
    planned = plan(recipe=EVEN, grid="")
    assert "more.json" not in planned.points[0].layout.copied
    assert planned.remarks == ("not copied from cos, because of its size: more.json; copy it by hand",)
