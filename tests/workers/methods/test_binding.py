"""Recipes bound to tensors: what is refused, on which line, and which recipes are the same merge."""

from __future__ import annotations

import textwrap
from fractions import Fraction

import pytest

from jobs.errors import BadInput
from jobs.merge_tasks import Setting
from jobs.recipe import Recipe, recipe_template
from jobs.yaml_nodes import load_document
from workers.methods.binding import check_recipe, resolve, without_effect


def recipe(text: str) -> Recipe:
    return recipe_template(load_document(textwrap.dedent(text).strip(), "job.yaml")).bind({})


def setting(text: str, *, tensor: str = "x", position: float = 0.0, exact: bool = True) -> Setting:
    bound = recipe(text)
    check_recipe(bound)
    return resolve(bound, tensor, position, exact=exact)


def weighted(method: str, *weights: object, base: bool = True, **parameters: object) -> str:
    """A recipe of models a, b, c … with these weights; a tuple is (weight, density)."""
    lines = [f"merge_method: {method}", *(["base_model: base"] if base else []), "models:"]
    for name, weight in zip("abcdef", weights, strict=False):
        own = f"weight: {weight[0]}, density: {weight[1]}" if isinstance(weight, tuple) else f"weight: {weight}"
        lines.append(f"- {{model: {name}, parameters: {{{own}}}}}")
    shared = ", ".join(f"{name.rstrip('_')}: {str(value).lower()}" for name, value in parameters.items())
    return "\n".join([*lines, f"parameters: {{{shared}}}"] if parameters else lines)


def plain(method: str, *models: str, **parameters: object) -> str:
    """A recipe of a base and models without parameters of their own."""
    lines = [f"merge_method: {method}", "base_model: base", f"models: [{', '.join(f'{{model: {m}}}' for m in models)}]"]
    return "\n".join([*lines, "parameters:", *(f"  {name}: {value}" for name, value in parameters.items())])


# ---- refusals

