"""A job's sections are read from their fields, written back as the same job, and described by a JSON Schema."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from jobs.errors import BadInput
from jobs.job import job_schema, load_job, read_job
from jobs.yaml_nodes import load_document, node_of, yaml_text

EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"
JOBS = sorted(path for path in EXAMPLES.glob("*.yaml"))
HEAD = """
name: soup
parents: {a: s3://models/a, b: s3://models/b}
recipe:
  merge_method: linear
  dtype: bfloat16
  models:
    - {model: a, parameters: {weight: "${w}"}}
    - {model: b, parameters: {weight: [0.1, 1e-30, "${1 - w}"]}}
grid: {w: {from: 0, to: 1, num: 4}}
output: s3://bucket/runs
"""
EVERYTHING = """
point: soup{w}
evaluate:
  ruler: {lengths: [4096], tasks: [qa_1, vt], documents: {qa_1: squad.json}, questions: 8, chat: true}
  needle: {lengths: [512], depths: 3, answer: '{"value": {value}}', haystack: noise}
  perplexity: {lengths: [64], text: "1e3"}
  lm_eval: {tasks: [longbench2], limit: 3, num_fewshot: 0, metadata: {max_seq_lengths: [4096, 0.5, yes, "no"]}}
  race: {keep: 3, alpha: 0.01}
gate: {baseline: a, margin: 2.5, length_margin: 3, alpha: 0.1, budget: 100}
keep: {best: 3}
engine: {name: vllm, options: {max_num_seqs: 4, dtype: bfloat16}}
workers: {gpus: 0.5, cpus: 2, memory: 8GiB, count: 3}
shard_size: 500MB
seed: 18446744073709551615
numerics: mergekit
config_from: a
"""


@pytest.mark.parametrize(
    "text", [*(path.read_text() for path in JOBS), HEAD, HEAD + EVERYTHING], ids=lambda text: str(len(text))
)
def test_the_document_of_a_job_reads_back_as_the_same_job(text: str) -> None:
    job = load_job(text, "job.yaml")
    again = load_job(yaml_text(job.document()), "job.yaml")
    assert again == job
    assert again.digest() == job.digest()
    assert read_job(node_of(job.document(), "job.yaml")) == job
    assert again.document() == job.document()


GREEDY = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "samples": 1}


def test_a_document_has_every_default() -> None:
    job = load_job(HEAD + "evaluate: {needle: {lengths: [512]}}\n", "job.yaml")
    document = job.document()
    assert document["evaluate"] == {
        "needle": {
            "lengths": [512],
            "depths": 11,
            "items": 5,
            "questions": 1,
            "answer_prefix": True,
            "chat": False,
            **GREEDY,
        }
    }
    assert document["workers"] == {"gpus": 0.0, "cpus": 1.0, "memory": 4 * 10**9}
    assert (document["keep"], document["shard_size"], document["seed"]) == ("all", 10**9, 0)
    assert document["engine"] == {"name": "transformers"} and "gate" not in document


@given(
    st.recursive(
        st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn")), min_size=1, max_size=8)
        | st.sampled_from(["1e3", "yes", "Null", "0x1f", "- a", "${w}", "1_000", "=", "2001-01-01", ".5"])
        | st.booleans()
        | st.integers(-(10**25), 10**25)
        | st.floats(-1e30, 1e30, allow_nan=False)
        | st.decimals(Decimal(-9), Decimal(9), places=25),
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3) | st.dictionaries(st.sampled_from("abcd"), inner, min_size=1)
        ),
        max_leaves=6,
    ).map(lambda value: {"value": value})
)
def test_plain_data_survives_yaml(value: dict[str, Any]) -> None:
    assert _exact(load_document(yaml_text(value), "x").plain()) == _exact(value)


def _exact(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _exact(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_exact(part) for part in value]
    return Decimal(repr(value)) if isinstance(value, float) else value


# ---- the schema

VALIDATOR = Draft202012Validator(job_schema())


def test_the_schema_is_one() -> None:
    Draft202012Validator.check_schema(job_schema())
    assert json.loads(json.dumps(job_schema())) == job_schema()


@pytest.mark.parametrize("text", [*(path.read_text() for path in JOBS), HEAD, HEAD + EVERYTHING])
def test_the_schema_accepts_what_loads(text: str) -> None:
    load_job(text, "job.yaml")
    assert [error.message for error in VALIDATOR.iter_errors(yaml.safe_load(text))] == []


@pytest.mark.parametrize(
    "more",
    [
        "grid: {w: [1, two]}",
        "grid: {simplex: {axes: [w, v], step: 0.25}}",
        "grid: {points: [{w: 0.1, name: light}, {w: 0.9}]}",
        "grid: {w: {from: 1, to: 0, step: -0.5}}",
        'evaluate: {ruler: {lengths: [64], chat: "on"}, race: "on"}',  # YAML 1.2 has no `on`
        "engine: {name: openai, url: http://x/v1, options: {model: m}}",
        "keep: {best: 3}",
    ],
)
def test_the_schema_accepts_every_form_as_an_editor_reads_it(more: str) -> None:
    document = {**load_job(HEAD, "job.yaml").document(), **yaml.safe_load(more)}
    assert [error.message for error in VALIDATOR.iter_errors(document)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"evalute": {}},
        {"name": "a b"},
        {"parents": {}},
        {"parents": {"a": "s3://models/a", "b c": "s3://models/b"}},
        {"recipe": {"merge_method": "linear"}},
        {"recipe": {"merge_method": "linear", "models": [{"modle": "a"}]}},
        {"recipe": {"merge_method": "linear", "models": [{"model": "a"}], "slices": []}},
        {"grid": {}},
        {"grid": {"w": []}},
        {"grid": {"w": 3}},
        {"grid": {"w": [True]}},
        {"grid": {"w": [1, 1]}},
        {"grid": {"1w": [1]}},
        {"grid": {"name": [1]}},
        {"grid": {"w": {"from": 0, "to": 1}}},
        {"grid": {"w": {"from": 0, "to": 1, "num": 3, "step": 0.5}}},
        {"grid": {"w": {"from": 0, "too": 1, "num": 3}}},
        {"grid": {"simplex": {"axes": ["w"], "step": 0.5}}},
        {"grid": {"simplex": {"axes": ["w", "v"], "step": 2}}},
        {"grid": {"points": [{"w": 0.1}], "v": [1]}},
        {"grid": {"points": []}},
        {"evaluate": {}},
        {"evaluate": {"race": True}},
        {"evaluate": {"ruler": {}}},
        {"evaluate": {"ruler": {"lengths": []}}},
        {"evaluate": {"ruler": {"lengths": [32]}}},
        {"evaluate": {"ruler": {"lengths": [4096, 4096]}}},
        {"evaluate": {"ruler": {"lengths": [4096], "items": 0}}},
        {"evaluate": {"ruler": {"lengths": [4096], "itmes": 5}}},
        {"evaluate": {"ruler": {"lengths": [4096], "documents": {"qa_3": "x"}}}},
        {"evaluate": {"needle": {"lengths": [512], "answer": "always this"}}},
        {"evaluate": {"lm_eval": {"tasks": ["a"], "metadata": {"tokenizer": "x"}}}},
        {"evaluate": {"ruler": {"lengths": [4096]}, "race": {"alpha": 0.5}}},
        {"gate": {"margin": 1}},
        {"gate": {"baseline": "a", "margin": 100}},
        {"keep": "some"},
        {"keep": {"best": 0}},
        {"engine": "openai"},
        {"engine": {"name": "openai"}},
        {"engine": {"name": "vllm", "url": "http://x/v1"}},
        {"engine": {"name": "vllm", "options": {"trust_remote_code": True}}},
        {"workers": {"gpu": 1}},
        {"workers": {"cpus": -1}},
        {"workers": {"memory": "lots"}},
        {"shard_size": 0},
        {"seed": -1},
        {"seed": 2**64},
        {"numerics": "float16"},
    ],
    ids=str,
)
def test_the_schema_refuses_what_is_refused(wrong: dict[str, Any]) -> None:
    document = load_job(HEAD, "job.yaml").document() | wrong
    with pytest.raises(BadInput):
        read_job(node_of(document, "job.yaml"))
    assert list(VALIDATOR.iter_errors(document)) != []


def test_every_key_says_what_it_means() -> None:
    silent = [
        f"{where}.{key}"
        for where, section in sections("job", job_schema())
        for key, entry in section["properties"].items()
        if "description" not in entry and "anyOf" not in entry
    ]
    assert silent == []


def sections(where: str, schema: Any) -> list[tuple[str, Any]]:
    """Every mapping of the schema that lists its keys."""
    if not isinstance(schema, dict) or where.endswith((".documents", ".examples", ".keep")):
        return []
    here = [(where, schema)] if "properties" in schema and "description" in schema else []
    return here + [
        found for key, entry in schema.get("properties", {}).items() for found in sections(f"{where}.{key}", entry)
    ]
