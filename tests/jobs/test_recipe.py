"""A recipe reads mergekit's grammar, refuses what mergekit ignores, and resolves settings as mergekit does."""

from __future__ import annotations

import pickle
from fractions import Fraction
from typing import Any

import pytest
import yaml

from jobs.errors import BadInput
from jobs.recipe import Recipe, plain_recipe, recipe_template
from jobs.sources import Filtered, setting_at
from jobs.yaml_nodes import load_document

TIES = """\
merge_method: ties
base_model: base
models:
  - model: math
    parameters:
      weight: 0.5
      density: [0.1, 0.5, 1]
  - model: code
    parameters:
      weight:
        - filter: self_attn
          value: [0, 1]
        - value: 0.25
parameters:
  normalize: true
  lambda: 1.5
dtype: bfloat16
out_dtype: float16
tokenizer_source: math
chat_template: chatml
"""


def test_strange_keys_of_a_document_for_mergekit_are_left_out_and_said():
    text = two_models("int8_mask: true\nrandom_seed: 7\n")
    recipe = recipe_template(load_document(text, "recipe.yml"), foreign=True).bind({})
    assert recipe == read(two_models(""))
    assert recipe.ignored == (
        'recipe.yml:5: "int8_mask" is not a key here and has no effect',
        'recipe.yml:6: "random_seed" is not a key here and has no effect',
    )
    of_a_card = two_models("tokenizer_merge_method: linear\n")  # near to merge_method, which is there
    recipe = recipe_template(load_document(of_a_card, "recipe.yml"), foreign=True).bind({})
    assert recipe.ignored == ('recipe.yml:5: "tokenizer_merge_method" is not a key here and has no effect',)
    with pytest.raises(BadInput, match='unknown key "dtpye"; did you mean "dtype"'):
        recipe_template(load_document(two_models("dtpye: float32\n"), "recipe.yml"), foreign=True)


@pytest.mark.parametrize(
    ("extra", "same", "ignored"),
    [
        ("dtype: torch.bfloat16\n", "dtype: bfloat16\n", ()),
        ("slices: []\nmodules: {}\n", "", ()),
        ("dtype: ''\nout_dtype: ''\nchat_template: ''\n", "", ()),
        (
            "tokenizer: {source: base, embed_slerp: true}\n",
            "tokenizer: {source: base}\n",
            ('recipe.yml:5: "embed_slerp" is not a key here and has no effect',),
        ),
    ],
)
def test_forms_that_mergekit_takes_are_taken(extra: str, same: str, ignored: tuple[str, ...]) -> None:
    recipe = recipe_template(load_document(two_models(extra), "recipe.yml"), foreign=True).bind({})
    assert (recipe, recipe.ignored) == (read(two_models(same)), ignored)
    with pytest.raises(BadInput):
        read(two_models(extra))


def test_a_number_with_a_leading_zero_is_refused() -> None:
    """PyYAML, which mergekit reads with, takes it as octal."""
    assert yaml.safe_load("012") == 10
    assert "012 is 10 in YAML 1.1; write the number without a leading zero" in refusal(
        two_models("parameters: {weight: 012}\n")
    )
    assert read(two_models("parameters: {weight: 0.12}\n")).parameters["weight"] == Fraction(3, 25)


def read(text: str, **bindings: Fraction | str) -> Recipe:
    return recipe_template(load_document(text, "recipe.yml")).bind(bindings)


def refusal(text: str, **bindings: Fraction | str) -> str:
    with pytest.raises(BadInput) as caught:
        read(text, **bindings)
    return str(caught.value)


def two_models(extra: str = "", *, method: str = "linear", second: str = "b") -> str:
    return f"merge_method: {method}\nmodels:\n  - model: a\n  - model: {second}\n{extra}"


def test_a_full_document_is_read_exactly() -> None:
    recipe = read(TIES)
    math, code = recipe.models
    assert (recipe.merge_method, recipe.base_model, recipe.dtype, recipe.out_dtype) == (
        "ties",
        "base",
        "bfloat16",
        "float16",
    )
    assert math.parameters == {"weight": Fraction(1, 2), "density": (Fraction(1, 10), Fraction(1, 2), Fraction(1))}
    assert code.parameters == {
        "weight": (Filtered("self_attn", (Fraction(0), Fraction(1))), Filtered(None, Fraction(1, 4)))
    }
    assert recipe.parameters == {"normalize": True, "lambda": Fraction(3, 2)}
    assert recipe.references() == ("math", "code", "base")


