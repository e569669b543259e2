"""The `tokenizer:` block reads mergekit's grammar, refuses what cannot be done, and is written back as it was."""

from __future__ import annotations

from fractions import Fraction

import jsonschema
import pytest
import yaml

from jobs.errors import BadInput
from jobs.job import load_job, load_merge_document
from jobs.recipe import Recipe, recipe_schema, recipe_template
from jobs.yaml_nodes import load_document

TWO = "merge_method: linear\nmodels:\n  - model: a\n  - model: b\n"
BLOCK = """\
tokenizer:
  source: union
  tokens:
    <x>: {source: b}
    <y>: {source: {model: {path: b}}, force: true}
    <z>: {source: {kind: zero}}
    <k>: {source: {kind: model_token, model: a, token: <x>}}
    <n>: {source: {kind: model_token, model: a, token_id: 7}, force: true}
    <w>: {}
  pad_to_multiple_of: 64
"""


def read(text: str, **bindings: Fraction | str) -> Recipe:
    return recipe_template(load_document(TWO + text, "recipe.yml")).bind(bindings)


def test_a_block_is_read_and_written_back() -> None:
    recipe = read(BLOCK)
    assert recipe.tokenizer_source == "union"
    written = recipe.document()
    expected = yaml.safe_load(BLOCK)["tokenizer"]
    expected["tokens"]["<y>"]["source"] = "b"
    assert written["tokenizer"] == expected and "tokenizer_source" not in written
    again = recipe_template(load_document(yaml.safe_dump(written, sort_keys=False), "again.yml")).bind({})
    assert again == recipe
    jsonschema.Draft202012Validator(recipe_schema()).validate(yaml.safe_load(TWO + BLOCK))


@pytest.mark.parametrize(
    ("block", "source"),
    [
        ("tokenizer: {source: union}", "union"),
        ("tokenizer: {source: base}", "base"),
        ("tokenizer: {source: b}", "b"),
        ("tokenizer: {source: 'model:b'}", "b"),
        ("tokenizer_source: model:b", "b"),
        ("tokenizer: {source: {model: {path: b, revision: v1}}}", "b@v1"),
        ("tokenizer: {}", "union"),
        ("tokenizer: {tokens: {}}", "union"),
        ("tokenizer:", None),
    ],
)
def test_a_block_without_tokens_is_its_source(block: str, source: str | None) -> None:
    alone = f"tokenizer_source: {source}\n" if source else ""
    assert read(block + "\n") == read(alone)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tokenizer_source: base\ntokenizer: {source: base}",
            "recipe.yml:6: `tokenizer:` and `tokenizer_source:` exclude",
        ),
        ("tokenizer: {sauce: base}", 'unknown key "sauce"'),
        ("tokenizer: {pad_to_multiple_of: 0}", "pad_to_multiple_of must be at least 1, not 0"),
        ("tokenizer: {pad_to_multiple_of: 1.5}", "must be a whole number"),
        ("tokenizer: {tokens: {<x>: {force: true}}}", "`force: true` needs a `source:`"),
        ("tokenizer: {tokens: {<x>: {source: c}}}", '"<x>" comes from "c", which is not a model of the recipe'),
        ("tokenizer: {tokens: {<x>: {source: {kind: mean}}}}", 'cannot be "mean"; choose from model_token, zero'),
        ("tokenizer: {tokens: {<x>: {source: {kind: zero, model: a}}}}", 'unknown key "model"'),
        ("tokenizer: {tokens: {<x>: {source: {kind: model_token, model: a}}}}", "either a `token:` or a `token_id:`"),
        (
            "tokenizer: {tokens: {<x>: {source: {kind: model_token, model: a, token: b, token_id: 1}}}}",
            "either a `token:` or a `token_id:`",
        ),
    ],
)
def test_a_wrong_block_is_refused(text: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        read(text + "\n")
    assert message in str(caught.value) and len(str(caught.value).splitlines()) == 1


def test_axes_choose_sources_and_sizes() -> None:
    text = """\
tokenizer:
  source: "${from}"
  tokens: {<x>: {source: {kind: model_token, model: "${from}", token_id: "${n}"}}}
  pad_to_multiple_of: "${2 * n}"
chat_template: "${template}"
"""
    recipe = read(text, **{"from": "b", "n": Fraction(8), "template": "chatml"})
    assert recipe.document()["tokenizer"] == {
        "source": "b",
        "tokens": {"<x>": {"source": {"kind": "model_token", "model": "b", "token_id": 8}}},
        "pad_to_multiple_of": 16,
    }
    assert recipe.chat_template == "chatml"
    with pytest.raises(BadInput, match=r"recipe.yml:8: pad_to_multiple_of must be a whole number"):
        read(text, **{"from": "b", "n": Fraction(1, 3), "template": "chatml"})


def test_a_model_may_give_its_tokenizer_alone() -> None:
    job = load_merge_document(TWO + "tokenizer_source: c\n", "m.yml", "out")
    assert [*job.parents] == ["a", "b", "c"]
    assert job.points[0].recipe.references() == ("a", "b")
    with pytest.raises(BadInput, match=r'job.yml:7: "c" is not in `parents:`'):
        load_job(
            "name: n\nparents: {a: a, b: b}\noutput: o\nrecipe:\n  merge_method: linear\n"
            "  models: [{model: a}, {model: b}]\n  tokenizer_source: c\n",
            "job.yml",
        )


def test_jobs_without_a_block_keep_their_digest() -> None:
    job = load_merge_document(TWO, "m.yml", "out")
    assert job.digest() == load_merge_document(TWO + "tokenizer:\n", "m.yml", "out").digest()
    assert job.digest() != load_merge_document(TWO + "tokenizer: {pad_to_multiple_of: 8}\n", "m.yml", "out").digest()
