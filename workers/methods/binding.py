"""From a recipe to the numbers that merge one tensor: looked up, checked against the method's signature, simplified.

Simplifying makes equal points equal: weights are divided by their sum while they are still exact fractions, models of
weight zero leave, a density of one trims nothing. Two points whose settings agree for every tensor are one merge.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TypeVar, cast

from jobs.errors import BadInput
from jobs.merge_tasks import Setting
from jobs.recipe import Recipe
from jobs.sources import Source, setting_at
from jobs.yaml_nodes import NEAR, nearest
from workers.methods import METHODS, Method, Parameter
from workers.methods.fisher import LEAST_FLOOR

Exact = Fraction | bool


@dataclass(frozen=True, slots=True)
class Bound:
    """A recipe bound to one tensor, its numbers still exact fractions."""

    method: str
    models: tuple[str, ...]
    base: str | None
    values: Mapping[str, Exact | tuple[Exact, ...]]

    def per_model(self, name: str) -> tuple[Fraction, ...]:
        """A per-model number."""
        return cast(tuple[Fraction, ...], self.values[name])

    def number(self, name: str) -> Fraction:
        """A number of the whole merge."""
        return cast(Fraction, self.values[name])


def check_recipe(recipe: Recipe) -> None:
    """Refuses an unknown method or parameter, one at the wrong level, and models or a base the method cannot take."""
    method = METHODS.get(recipe.merge_method)
    if method is None:
        raise BadInput(
            f'{recipe.place}: unknown method "{recipe.merge_method}"{_nearest(recipe.merge_method, METHODS)}'
        )
    for name in recipe.parameters:
        _check_name(recipe, method, name, recipe.place_of(name))
    for source in recipe.models:
        for name in source.parameters:
            _check_name(recipe, method, name, source.place_of(name))
            if name in method.parameters and not method.parameters[name].per_model and not recipe.foreign:
                raise BadInput(
                    f'{source.place_of(name)}: "{name}" belongs to the whole merge, not to one model;'
                    " move it to the top-level parameters"
                )
    if recipe.aim is not None and not (method.base == "required" or (method.base == "optional" and recipe.base_model)):
        given = "give it a base_model" if method.base == "optional" else "take task_arithmetic, ties or another"
        raise BadInput(
            f"{recipe.place_of('aim')}: aim shrinks task vectors, and {recipe.merge_method} has none here; {given}, or"
            " take `aim` out"
        )
    if method.base in ("required", "one of the models") and recipe.base_model is None:
        raise BadInput(f"{recipe.place}: {recipe.merge_method} needs a base_model")
    models = _merged_models(recipe, method)
    _check_given(recipe, method, models)
    if _only_the_base(recipe, method):
        return
    if len(models) < method.fewest or (method.most is not None and len(models) > method.most):
        wanted = f"{method.fewest}" if method.fewest == method.most else f"at least {method.fewest}"
        if method.most is not None and method.fewest != method.most:
            wanted = f"at most {method.most}"
        of_base = ""
        if recipe.base_model is not None and method.base != "unused":
            of_base = " counting the base" if method.base == "one of the models" else " beside the base"
        raise BadInput(
            f"{recipe.place}: {recipe.merge_method} merges {wanted} model(s){of_base}, the recipe names {len(models)}"
        )


def _check_given(recipe: Recipe, method: Method, models: Sequence[Source]) -> None:
    """Refuses a model whose statistics the method needs and the recipe does not name."""
    if method.given is None:
        return
    files = {"grams": recipe.grams, "fisher": recipe.fisher}[method.given] or {}
    needed, what = ("Gram matrices", "") if method.given == "grams" else ("Fisher information", " --what fisher")
    if lacking := [each for each in models if each.model not in files]:
        raise BadInput(
            f"{lacking[0].place}: {recipe.merge_method} needs the {needed} of {lacking[0].model}; write the file by"
            f" `mergeyard measure{what}`, and name it under `{method.given}:` of the recipe"
        )


def resolve(recipe: Recipe, tensor: str, position: float, *, exact: bool) -> Setting:
    """The setting of one tensor; `position` is its layer's place from 0 to 1, for gradients.

    `exact=False` keeps the document's numbers as they are (`--numerics mergekit`). Raises `BadInput` for a missing or
    impossible value, naming the tensor.
    """
    method = METHODS[recipe.merge_method]
    models = _merged_models(recipe, method)
    if not models and recipe.base_model is not None:
        return rounded(_copy_of(recipe.base_model))
    values: dict[str, Exact | tuple[Exact, ...]] = {}
    for parameter in method.parameters.values():
        if parameter.per_model:
            values[parameter.name] = tuple(
                _value(parameter, source, recipe, tensor=tensor, position=position) for source in models
            )
        else:
            values[parameter.name] = _value(parameter, None, recipe, tensor=tensor, position=position)
    _check_shares(recipe, values, tensor)
    bound = Bound(recipe.merge_method, tuple(source.model for source in models), recipe.base_model, values)
    simple = simplified(bound, place=f"{recipe.place}: tensor {tensor}") if exact else bound
    if recipe.aim is None or recipe.aim.omega == 1 or simple.models == (recipe.base_model,):
        return rounded(simple)
    if simple.method == "passthrough":  # a copy of a model, whose task vector is shrunk
        assert recipe.base_model is not None
        whole = {"weight": (Fraction(1),), "normalize": False, "lambda": Fraction(1)}
        simple = Bound("task_arithmetic", simple.models, recipe.base_model, whole)
    return replace(rounded(simple), omega=float(recipe.aim.omega))


def _merged_models(recipe: Recipe, method: Method) -> Sequence[Source]:
    """The models that enter the formula: without the base where it is subtracted, with it everywhere else.

    A base that is not listed is the first end of a slerp and the last model elsewhere, as in mergekit 0.1.5.
    """
    if method.base in ("required", "optional"):
        return [source for source in recipe.models if source.model != recipe.base_model]
    if recipe.base_model is None or any(source.model == recipe.base_model for source in recipe.models):
        return recipe.models
    base = Source(model=recipe.base_model, parameters={}, place=recipe.place)
    return [base, *recipe.models] if method.base == "one of the models" else [*recipe.models, base]


def _value(parameter: Parameter, source: Source | None, recipe: Recipe, *, tensor: str, position: float) -> Exact:
    """mergekit's look-up order: the model's own parameters, then the top level, then the default."""
    levels: list[tuple[Mapping[str, object], str]] = [(recipe.parameters, recipe.place_of(parameter.name))]
    if source is not None:
        levels.insert(0, (source.parameters, source.place_of(parameter.name)))
    for parameters, place in levels:
        if parameter.name not in parameters:
            continue
        value = setting_at(parameters[parameter.name], tensor_name=tensor, position=position)  # pyright: ignore[reportArgumentType]
        if value is None:
            continue
        return _typed(parameter, value, place, foreign=recipe.foreign)
    if parameter.default is None:
        of_model = f" of model {source.model}" if source is not None else ""
        raise BadInput(f'{recipe.place}: no "{parameter.name}"{of_model} for tensor {tensor}; give it or a filter "*"')
    return parameter.default if isinstance(parameter.default, bool) else Fraction(repr(parameter.default))


def _typed(parameter: Parameter, value: Fraction | bool | str, place: str, *, foreign: bool) -> Exact:
    if parameter.kind == "boolean":
        if isinstance(value, bool):
            return value
        if value in (0, 1):
            return bool(value)
        if isinstance(value, str) and value.lower() in ("true", "false"):  # in quotes
            return value.lower() == "true"
        raise BadInput(f'{place}: "{parameter.name}" is true or false, not {value}')
    if isinstance(value, bool) and foreign and parameter.kind == "number":  # of a document for mergekit
        return Fraction(value)
    if isinstance(value, bool) or not isinstance(value, Fraction):
        raise BadInput(f'{place}: "{parameter.name}" is a number, not {value}')
    if parameter.kind == "integer" and value.denominator != 1:
        raise BadInput(f'{place}: "{parameter.name}" is a whole number, not {float(value):g}')
    return value


def _check_name(recipe: Recipe, method: Method, name: str, place: str) -> None:
    of_all = {known for other in METHODS.values() for known in other.parameters}
    of_another = name in of_all  # cards carry it from method to method
    if name in method.parameters or (recipe.foreign and (of_another or nearest(name, of_all) is None)):
        return
    remedy = _nearest(name, method.parameters)
    if of_another:
        has = ", ".join(sorted(method.parameters)) or "none"
        remedy = f"; it has {has}: take {name} out, mergekit ignores it here"
    raise BadInput(f'{place}: {recipe.merge_method} has no parameter "{name}"{remedy}')


def without_effect(recipe: Recipe) -> list[str]:
    """A sentence on every key and parameter of a document for mergekit that changes nothing, there and here."""
    method, name_of_method = METHODS[recipe.merge_method], recipe.merge_method
    of_all = [(name, recipe.place_of(name)) for name in recipe.parameters if name not in method.parameters]
    of_models = [(name, source.place_of(name)) for source in recipe.models for name in source.parameters]
    unknown = [*of_all, *(entry for entry in of_models if entry[0] not in method.parameters)]
    of_merge = [(name, at) for name, at in of_models if name in method.parameters.keys() - _per_model(method)]
    alone = f"{recipe.place}: {name_of_method} has no model beside the base {recipe.base_model}, which is the result"
    return [
        *recipe.ignored,
        *([alone] if _only_the_base(recipe, method) else []),
        *(f'{place}: {name_of_method} has no parameter "{name}"; it has no effect' for name, place in unknown),
        *(
            f'{place}: "{name}" has no effect at one model; it belongs to the top-level parameters'
            for name, place in of_merge
        ),
    ]


def _only_the_base(recipe: Recipe, method: Method) -> bool:
    """Whether a document for mergekit adds no task vector to its base, as cards of merges with an adapter do."""
    adds = method.base == "required" and method.most is None
    return recipe.foreign and adds and recipe.base_model is not None and not _merged_models(recipe, method)


def _per_model(method: Method) -> set[str]:
    return {parameter.name for parameter in method.parameters.values() if parameter.per_model}


def _check_shares(recipe: Recipe, values: Mapping[str, Exact | tuple[Exact, ...]], tensor: str) -> None:
    if recipe.merge_method == "task_arithmetic":  # accepted and unused
        return
    for name, least in (("density", "(0"), ("gamma", "[0"), ("select_topk", "(0")):
        shares = values.get(name, ())
        for share in shares if isinstance(shares, tuple) else (shares,):
            if not 0 <= share <= 1 or (share == 0 and least == "(0"):
                place = recipe.place_of(name)
                raise BadInput(f"{place}: {name} {float(share):g} at tensor {tensor} is outside {least}, 1]")
    if recipe.merge_method == "regmean":
        alpha = cast(Fraction, values["alpha"])
        if not 0 <= alpha <= 1:
            place = recipe.place_of("alpha")
            raise BadInput(f"{place}: alpha {float(alpha):g} at tensor {tensor} is outside [0, 1]")
    if recipe.merge_method == "fisher":
        floor = cast(Fraction, values["floor"])
        if not LEAST_FLOOR <= floor <= 1:
            place = recipe.place_of("floor")
            raise BadInput(f"{place}: floor {float(floor):g} at tensor {tensor} is outside [{LEAST_FLOOR:g}, 1]")
    if recipe.merge_method in ("regmean", "fisher"):
        weights = cast(tuple[Fraction, ...], values["weight"])
        if min(weights) < 0 or not any(weights):
            place, shown = recipe.place_of("weight"), ", ".join(f"{float(each):g}" for each in weights)
            raise BadInput(f"{place}: the weights {shown} at tensor {tensor} must not be negative, nor all be zero")
    if recipe.merge_method == "consensus_ta":
        k, place = cast(Fraction, values["k"]), recipe.place_of("k")
        if k < 1 or k.denominator != 1:
            raise BadInput(f"{place}: k {float(k):g} at tensor {tensor} is not a whole number from 1 on")
        for ratio in cast(tuple[Fraction, ...], values["tall_lambda"]):
            if ratio < 0:
                place = recipe.place_of("tall_lambda")
                raise BadInput(f"{place}: tall_lambda {float(ratio):g} at tensor {tensor} is negative")
    if recipe.merge_method in ("della", "della_linear"):
        densities, spreads = (cast(tuple[Fraction, ...], values[name]) for name in ("density", "epsilon"))
        for density, spread in zip(densities, spreads, strict=True):
            most = min(density, 1 - density)
            if density < 1 and abs(spread) >= most:
                raise BadInput(
                    f"{recipe.place_of('epsilon')}: the probabilities density ± epsilon ="
                    f" {float(density):g} ± {float(spread):g} at tensor {tensor} are not all inside (0, 1);"
                    f" give an epsilon below {float(most):g}"
                )


def _nearest(name: str, known: Mapping[str, object]) -> str:
    found = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    return f'; did you mean "{found[0]}"?' if found else f"; it has {', '.join(sorted(known))}"


def rounded(bound: Bound) -> Setting:
    """With floats, as it crosses the wire; models that the method does not read are gone."""

    def number(value: Exact) -> float | bool:
        return value if isinstance(value, bool) else float(value)

    parameters = tuple(
        (name, tuple(number(each) for each in value) if isinstance(value, tuple) else number(value))
        for name, value in sorted(bound.values.items())
    )
    base = bound.base if METHODS[bound.method].base != "unused" else None
    return Setting(bound.method, bound.models, base, parameters)


def simplified(bound: Bound, *, place: str) -> Bound:
    """The plainest setting that gives the same merge. `place` names it in an error."""
    match bound.method:
        case "linear":
            return _simplified_linear(bound, place)
        case "slerp":
            return _simplified_slerp(bound)
        case "nuslerp":
            return _simplified_nuslerp(bound)
        case "multislerp":
            return _simplified_multislerp(bound, place)
        case "karcher":
            return _copy_of(bound.models[0]) if len(bound.models) == 1 else bound
        case "passthrough" | "model_stock":
            return bound
        case "sce":
            return _simplified_sce(bound)
        case "regmean" | "fisher":
            return _simplified_ratios(bound)
        case "consensus_ta":
            return _simplified_consensus_ta(bound)
        case "nearswap":
            assert bound.base is not None
            return bound if bound.number("t") > 0 else _copy_of(bound.base)
        case "ram" | "arcee_fusion":
            return bound
        case "ramplus_tl":
            return _simplified_ramplus(bound)
        case _:
            return _simplified_task_vectors(bound)


def _simplified_linear(bound: Bound, place: str) -> Bound:
    weights = bound.per_model("weight")
    if bound.values["normalize"]:
        total = sum(weights)
        if total == 0:
            raise BadInput(f"{place}: the weights sum to zero and normalize divides by the sum; set normalize: false")
        weights = tuple(weight / total for weight in weights)
    models, weights = _without_zeros(bound.models, weights)
    if weights == (1,):
        return _copy_of(models[0])
    if not models:
        return Bound("passthrough", bound.models[:1], None, {"scale": (Fraction(0),)})
    return Bound("linear", models, None, {"weight": weights, "normalize": False})


def _simplified_slerp(bound: Bound) -> Bound:
    assert bound.base is not None
    others = [name for name in bound.models if name != bound.base]
    if bound.number("t") == 0 or not others:
        return _copy_of(bound.base)
    if bound.number("t") == 1:
        return _copy_of(others[0])
    return Bound("slerp", (bound.base, others[0]), bound.base, {"t": bound.number("t")})


def _simplified_nuslerp(bound: Bound) -> Bound:
    weights, values = bound.per_model("weight"), bound.values
    total = sum(weights)
    part = Fraction(1, 2) if abs(total) < Fraction(1, 10**6) else weights[1] / total
    if part in (0, 1):
        return _copy_of(bound.models[int(part)])
    row_wise = values["nuslerp_row_wise"] and not values["nuslerp_flatten"]
    return replace(bound, values={**values, "weight": (1 - part, part), "nuslerp_row_wise": bool(row_wise)})


def _simplified_multislerp(bound: Bound, place: str) -> Bound:
    models, weights = bound.models, bound.per_model("weight")
    if len(models) == 1:
        return _copy_of(models[0])
    if bound.values["normalize_weights"]:
        total = sum(weights)
        if total == 0:
            remedy = "set normalize_weights: false"
            raise BadInput(f"{place}: the weights sum to zero and normalize_weights divides by the sum; {remedy}")
        weights = tuple(weight / total for weight in weights)
    taken, of_taken = _without_zeros(models, weights)
    if of_taken == (1,) and abs(bound.number("eps")) <= Fraction(1, 10**8):  # its cosine is 1 in float64
        return _copy_of(taken[0])
    if len(taken) > 1:
        models, weights = taken, of_taken
    return replace(bound, models=models, values={**bound.values, "weight": weights, "normalize_weights": False})


def _simplified_task_vectors(bound: Bound) -> Bound:
    """Weight 0 leaves, density 1 trims nothing, and a plain sum takes its divisor and λ into the weights."""
    assert bound.base is not None
    elects = bound.method in ("ties", "dare_ties", "breadcrumbs_ties", "della")
    weights, scale = bound.per_model("weight"), bound.number("lambda")
    total = sum(weights)
    normalize = bool(bound.values["normalize"])
    if not elects:
        divisor = total if normalize and abs(total) >= Fraction(1, 10**8) else Fraction(1)
        weights, scale, normalize = tuple(weight * scale / divisor for weight in weights), Fraction(1), False
    models, kept_weights = _without_zeros(bound.models, weights)
    if not models or scale == 0:
        return _copy_of(bound.base)
    values: dict[str, Exact | tuple[Exact, ...]] = {"weight": kept_weights, "normalize": normalize, "lambda": scale}
    densities, _ = _without_zeros(bound.per_model("density"), weights)
    if bound.method == "task_arithmetic" or all(density == 1 for density in densities):
        if elects:
            values["density"] = densities
        return Bound("ties" if elects else "task_arithmetic", models, bound.base, values)
    values["density"] = densities
    values["rescale"] = bound.values["rescale"]
    for name in {"gamma", "epsilon"} & bound.values.keys():
        shares, _ = _without_zeros(bound.per_model(name), weights)
        values[name] = tuple(
            share if density < 1 else Fraction(0) for share, density in zip(shares, densities, strict=True)
        )
    return Bound(bound.method, models, bound.base, values)


def _simplified_sce(bound: Bound) -> Bound:
    """The variance of one model is zero: all of its task vector is selected, or nothing."""
    assert bound.base is not None
    share = bound.number("select_topk")
    if len(bound.models) > 1:
        return Bound("sce", bound.models, bound.base, {"select_topk": share})
    if share < 1:
        return _copy_of(bound.base)
    values: dict[str, Exact | tuple[Exact, ...]] = {"weight": (Fraction(1),), "normalize": False, "lambda": Fraction(1)}
    return Bound("task_arithmetic", bound.models, bound.base, values)


def _simplified_consensus_ta(bound: Bound) -> Bound:
    """Weight 0 leaves; fewer than k models never agree."""
    assert bound.base is not None
    weights = bound.per_model("weight")
    models, kept_weights = _without_zeros(bound.models, weights)
    if bound.number("lambda") == 0 or len(models) < bound.number("k"):
        return _copy_of(bound.base)
    ratios, _ = _without_zeros(bound.per_model("tall_lambda"), weights)
    values = {**bound.values, "weight": kept_weights, "tall_lambda": ratios}
    return Bound("consensus_ta", models, bound.base, values)


def _simplified_ratios(bound: Bound) -> Bound:
    """The weights count by their ratios; weight 0 leaves."""
    models, weights = _without_zeros(bound.models, bound.per_model("weight"))
    if len(models) == 1:
        return _copy_of(models[0])
    total = sum(weights)
    return replace(bound, models=models, values={**bound.values, "weight": tuple(each / total for each in weights)})


def _simplified_ramplus(bound: Bound) -> Bound:
    """Where λᵢ is 1 for every count, it is ram."""
    if len(bound.models) > 1 and bound.number("r") != 0 and bound.number("alpha") != 0:
        return bound
    return Bound("ram", bound.models, bound.base, {"epsilon": bound.values["epsilon"]})


def _copy_of(model: str) -> Bound:
    return Bound("passthrough", (model,), None, {"scale": (Fraction(1),)})


Kept = TypeVar("Kept")


def _without_zeros(
    models: tuple[Kept, ...], weights: tuple[Fraction, ...]
) -> tuple[tuple[Kept, ...], tuple[Fraction, ...]]:
    """The models whose weight is not zero, and those weights."""
    kept = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight != 0]
    return tuple(model for model, _ in kept), tuple(weight for _, weight in kept)