def test_document_gives_back_what_was_read() -> None:
    assert read(TIES).document() == yaml.safe_load(TIES)


def test_document_reads_back_as_the_same_recipe() -> None:
    recipe = read(TIES)
    assert read(yaml.safe_dump(recipe.document(), sort_keys=False)) == recipe


def test_recipes_travel_between_processes() -> None:
    recipe = read(TIES)
    copy = pickle.loads(pickle.dumps(recipe))
    assert copy == recipe
    assert copy.place_of("density") == "recipe.yml:7"


def test_equal_merges_are_equal_wherever_they_stand() -> None:
    assert read(two_models()) == read("# a comment\n\n" + two_models())


def test_every_parameter_and_key_knows_its_line() -> None:
    recipe = read(TIES)
    assert recipe.place_of("merge_method") == "recipe.yml:1"
    assert recipe.place_of("lambda") == "recipe.yml:16"
    assert recipe.place_of("weight") == "recipe.yml:6"
    assert recipe.place_of("absent") == "recipe.yml:1"
    assert recipe.models[1].place == "recipe.yml:8"
    assert recipe.models[1].place_of("weight") == "recipe.yml:10"
    assert recipe.models[1].place_of("absent") == "recipe.yml:8"


def test_placeholders_are_bound_everywhere() -> None:
    text = """\
merge_method: "${method}"
base_model: base
models:
  - model: ${who}-v2
    parameters:
      weight: ${w}
      density: [0, "${w / 2}", 1]
      gamma: [{filter: "${who}", value: "${1 - w}"}, {value: ["${w}", 0]}]
dtype: ${kind}16
"""
    recipe = read(text, method="ties", who="math", w=Fraction(1, 3), kind="bfloat")
    assert (recipe.merge_method, recipe.dtype) == ("ties", "bfloat16")
    assert recipe.models[0].model == "math-v2"
    assert recipe.models[0].parameters == {
        "weight": Fraction(1, 3),
        "density": (Fraction(0), Fraction(1, 6), Fraction(1)),
        "gamma": (Filtered("math", Fraction(2, 3)), Filtered(None, (Fraction(1, 3), Fraction(0)))),
    }


def test_template_lists_its_placeholders_with_their_places() -> None:
    template = recipe_template(load_document(two_models("parameters:\n  t: ${w}\n  s: ${1 - v}\n"), "r.yml"))
    assert [(sorted(p.names), p.place) for p in template.placeholders] == [(["w"], "r.yml:6"), (["v"], "r.yml:7")]


def test_chat_templates_keep_their_braces() -> None:
    jinja = "{% for m in messages %}${{ m.content }}{% endfor %}"
    assert read(two_models(f"chat_template: '{jinja}'\n")).chat_template == jinja


@pytest.mark.parametrize("word", ["auto", "alpaca", "chatml", "exaone", "llama3", "mistral"])
def test_the_names_of_chat_templates_are_mergekits(word: str) -> None:
    assert read(two_models(f"chat_template: {word}\n")).chat_template == word


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("chatlm", 'did you mean "chatml"?'),
        ("ChatML", 'did you mean "chatml"?'),
        ("llama-3", 'did you mean "llama3"?'),
        ("qwen", "choose from alpaca, auto, chatml, exaone, llama3, mistral"),
        ("answer {question} briefly", "choose from alpaca, auto, chatml, exaone, llama3, mistral"),
    ],
)
def test_any_other_word_for_a_chat_template_is_refused(word: str, remedy: str) -> None:
    message = refusal(two_models(f"chat_template: '{word}'\n"))
    assert f'chat_template "{word}" is neither a name nor Jinja text; {remedy}' in message


def test_absent_and_null_are_the_same() -> None:
    nulls = "base_model:\ndtype: null\nparameters: ~\ntokenizer_source:\n"
    assert read(two_models(nulls)) == read(two_models())