REFUSED = {
    "unknown method": (
        """
        models: [{model: a}]
        merge_method: slrp
        """,
        'job.yaml:1: unknown method "slrp"; did you mean "slerp"?',
    ),
    "method like no other": (
        """
        models: [{model: a}]
        merge_method: xyzzy
        """,
        'job.yaml:1: unknown method "xyzzy"; it has ',
    ),
    "misspelt parameter of a model": (
        """
        merge_method: linear
        models:
        - model: a
          parameters:
            weight: 1
        - model: b
          parameters:
            wieght: 1
        """,
        'job.yaml:8: linear has no parameter "wieght"; did you mean "weight"?',
    ),
    "misspelt parameter at the top": (
        """
        merge_method: ties
        base_model: base
        models: [{model: a}]
        parameters:
          weight: 1
          densty: 0.3
        """,
        'job.yaml:6: ties has no parameter "densty"; did you mean "density"?',
    ),
    "parameter of another method": (
        """
        merge_method: linear
        models: [{model: a}]
        parameters: {weight: 1, t: 0.5}
        """,
        'job.yaml:3: linear has no parameter "t"; it has normalize, weight: take t out, mergekit ignores it here',
    ),
    "parameter of the whole merge at a model": (
        """
        merge_method: linear
        models:
        - model: a
          parameters:
            weight: 1
            normalize: false
        """,
        'job.yaml:6: "normalize" belongs to the whole merge, not to one model; move it to the top-level parameters',
    ),
    "missing weight": (
        """
        merge_method: linear
        models:
        - {model: a, parameters: {weight: 1}}
        - {model: b}
        """,
        'job.yaml:1: no "weight" of model b for tensor x; give it or a filter "*"',
    ),
    "weight that no filter gives": (
        """
        merge_method: linear
        models:
        - {model: a, parameters: {weight: [{filter: mlp, value: 1}]}}
        """,
        'job.yaml:1: no "weight" of model a for tensor x; give it or a filter "*"',
    ),
    "a number of users that is no number": (
        """
        merge_method: consensus_ta
        base_model: base
        models: [{model: a}, {model: b}]
        parameters: {k: 1.5}
        """,
        "job.yaml:4: k 1.5 at tensor x is not a whole number from 1 on",
    ),
    "a negative ratio": (
        """
        merge_method: consensus_ta
        base_model: base
        models: [{model: a}, {model: b}]
        parameters: {tall_lambda: -0.1}
        """,
        "job.yaml:4: tall_lambda -0.1 at tensor x is negative",
    ),
    "missing t": (
        """
        merge_method: slerp
        base_model: a
        models: [{model: a}, {model: b}]
        """,
        'job.yaml:1: no "t" for tensor x',
    ),
    "density above one": (
        """
        merge_method: ties
        base_model: base
        models:
        - {model: a, parameters: {weight: 1, density: 1.5}}
        """,
        "job.yaml:4: density 1.5 at tensor x is outside (0, 1]",
    ),
    "density of zero": (
        """
        merge_method: dare_ties
        base_model: base
        models: [{model: a}]
        parameters: {weight: 1, density: 0}
        """,
        "job.yaml:4: density 0 at tensor x is outside (0, 1]",
    ),
    "gamma above one": (
        """
        merge_method: breadcrumbs
        base_model: base
        models:
        - {model: a, parameters: {weight: 1, gamma: 1.5}}
        """,
        "job.yaml:4: gamma 1.5 at tensor x is outside [0, 1]",
    ),
    "della's probabilities above one": (
        """
        merge_method: della
        base_model: base
        models: [{model: a}]
        parameters:
          weight: 1
          density: 0.9
        """,
        "job.yaml:1: the probabilities density ± epsilon = 0.9 ± 0.15 at tensor x are not all inside (0, 1);"
        " give an epsilon below 0.1",
    ),
    "della's probability of zero": (
        """
        merge_method: della_linear
        base_model: base
        models: [{model: a, parameters: {weight: 1, density: 0.25}}]
        parameters: {epsilon: 0.25}
        """,
        "job.yaml:4: the probabilities density ± epsilon = 0.25 ± 0.25 at tensor x are not all inside (0, 1);"
        " give an epsilon below 0.25",
    ),
    "select_topk of zero": (
        """
        merge_method: sce
        base_model: base
        models: [{model: a}, {model: b}]
        parameters: {select_topk: 0}
        """,
        "job.yaml:4: select_topk 0 at tensor x is outside (0, 1]",
    ),
    "weight of a method without weights": (
        """
        merge_method: ram
        base_model: base
        models: [{model: a, parameters: {weight: 1}}]
        """,
        'job.yaml:3: ram has no parameter "weight"; it has epsilon: take weight out, mergekit ignores it here',
    ),
    "word for a number": (
        """
        merge_method: linear
        models: [{model: a}]
        parameters: {weight: much}
        """,
        'job.yaml:3: "weight" is a number, not much',
    ),
    "number for a switch": (
        """
        merge_method: linear
        models: [{model: a}]
        parameters: {weight: 1, normalize: 2}
        """,
        'job.yaml:3: "normalize" is true or false, not 2',
    ),
    "word for a switch, which mergekit takes for true": (
        """
        merge_method: linear
        models: [{model: a}]
        parameters: {weight: 1, normalize: "off"}
        """,
        'job.yaml:3: "normalize" is true or false, not off',
    ),
    "switch for a number": (
        """
        merge_method: linear
        models: [{model: a}]
        parameters: {weight: true}
        """,
        'job.yaml:3: "weight" is a number, not True',
    ),
    "weights that cancel": (
        """
        merge_method: linear
        models:
        - {model: a, parameters: {weight: 0.1}}
        - {model: b, parameters: {weight: -0.1}}
        """,
        "job.yaml:1: tensor x: the weights sum to zero and normalize divides by the sum; set normalize: false",
    ),
    "no base": (
        """
        merge_method: ties
        models: [{model: a}]
        parameters: {weight: 1}
        """,
        "job.yaml:1: ties needs a base_model",
    ),
    "only the base": (
        """
        merge_method: ties
        base_model: a
        models: [{model: a}]
        parameters: {weight: 1}
        """,
        "job.yaml:1: ties merges at least 1 model(s) beside the base, the recipe names 0",
    ),
    "half a step": (
        """
        merge_method: karcher
        models: [{model: a}, {model: b}]
        parameters: {max_iter: 2.5}
        """,
        'job.yaml:3: "max_iter" is a whole number, not 2.5',
    ),
    "nuslerp of three": (
        """
        merge_method: nuslerp
        models: [{model: a}, {model: b}, {model: c}]
        parameters: {weight: 1}
        """,
        "job.yaml:1: nuslerp merges 2 model(s), the recipe names 3",
    ),
    "nuslerp with one of its models as the base": (
        """
        merge_method: nuslerp
        base_model: a
        models: [{model: a}, {model: b}]
        parameters: {weight: 1}
        """,
        "job.yaml:1: nuslerp merges 2 model(s) beside the base, the recipe names 1",
    ),
    "weights of multislerp that sum to zero": (
        """
        merge_method: multislerp
        models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: -1}}]
        """,
        "job.yaml:1: tensor x: the weights sum to zero and normalize_weights divides by the sum; set normalize_weights",
    ),
    "model_stock of one": (
        """
        merge_method: model_stock
        base_model: a
        models: [{model: a}, {model: b}]
        """,
        "job.yaml:1: model_stock merges at least 2 model(s) beside the base, the recipe names 1",
    ),
    "slerp of three": (
        """
        merge_method: slerp
        base_model: a
        models: [{model: b}, {model: c}]
        parameters: {t: 0.5}
        """,
        "job.yaml:1: slerp merges 2 model(s) counting the base, the recipe names 3",
    ),
    "nearswap of three": (
        """
        merge_method: nearswap
        base_model: a
        models: [{model: b}, {model: c}]
        parameters: {t: 0.1}
        """,
        "job.yaml:1: nearswap merges 1 model(s) beside the base, the recipe names 2",
    ),
    "passthrough of two": (
        """
        merge_method: passthrough
        models: [{model: a}, {model: b}]
        """,
        "job.yaml:1: passthrough merges 1 model(s), the recipe names 2",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_recipe_that_cannot_work_is_refused_on_its_line(kind: str):
    text, line = REFUSED[kind]
    with pytest.raises(BadInput) as refusal:
        setting(text)
    assert str(refusal.value).startswith(line)
    assert len(str(refusal.value).splitlines()) == 1


# ---- look-up


def test_a_parameter_of_other_methods_can_be_taken_out():
    with pytest.raises(BadInput, match=r'no parameter "normalize"; it has filter_wise: take normalize out'):
        setting(plain("model_stock", "a", "b", normalize="false"))
    assert setting(plain("model_stock", "a", "b")).method == "model_stock"


def test_a_models_own_parameter_comes_before_the_top_level_and_that_before_the_default():
    text = """
        merge_method: ties
        base_model: base
        models:
        - {model: a, parameters: {weight: 0.5, density: 0.25}}
        - {model: b}
        parameters: {weight: 2}
        """
    found = dict(setting(text).parameters)
    assert (found["weight"], found["density"]) == ((0.5, 2.0), (0.25, 1.0))


def test_gradients_are_read_at_the_layers_position():
    text = weighted("linear", "[0, 1]", "[1, 0]", base=False)
    assert setting(text, position=0.25).parameters == (("normalize", False), ("weight", (0.25, 0.75)))


@pytest.mark.parametrize("layers", [2, 5, 28])
def test_a_gradient_of_lambda_is_lines(layers: int):
    alpha, beta = Fraction("0.3"), Fraction("0.5")
    for layer in range(layers):
        position = layer / (layers - 1)
        expected = alpha + beta * Fraction(layer, layers - 1)  # arXiv 2410.17146, equation 3
        sums = setting(weighted("task_arithmetic", 0.5, 0.25, lambda_=[0.3, 0.8]), position=position)
        assert dict(sums.parameters)["weight"] == pytest.approx((float(expected / 2), float(expected / 4)), rel=1e-15)
        elects = setting(weighted("ties", 0.5, 0.25, lambda_=[0.3, 0.8]), position=position)
        assert dict(elects.parameters)["lambda"] == pytest.approx(float(expected), rel=1e-15)


def test_filters_are_matched_against_the_tensors_name():
    text = weighted("linear", "[{filter: mlp, value: 3}, {value: 1}]", 1, base=False)
    assert dict(setting(text, tensor="layers.0.mlp.up").parameters)["weight"] == (0.75, 0.25)
    assert dict(setting(text, tensor="norm").parameters)["weight"] == (0.5, 0.5)


def test_mergekits_numerics_keep_the_documents_numbers():
    found = setting(weighted("linear", 1.4, 0.6, base=False), exact=False)
    assert found.parameters == (("normalize", True), ("weight", (1.4, 0.6)))


# ---- the same merge

COPY_OF_BASE = Setting("passthrough", ("base",), None, (("scale", (1.0,)),))
COPY_OF_A = Setting("passthrough", ("a",), None, (("scale", (1.0,)),))

SAME = {
    "weights in proportion": (weighted("linear", 0.7, 0.3, base=False), weighted("linear", 1.4, 0.6, base=False)),
    "weights that sum to one already": (
        weighted("linear", 0.7, 0.3, base=False),
        weighted("linear", 0.7, 0.3, base=False, normalize=False),
    ),
    "weight zero leaves": (weighted("linear", 0.5, 0, 0.5, base=False), """
        merge_method: linear
        models: [{model: a, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]
        """),
    "linear with its base listed, or joining last": ("""
        merge_method: linear
        base_model: b
        models: [{model: a}, {model: b}]
        parameters: {weight: 1}
        """, """
        merge_method: linear
        base_model: b
        models: [{model: a}]
        parameters: {weight: 1}
        """),
    "lambda goes into the weights of a sum": (
        weighted("task_arithmetic", 0.5, 0.25, lambda_=2),
        weighted("task_arithmetic", 1, 0.5),
    ),
    "normalize goes into the weights of a sum": (
        weighted("task_arithmetic", 3, 1, normalize=True),
        weighted("task_arithmetic", 0.75, 0.25),
    ),
    "density means nothing to task arithmetic": (
        weighted("task_arithmetic", (1, 0.5)),
        weighted("task_arithmetic", 1),
    ),
    "int8_mask means nothing": (weighted("ties", (1, 0.5), int8_mask=True), weighted("ties", (1, 0.5))),
    "dare of density one is task arithmetic": (weighted("dare_linear", (0.5, 1)), weighted("task_arithmetic", 0.5)),
    "dare_ties of density one is ties": (
        weighted("dare_ties", (0.5, 1), 1),
        weighted("ties", 0.5, (1, 1), normalize=False),
    ),
    "fewer models than must agree is the base": (plain("consensus_ta", "a"), plain("consensus_ta", "b", k=2)),
    "breadcrumbs of density one is task arithmetic": (
        weighted("breadcrumbs", (0.5, 1), gamma=0.3),
        weighted("task_arithmetic", 0.5),
    ),
    "breadcrumbs_ties of density one is ties": (
        weighted("breadcrumbs_ties", 1, 2),
        weighted("ties", 1, 2, normalize=False),
    ),
    "the gamma of a density of one": (
        weighted("breadcrumbs_ties", (1, 1), (1, 0.5), gamma=[0.2, 0.2]),
        weighted("breadcrumbs_ties", ("1, gamma: 0.9", 1), ("1, gamma: 0.2", 0.5)),
    ),
    "della of density one is ties": (weighted("della", 1, 2, epsilon=0.9), weighted("ties", 1, 2)),
    "della_linear of density one is task arithmetic": (weighted("della_linear", 1), weighted("task_arithmetic", 1)),
    "sce of one model is task arithmetic": (plain("sce", "a"), weighted("task_arithmetic", 1)),
    "ramplus_tl of one model is ram": (plain("ramplus_tl", "a", r=0.3), plain("ram", "a")),
    "ramplus_tl without growth is ram": (plain("ramplus_tl", "a", "b", alpha=0), plain("ram", "a", "b")),
    "rescale means nothing where nothing is trimmed": (weighted("ties", 0.5, rescale=True), weighted("ties", 0.5)),
    "the density of a model that left": (weighted("ties", 0.5, (0, 0.3)), weighted("ties", 0.5)),
    "a base among the models": ("""
        merge_method: ties
        base_model: base
        models: [{model: base, parameters: {weight: 7}}, {model: a, parameters: {weight: 1}}]
        """, weighted("ties", 1)),
    "nuslerp with weights in proportion": (
        weighted("nuslerp", 3, 1, base=False),
        weighted("nuslerp", 0.75, 0.25, base=False),
    ),
    "nuslerp with weights that cancel": (weighted("nuslerp", 1, -1), weighted("nuslerp", 5, 5)),
    "nuslerp of flattened tensors has no rows": (
        weighted("nuslerp", 1, 2, nuslerp_row_wise=True),
        weighted("nuslerp", 1, 2),
    ),
    "multislerp with weights in proportion": (
        weighted("multislerp", 2, 0, 6),
        weighted("multislerp", 0.25, 0, 0.75, normalize_weights=False),
    ),
    "slerp with its base listed last, or not at all": ("""
        merge_method: slerp
        base_model: base
        models: [{model: a}, {model: base}]
        parameters: {t: 0.3}
        """, """
        merge_method: slerp
        base_model: base
        models: [{model: a}]
        parameters: {t: 0.3}
        """),
}  # fmt: skip


@pytest.mark.parametrize("kind", SAME)
def test_equal_merges_have_equal_settings(kind: str):
    first, second = (setting(text) for text in SAME[kind])
    assert first == second


DIFFERENT = {
    "rows of nuslerp": (
        weighted("nuslerp", 1, 2, nuslerp_flatten=False),
        weighted("nuslerp", 1, 2, nuslerp_flatten=False, nuslerp_row_wise=True),
    ),
    "bases that are optional": (weighted("multislerp", 1, 2), weighted("multislerp", 1, 2, base=False)),
    "rows of model_stock": (plain("model_stock", "a", "b"), plain("model_stock", "a", "b", filter_wise=True)),
    "steps of karcher": (plain("karcher", "a", "b", max_iter=3), plain("karcher", "a", "b")),
    "densities": (weighted("ties", (1, 0.5)), weighted("ties", (1, 0.4))),
    "methods": (weighted("dare_ties", (1, 0.5)), weighted("ties", (1, 0.5), normalize=False)),
    "gammas": (weighted("breadcrumbs", (1, 0.5), gamma=0.1), weighted("breadcrumbs", (1, 0.5), gamma=0.2)),
    "epsilons of della": (weighted("della", (1, 0.5), epsilon=0.1), weighted("della", (1, 0.5))),
    "normalize in ties": (weighted("ties", 1, 2), weighted("ties", 1, 2, normalize=False)),
    "lambda in ties": (weighted("ties", 1, 2, lambda_=2), weighted("ties", 2, 4)),
    "rescale": (weighted("ties", (1, 0.5), rescale=True), weighted("ties", (1, 0.5))),
    "shares that are selected": (plain("sce", "a", "b", select_topk=0.5), plain("sce", "a", "b")),
    "epsilons": (plain("ram", "a", "b", epsilon=0), plain("ram", "a", "b")),
    "models": (weighted("linear", 1, 0, base=False), weighted("linear", 0, 1, base=False)),
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_merges_have_different_settings(kind: str):
    first, second = (setting(text) for text in DIFFERENT[kind])
    assert first != second


SLERP = "merge_method: slerp\nbase_model: base\nmodels: [{{model: a}}]\nparameters: {{t: {t}}}"
NEARSWAP = "merge_method: nearswap\nbase_model: base\nmodels: [{{model: a}}]\nparameters: {{t: {t}}}"

COPIES = {
    "linear of one": (weighted("linear", 3, base=False), COPY_OF_A),
    "linear with one weight left": (weighted("linear", 1, 0, base=False), COPY_OF_A),
    "slerp at 0": (SLERP.format(t=0), COPY_OF_BASE),
    "slerp at 1": (SLERP.format(t=1), COPY_OF_A),
    "nuslerp at its start": (weighted("nuslerp", 0.5, 0), COPY_OF_A),
    "multislerp of one": (weighted("multislerp", 0.5), COPY_OF_A),
    "multislerp with one weight left": (weighted("multislerp", 0.5, 0, base=False), COPY_OF_A),
    "karcher of one": ("merge_method: karcher\nmodels: [{model: a}]", COPY_OF_A),
    "task arithmetic without weight": (weighted("task_arithmetic", 0), COPY_OF_BASE),
    "sce of a part of one model": (plain("sce", "a", select_topk=0.9), COPY_OF_BASE),
    "nearswap with a t of zero": (NEARSWAP.format(t=0), COPY_OF_BASE),
    "nearswap with a t below zero": (NEARSWAP.format(t=-1), COPY_OF_BASE),
    "lambda of zero": (weighted("ties", 1, lambda_=0), COPY_OF_BASE),
    "ties without weight": (weighted("ties", (0, 0.5)), COPY_OF_BASE),
}


@pytest.mark.parametrize("kind", COPIES)
def test_a_merge_that_is_one_parent_is_a_copy(kind: str):
    text, expected = COPIES[kind]
    assert setting(text) == expected


def test_weights_stay_exact_until_they_are_divided():
    # in floating point 0.1 + 0.2 is not 0.3, and 0.1/0.30000000000000004 is not 1/3
    found = dict(setting(weighted("linear", 0.1, 0.2, base=False)).parameters)
    assert found["weight"] == (1 / 3, 2 / 3)


def test_parameters_without_effect_of_a_document_for_mergekit_are_said():
    text = """
    merge_method: model_stock
    base_model: base
    models:
    - {model: a, parameters: {weight: 0.5, filter_wise: true}}
    - {model: b}
    parameters: {normalize: true, embed_slerp: true}
    """
    document = load_document(textwrap.dedent(text).strip(), "card.yml")
    recipe = recipe_template(document, foreign=True).bind({})
    check_recipe(recipe)
    assert without_effect(recipe) == [
        'card.yml:6: model_stock has no parameter "normalize"; it has no effect',
        'card.yml:6: model_stock has no parameter "embed_slerp"; it has no effect',
        'card.yml:4: model_stock has no parameter "weight"; it has no effect',
        'card.yml:4: "filter_wise" has no effect at one model; it belongs to the top-level parameters',
    ]
    plain = recipe_template(load_document(
        "merge_method: model_stock\nbase_model: base\nmodels: [{model: a}, {model: b}]", "plain.yml"
    )).bind({})  # fmt: skip
    assert resolve(recipe, "x", 0, exact=True) == resolve(plain, "x", 0, exact=True)
    misspelt = recipe_template(load_document(
        "merge_method: linear\nmodels: [{model: a, parameters: {wieght: 1}}]", "card.yml"
    ), foreign=True).bind({})  # fmt: skip
    with pytest.raises(BadInput, match='no parameter "wieght"; did you mean "weight"'):
        check_recipe(misspelt)


def test_a_document_for_mergekit_that_adds_nothing_to_its_base_is_the_base_and_says_so():
    text = "merge_method: task_arithmetic\nbase_model: base\nmodels: [{model: base, parameters: {weight: 1}}]"
    recipe = recipe_template(load_document(text, "card.yml"), foreign=True).bind({})
    check_recipe(recipe)
    assert resolve(recipe, "x", 0, exact=True) == Setting("passthrough", ("base",), None, (("scale", (1.0,)),))
    assert without_effect(recipe) == [
        "card.yml:1: task_arithmetic has no model beside the base base, which is the result"
    ]
    with pytest.raises(BadInput, match="at least 1 model"):
        check_recipe(recipe_template(load_document(text, "job.yaml")).bind({}))


def test_booleans_in_quotes_are_read():
    text = 'merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\nparameters: {normalize: "False"}'
    found = resolve(recipe_template(load_document(text, "job.yaml")).bind({}), "x", 0, exact=False)
    assert dict(found.parameters)["normalize"] is False
