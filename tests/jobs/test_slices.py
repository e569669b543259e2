"""Slices and modules of a document, as mergekit reads them: strict, with placeholders, written back as they were."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError

from jobs.errors import BadInput
from jobs.job import load_merge_document
from jobs.recipe import Recipe, recipe_schema, recipe_template
from jobs.yaml_nodes import load_document


def bound(text: str, **bindings: Any) -> Recipe:
    return recipe_template(load_document(text, "m.yml")).bind(bindings)


SLICED = """
merge_method: slerp
slices:
- sources:
  - model: a
    layer_range: [0, 4]
    parameters: {weight: 0.5}
  - model: b
    layer_range: [2, 6]
  base_model: a
  parameters:
    t: [0, 0.5, 1]
- sources:
  - model: b
    layer_range: [6, 8]
dtype: bfloat16
"""
MODULES = """
merge_method: linear
modules:
  text_decoder:
    slices:
    - sources:
      - {model: a, layer_range: [0, 4]}
    parameters: {weight: 1}
  vision_tower:
    models:
    - model: b
parameters: {weight: 2}
"""


@pytest.mark.parametrize("text", [SLICED, MODULES])
def test_a_document_is_written_back_as_it_was(text: str):
    assert bound(text).document() == yaml.safe_load(text)
    assert bound(yaml.safe_dump(bound(text).document())) == bound(text)


@pytest.mark.parametrize("text", [SLICED, MODULES, SLICED.replace("[0, 4]", '["${k - 4}", "${k}"]')])
def test_the_schema_takes_slices_and_modules(text: str):
    Draft202012Validator(recipe_schema()).validate(yaml.safe_load(text))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("[0, 4]", "[0]"),
        ("[0, 4]", "[-1, 4]"),
        ("    layer_range: [0, 4]\n", ""),
        ("slices:", "models: [{model: a}]\nslices:"),
    ],
)
def test_the_schema_refuses_what_is_no_slice(old: str, new: str):
    with pytest.raises(ValidationError):
        Draft202012Validator(recipe_schema()).validate(yaml.safe_load(SLICED.replace(old, new, 1)))


def test_placeholders_stand_in_ranges_models_and_parameters():
    text = SLICED.replace("[0, 4]", '["${k - 4}", "${k}"]').replace("model: b", 'model: "${other}"')
    recipe = bound(text.replace("weight: 0.5", 'weight: "${w}"'), k=Fraction(4), w=Fraction(1, 2), other="b")
    assert recipe == bound(SLICED)


def test_numbers_in_quotes_are_numbers():
    assert bound(SLICED.replace("[0, 4]", '["0", "4"]')) == bound(SLICED)


def test_every_model_of_a_document_is_a_parent_once():
    assert load_merge_document(SLICED, "m.yml", "out").parents == {"a": "a", "b": "b"}
    assert bound(SLICED.replace("base_model: a", "base_model: c")).references() == ("a", "b", "c")
    assert bound(MODULES).references() == ("a", "b")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[2, 6]", "[2, 5]", "m.yml:8: layer_range [2, 5] holds 3 layers, that of a 4; the sources of a slice have"),
        (
            "model: b\n    layer_range: [2, 6]",
            "model: a\n    layer_range: [2, 6]",
            'm.yml:8: the model "a" is a source',
        ),
        ("[2, 6]", "[6, 2]", "m.yml:9: layer_range [6, 2] holds no layer"),
        ("[2, 6]", "[-1, 3]", "m.yml:9: layer_range [-1, 3] holds no layer; layers count from 0"),
        ("[2, 6]", "[0.5, 4.5]", "m.yml:9: layer_range holds whole numbers, not [0.5, 4.5]"),
        ("[2, 6]", "[2]", "m.yml:9: layer_range takes two numbers, as in [0, 16], not 1"),
        ("[2, 6]", "8", 'm.yml:9: "slices[0].sources[1].layer_range" must be a list'),
        ("    layer_range: [2, 6]\n", "", '"slices[0].sources[1]" needs the key "layer_range"'),
        ("  base_model: a", "  base_mdel: a", 'unknown key "base_mdel"; did you mean "base_model"?'),
        ("slices:", "models: [{model: a}]\nslices:", "`models` and `slices` exclude each other"),
    ],
)
def test_what_cannot_be_a_slice_is_refused_in_one_line(old: str, new: str, message: str):
    with pytest.raises(BadInput) as refused:
        bound(SLICED.replace(old, new, 1))
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("keys", ["parameters: {weight: 1}", "{models: [{model: a}], slices: [{sources: []}]}"])
def test_a_module_has_models_or_slices(keys: str):
    with pytest.raises(BadInput, match=r'm.yml:4: the module "x" needs `models` or `slices`, one of the two'):
        bound(f"merge_method: linear\nmodules:\n  # here\n  x:\n    {keys}\n")