def test_a_bare_filter_is_a_list_of_one() -> None:
    assert read(two_models("parameters: {t: {filter: mlp, value: 0.5}}")).parameters == {
        "t": (Filtered("mlp", Fraction(1, 2)),)
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (two_models("dtpye: float32\n"), 'recipe.yml:5: unknown key "dtpye"; did you mean "dtype"?'),
        (two_models("slices: []\n"), "recipe.yml:5: `models` and `slices` exclude each other; take one out"),
        (two_models("modules: {}\n"), "recipe.yml:5: `models` and `modules` exclude each other; take one out"),
        (two_models("dtype: int64\n"), 'recipe.yml:5: dtype cannot be "int64"; choose from float32, float16, bfloat16'),
        (two_models("out_dtype: bf16\n"), 'recipe.yml:5: out_dtype cannot be "bf16"; choose from float32'),
        (two_models(second="a"), 'recipe.yml:4: the model "a" is listed twice'),
        ("models: [{model: a}]\n", 'recipe.yml:1: the document needs the key "merge_method"'),
        ("merge_method: linear\n", "recipe.yml:1: a recipe needs the key `models`, `slices` or `modules`"),
        ("merge_method: linear\nmodels:\n", "recipe.yml:1: a recipe needs the key `models`, `slices` or `modules`"),
        ("merge_method:\nmodels: [{model: a}]\n", 'recipe.yml:1: "merge_method" must have a value'),
        ("merge_method: linear\nmodels: []\n", 'recipe.yml:2: "models" is an empty list'),
        ("merge_method: linear\nmodels: [a]\n", 'recipe.yml:2: "models[0]" must be a mapping, not a string "a"'),
        ("merge_method: linear\nmodels:\n- {parameters: {}}\n", 'recipe.yml:3: "models[0]" needs the key "model"'),
        (
            "merge_method: linear\nmodels:\n- {model: a, revision: old}\n",
            "recipe.yml:3: `revision:` stands after the model's name: write `model: organisation/name@revision`",
        ),
        (
            "merge_method: linear\nmodels:\n- model: {model: a, lora: {revision: b}}\n",
            'recipe.yml:3: "models[0].model.lora" needs the key "path"',
        ),
        ("merge_method: linear\nmodels:\n- {model: a, weight: 1}\n", 'recipe.yml:3: unknown key "weight"'),
        (two_models("parameters: [1]\n"), 'recipe.yml:5: "parameters" must be a mapping, not a list'),
        (two_models("parameters: {t: []}\n"), 'recipe.yml:5: "parameters.t" is an empty list'),
        (two_models("parameters: {t: [1, x]}\n"), 'recipe.yml:5: "parameters.t[1]" must be a number, not a string "x"'),
        (
            two_models("parameters:\n  t: [{value: 1}, 2]\n"),
            'recipe.yml:6: "parameters.t[1]" must be a mapping, not a number',
        ),
        (two_models("parameters: {t: {filter: x}}\n"), 'recipe.yml:5: "parameters.t" needs the key "value"'),
        (two_models("parameters: {t: {fliter: x, value: 1}}\n"), 'unknown key "fliter"; did you mean "filter"?'),
        (two_models("parameters: {t: }\n"), 'recipe.yml:5: "parameters.t" must be a string, not nothing'),
        (two_models("parameters: {t: .nan}\n"), 'recipe.yml:5: "parameters.t" must be finite'),
        (two_models("parameters: {t: [1, true]}\n"), 'recipe.yml:5: "parameters.t[1]" must be a number, not a boolean'),
        (two_models("parameters:\n  t: ${w +}\n"), "recipe.yml:6: an operand is missing"),
        (two_models("parameters:\n  t: ${v}\n"), 'recipe.yml:6: unknown axis "v"'),
        (two_models('parameters:\n  t: [0, "${s}"]\n'), 'recipe.yml:6: a gradient holds numbers, not "word"'),
        (two_models('parameters:\n  t: "${1 - s}"\n'), 'recipe.yml:6: "s" stands for the text "word"'),
        ("- a\n", "recipe.yml:1: the document must be a mapping, not a list"),
    ],
)
def test_what_mergekit_lets_pass_or_cannot_be_done_is_refused(text: str, message: str) -> None:
    assert message in refusal(text, w=Fraction(1, 2), s="word")


@pytest.mark.parametrize(
    ("setting", "tensor_name", "position", "expected"),
    [
        (Fraction(1, 2), "any", 0.3, Fraction(1, 2)),
        (True, "any", 0.3, True),
        ("word", "any", 0.3, "word"),
        # a gradient's values stand at 0, 1/2 and 1
        ((Fraction(0), Fraction(1), Fraction(3)), "any", 0.0, Fraction(0)),
        ((Fraction(0), Fraction(1), Fraction(3)), "any", 0.25, Fraction(1, 2)),
        ((Fraction(0), Fraction(1), Fraction(3)), "any", 0.5, Fraction(1)),
        ((Fraction(0), Fraction(1), Fraction(3)), "any", 0.75, Fraction(2)),
        ((Fraction(0), Fraction(1), Fraction(3)), "any", 1.0, Fraction(3)),
        ((Fraction(4),), "any", 0.6, Fraction(4)),
        # booleans hold up to the next one, as mergekit 0.1.5 has it
        ((True, False, True), "any", 0.49, True),
        ((True, False, True), "any", 0.5, False),
        ((True, False, True), "any", 1.0, True),
        ((Filtered("mlp", (False, True)),), "mlp", 1.0, True),
        # layer 9 of 28: the float 9/27 means a third, exactly
        ((Fraction(0), Fraction(1)), "any", 9 / 27, Fraction(1, 3)),
        ((Fraction(0), Fraction(1)), "any", Fraction(9, 27), Fraction(1, 3)),
        # the first filter that is part of the name wins
        ((Filtered("mlp", Fraction(1)), Filtered("up", Fraction(2))), "layers.3.mlp.up_proj", 0.0, Fraction(1)),
        ((Filtered("mlp", Fraction(1)), Filtered("up", Fraction(2))), "layers.3.attn.up", 0.0, Fraction(2)),
        ((Filtered("mlp", Fraction(1)),), "layers.3.attn", 0.0, None),
        ((Filtered("mlp", Fraction(1)), Filtered("*", Fraction(2))), "norm", 0.0, Fraction(2)),
        ((Filtered(None, Fraction(3)), Filtered("norm", Fraction(2))), "norm", 0.0, Fraction(3)),
        ((Filtered("mlp", (Fraction(0), Fraction(1))),), "mlp", 0.5, Fraction(1, 2)),
        ((Filtered("mlp", False),), "mlp", 0.5, False),
    ],
)
def test_settings_are_resolved_as_mergekit_resolves_them(
    setting: Any, tensor_name: str, position: float | Fraction, expected: Any
) -> None:
    found = setting_at(setting, tensor_name=tensor_name, position=position)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize("layers", [2, 3, 24, 28, 80, 997])
def test_a_gradient_of_one_value_a_layer_gives_each_layer_its_own(layers: int) -> None:
    gradient = tuple(Fraction(index * index, 7) for index in range(layers))
    for index in range(layers):
        assert setting_at(gradient, tensor_name="x", position=index / (layers - 1)) == gradient[index]


def test_numbers_in_quotes_are_numbers_as_in_mergekit() -> None:
    quoted = read(two_models('parameters: {weight: "0.75", t: [" .5 ", 1], x: [{filter: a, value: "+3e-1"}]}\n'))
    plain = read(two_models("parameters: {weight: 0.75, t: [.5, 1], x: [{filter: a, value: +3e-1}]}\n"))
    assert quoted == plain
    assert quoted.parameters["weight"] == Fraction(3, 4)


def test_a_number_in_quotes_has_the_limits_of_a_number() -> None:
    assert "out of range" in refusal(two_models('parameters: {weight: "1e999999999"}\n'))


def test_a_name_is_taken_and_not_used() -> None:
    assert read("name: soup\n" + two_models()) == read(two_models())


def test_the_long_form_of_a_model_is_its_name_and_revision() -> None:
    recipe = read(two_models(second="{model: {path: b/c, revision: v1}, lora: null}") + "base_model: {model: a}\n")
    assert recipe.references() == ("a", "b/c@v1")
    assert recipe.base_model == "a"


@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("{model: a, lora: l}", "a+l"),
        ("{model: {path: a, revision: v1}, lora: {path: l, revision: v2}}", "a@v1+l@v2"),
        ("{model: {path: a}, lora: {path: o/l, revision: null}}", "a+o/l"),
        ("{model: {path: c}, override_architecture: MistralForCausalLM}", "c"),
        ("a@v1+l@v2", "a@v1+l@v2"),
    ],
)
def test_the_long_form_of_an_adapter_is_its_name_after_a_plus(form: str, name: str) -> None:
    assert read(two_models(second=form)).references() == ("a", name)


def test_a_key_of_any_name_may_hold_what_an_alias_repeats() -> None:
    repeated = "x: &half {weight: 0.5}\nmerge_method: linear\nmodels:\n- {model: a, parameters: *half}\n- model: b\n"
    node = load_document(repeated, "recipe.yml")
    assert recipe_template(node).bind({}).models[0].parameters == {"weight": Fraction(1, 2)}
    assert "x" not in plain_recipe(node)
    assert 'unknown key "x"' in refusal(repeated.replace("*half", "{weight: 0.5}"))
