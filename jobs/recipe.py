"""A recipe: one mergekit document, strictly read; and its template, where `${…}` waits for a point of the grid.

The document's grammar is mergekit's for whole models: `merge_method`, `models`, `base_model`, `parameters`, `dtype`,
`out_dtype`, `tokenizer_source`, `chat_template`. Cases that mergekit ignores silently (unknown keys, the same model
twice) is refused here. Which methods and parameters exist is not known in this package: every `Recipe` and `Source`
carries its place, so that planning can still point at the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from jobs.errors import BadInput
from jobs.expressions import Bindings, Template, template
from jobs.yaml_nodes import NUMBER, Node, quoted, suggestion

Scalar = Fraction | bool | str
Gradient = tuple[Fraction, ...] | tuple[bool, ...]
KEYS = {
    "merge_method": "`linear`, `ties`, …",
    "models": "the parents to merge, each once",
    "base_model": "the model that task vectors are differences from",
    "parameters": "settings for all models",
    "dtype": "of the output; the default is that of the parents",
    "out_dtype": "of the output, in place of `dtype`",
    "tokenizer_source": "the model whose tokenizer is copied",
    "chat_template": "a template in place of the tokenizer's: `auto`, a name or Jinja text",
    "name": "a label, which is not used",
}
"""The keys of a recipe and their meanings."""
DTYPES = ("float32", "float16", "bfloat16")
CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
"""mergekit's names of chat templates; `auto` is the commonest of the parents' own."""
REFUSED_KEYS = {
    "slices": "mergeyard merges whole models: list them under `models:` with the same parameters, "
    "and set a layer apart with a gradient or a `{filter, value}`",
    "modules": "mergeyard merges whole models: list them under `models:`; a `{filter, value}` sets a module apart",
    "config_from": "it stands beside `recipe:` in a job; `mergeyard merge` has the option `--config-from`",
    **dict.fromkeys(
        ("gate_mode", "experts", "experts_per_token", "shared_experts"),
        "it belongs to mergekit-moe, which builds a mixture of experts; mergeyard merges models of one architecture",
    ),
    "tokenizer": "mergeyard copies one parent's tokenizer as it is: write `tokenizer_source: base`, or name a model",
}


@dataclass(frozen=True, slots=True)
class Filtered:
    """A value for the tensors whose name contains `filter`; None or `*` is every tensor."""

    filter: str | None
    value: Scalar | Gradient


Setting = Scalar | Gradient | tuple[Filtered, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One model that goes in, and the parameters that are its own."""

    model: str
    parameters: Mapping[str, Setting]
    place: str = field(compare=False)
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def place_of(self, parameter_name: str) -> str:
        """Where that parameter is set, or where this model is named."""
        return self.places.get(parameter_name, self.place)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One merge with every value bound. Two recipes are equal when they ask for the same merge, wherever they stand."""

    merge_method: str
    models: tuple[Source, ...]
    base_model: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    place: str = field(compare=False)
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)

    def document(self) -> dict[str, Any]:
        """The plain mergekit document (for `mergekit_config.yml`): whole numbers as int, others as float."""
        document: dict[str, Any] = {"merge_method": self.merge_method}
        if self.base_model is not None:
            document["base_model"] = self.base_model
        document["models"] = [_source_document(source) for source in self.models]
        if self.parameters:
            document["parameters"] = {name: _plain(setting) for name, setting in self.parameters.items()}
        for key in ("dtype", "out_dtype", "tokenizer_source", "chat_template"):
            if (value := getattr(self, key)) is not None:
                document[key] = value
        return document

    def references(self) -> tuple[str, ...]:
        """Every model and the base, once each, in order of first appearance."""
        base = () if self.base_model is None else (self.base_model,)
        return tuple(dict.fromkeys((*(source.model for source in self.models), *base)))

    def place_of(self, name: str) -> str:
        """Where a key of the document or a parameter is set: at the top, else at the first model that sets it."""
        if name in self.places:
            return self.places[name]
        return next((source.places[name] for source in self.models if name in source.places), self.place)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTemplate:
    """A checked recipe whose placeholders wait for values; `bind` is cheap."""

    texts: Mapping[str, str | Template]
    models: tuple[_SourceTemplate, ...]
    parameters: Mapping[str, _Slot]
    chat_template: str | None
    place: str
    places: Mapping[str, str]
    placeholders: tuple[Template, ...]

    def bind(self, bindings: Bindings) -> Recipe:
        """The recipe at one point."""
        texts = {key: _bound_text(text, bindings) for key, text in self.texts.items()}
        recipe = Recipe(
            merge_method=texts["merge_method"],
            models=tuple(source.bind(bindings) for source in self.models),
            base_model=texts.get("base_model"),
            parameters=_bound_parameters(self.parameters, bindings),
            dtype=texts.get("dtype"),
            out_dtype=texts.get("out_dtype"),
            tokenizer_source=texts.get("tokenizer_source"),
            chat_template=self.chat_template,
            place=self.place,
            places=self.places,
        )
        _check(recipe)
        return recipe


@dataclass(frozen=True, slots=True)
class _FilteredTemplate:
    filter: str | Template | None
    value: _ValueSlot


@dataclass(frozen=True, slots=True)
class _SourceTemplate:
    model: str | Template
    parameters: Mapping[str, _Slot]
    place: str
    places: Mapping[str, str]

    def bind(self, bindings: Bindings) -> Source:
        return Source(
            model=_bound_text(self.model, bindings),
            parameters=_bound_parameters(self.parameters, bindings),
            place=self.place,
            places=self.places,
        )


_ValueSlot = Scalar | Template | tuple[Fraction | Template, ...] | tuple[bool, ...]
_Slot = _ValueSlot | tuple[_FilteredTemplate, ...]


def setting_at(setting: Setting, *, tensor_name: str, position: float | Fraction) -> Scalar | None:
    """The value of `setting` for one tensor; None if no filter matches, so that the next level applies.

    `position` is the layer's index / (layers − 1): 0 for embeddings, final norm and head, 1 for a one-layer model. A
    float is taken for the fraction it stands for, so gradients are exact. A gradient's n values lie at equal distances
    over 0…1, with straight lines between; booleans hold up to the next one. Of a filter list, the first entry whose
    text the tensor's name contains wins.
    """
    if not isinstance(setting, tuple):
        return setting
    for part in setting:
        if not isinstance(part, Filtered):
            break
        if part.filter in (None, "*") or part.filter in tensor_name:
            return _interpolated(part.value, position) if isinstance(part.value, tuple) else part.value
    else:
        return None
    return _interpolated(setting, position)  # pyright: ignore[reportArgumentType]  (a tuple is of one kind throughout)


def recipe_template(node: Node) -> RecipeTemplate:
    """The recipe that stands at `node`, its form checked, its placeholders kept."""
    for key, remedy in REFUSED_KEYS.items():
        if isinstance(node.value, Mapping) and key in node.value:
            raise node.value[key].error(f"`{key}:` is not accepted: {remedy}")
    node = node.without_anchors(KEYS)
    keys = {
        key: value for key, value in node.mapping(KEYS, ("merge_method", "models")).items() if value.kind != "nothing"
    }
    reader = _Reader()
    texts = {
        key: reader.text(_model_name(keys[key]) if key in _MODEL_KEYS else keys[key])
        for key in _TEXT_KEYS
        if key in keys
    }
    if "merge_method" not in texts or "models" not in keys:
        raise node.error('"merge_method" and "models" must have a value')
    if "name" in keys:
        keys["name"].string()
    models = tuple(reader.source(model) for model in keys["models"].sequence())
    parameters, parameter_places = reader.parameters(keys.get("parameters"))
    return RecipeTemplate(
        texts=texts,
        models=models,
        parameters=parameters,
        chat_template=keys["chat_template"].string() if "chat_template" in keys else None,
        place=node.place,
        places={key: value.place for key, value in keys.items()} | parameter_places,
        placeholders=tuple(reader.placeholders),
    )


def plain_recipe(node: Node) -> Any:
    """The recipe at `node` as plain data, without the keys that only hold anchors."""
    return node.without_anchors(KEYS).plain()


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe; its methods and their parameters are not known here."""
    scalar = {"type": ["number", "boolean", "string"]}
    value = {"anyOf": [scalar, {"type": "array", "items": {"type": ["number", "boolean", "string"]}, "minItems": 1}]}
    filtered = {
        "type": "object",
        "properties": {"filter": {"type": ["string", "null"]}, "value": value},
        "required": ["value"],
        "additionalProperties": False,
    }
    setting = {"anyOf": [*value["anyOf"], filtered, {"type": "array", "items": filtered, "minItems": 1}]}
    parameters = {"type": ["object", "null"], "additionalProperties": setting}
    named = {"type": "string", "minLength": 1}
    path = {"type": "object", "properties": {"path": named, "revision": {"type": ["string", "null"]}}}
    long = {"type": "object", "properties": {"model": {"anyOf": [named, path]}}, "required": ["model"]}
    reference = {"anyOf": [named, long]}
    model = {
        "type": "object",
        "properties": {"model": reference, "parameters": parameters},
        "required": ["model"],
        "additionalProperties": False,
    }
    dtype = {"anyOf": [{"enum": [*DTYPES, None]}, {"type": "string", "pattern": r"\$\{"}]}
    known = {
        "merge_method": {"type": "string", "minLength": 1},
        "models": {"type": "array", "items": model, "minItems": 1},
        "parameters": parameters,
        "base_model": {"anyOf": [*reference["anyOf"], {"type": "null"}]},
        "dtype": dtype,
        "out_dtype": dtype,
        "chat_template": {"anyOf": [{"enum": [*CHAT_TEMPLATES, None]}, {"type": "string", "pattern": _JINJA.pattern}]},
    }
    text = {"type": ["string", "null"]}
    return {
        "type": "object",
        "properties": {key: {**known.get(key, text), "description": meaning} for key, meaning in KEYS.items()},
        "required": ["merge_method", "models"],
        "additionalProperties": False,
    }


_JINJA = re.compile(r"\{[{%]")
_TEXT_KEYS = ("merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source")

_MODEL_KEYS = ("base_model", "tokenizer_source")


class _Reader:
    """Reads the parts of a recipe and remembers every placeholder it met."""

    def __init__(self) -> None:
        self.placeholders: list[Template] = []

    def text(self, node: Node) -> str | Template:
        """Text, or a template of text."""
        text = node.string()
        parsed = template(text, node.place)
        if parsed is None:
            return text
        self.placeholders.append(parsed)
        return parsed

    def source(self, node: Node) -> _SourceTemplate:
        """One entry of `models:`."""
        if isinstance(node.value, Mapping) and "revision" in node.value:
            raise node.value["revision"].error(
                "`revision:` stands after the model's name: write `model: organisation/name@revision`"
            )
        keys = node.mapping(("model", "parameters"), ("model",))
        parameters, places = self.parameters(keys.get("parameters"))
        return _SourceTemplate(self.text(_model_name(keys["model"])), parameters, keys["model"].place, places)

    def parameters(self, node: Node | None) -> tuple[dict[str, _Slot], dict[str, str]]:
        """The settings by name, and where each stands."""
        if node is None or node.kind == "nothing":
            return {}, {}
        settings = node.mapping()
        return (
            {name: self._setting(setting) for name, setting in settings.items()},
            {name: setting.place for name, setting in settings.items()},
        )

    def _setting(self, node: Node) -> _Slot:
        if node.kind == "mapping":
            return (self._filtered(node),)
        if node.kind == "list" and node.sequence()[0].kind == "mapping":
            return tuple(self._filtered(entry) for entry in node.sequence())
        return self._value(node)

    def _filtered(self, node: Node) -> _FilteredTemplate:
        keys = node.mapping(("filter", "value"), ("value",))
        unfiltered = "filter" not in keys or keys["filter"].kind == "nothing"
        return _FilteredTemplate(None if unfiltered else self.text(keys["filter"]), self._value(keys["value"]))

    def _value(self, node: Node) -> _ValueSlot:
        if node.kind == "list":
            if all(entry.kind == "boolean" for entry in node.sequence()):
                return tuple(entry.boolean() for entry in node.sequence())
            return tuple(self._gradient_value(entry) for entry in node.sequence())
        if node.kind == "number":
            return node.number()
        if node.kind == "boolean":
            return node.boolean()
        number = _number_in_quotes(node)
        return self.text(node) if number is None else number

    def _gradient_value(self, node: Node) -> Fraction | Template:
        if node.kind == "string" and isinstance(parsed := self.text(node), Template):
            return parsed
        number = _number_in_quotes(node)
        return node.number() if number is None else number


def _model_name(node: Node) -> Node:
    """The text of a model, also of mergekit's long form `{model: {path: NAME, revision: REVISION}}`."""
    if node.kind != "mapping":
        return node
    refused = {"lora": "a LoRA adapter is not applied: merge it into its base first, and name the result"}
    refused["override_architecture"] = "an architecture is not overridden: take the key out"
    for key, remedy in refused.items():
        value = node.mapping().get(key)
        if value is not None and value.kind != "nothing":
            raise value.error(f"`{key}:` is not accepted: {remedy}")
    name = node.mapping(("model", *refused), ("model",))["model"]
    if name.kind != "mapping":
        return name
    parts = name.mapping(("path", "revision"), ("path",))
    if "revision" not in parts or parts["revision"].kind == "nothing":
        return parts["path"]
    return replace(parts["path"], value=f"{parts['path'].string()}@{parts['revision'].string()}")


def _number_in_quotes(node: Node) -> Fraction | None:
    """The number of `"0.5"`, which mergekit takes as well."""
    text = node.string() if node.kind == "string" else ""
    return replace(node, value=text.strip(), quoted=False).number() if NUMBER.fullmatch(text.strip()) else None


def _bound_text(text: str | Template, bindings: Bindings) -> str:
    return text if isinstance(text, str) else text.render(bindings)


def _bound_parameters(parameters: Mapping[str, _Slot], bindings: Bindings) -> dict[str, Setting]:
    return {name: _bound(slot, bindings) for name, slot in parameters.items()}


def _bound(slot: _Slot, bindings: Bindings) -> Setting:
    if isinstance(slot, tuple) and isinstance(slot[0], _FilteredTemplate):
        return tuple(_bound_filtered(part, bindings) for part in slot if isinstance(part, _FilteredTemplate))
    return _bound_value(slot, bindings)  # pyright: ignore[reportArgumentType]  (a tuple is of one kind throughout)


def _bound_filtered(part: _FilteredTemplate, bindings: Bindings) -> Filtered:
    text = None if part.filter is None else _bound_text(part.filter, bindings)
    return Filtered(text, _bound_value(part.value, bindings))


def _bound_value(slot: _ValueSlot, bindings: Bindings) -> Scalar | Gradient:
    if isinstance(slot, Template):
        return slot.bind(bindings)
    if isinstance(slot, tuple):
        return tuple(_bound_number(part, bindings) for part in slot)  # pyright: ignore[reportReturnType]
    return slot


def _bound_number(slot: Fraction | bool | Template, bindings: Bindings) -> Fraction | bool:
    value = slot.bind(bindings) if isinstance(slot, Template) else slot
    if isinstance(value, str):
        place = slot.place if isinstance(slot, Template) else ""
        raise BadInput(f"{place}: a gradient holds numbers, not {quoted(value)}")
    return value


def _check(recipe: Recipe) -> None:
    references = recipe.references()
    if len({source.model for source in recipe.models}) != len(recipe.models):
        _refuse_repeated_model(recipe)
    for key, dtype in (("dtype", recipe.dtype), ("out_dtype", recipe.out_dtype)):
        if dtype is not None and dtype not in DTYPES:
            raise BadInput(f"{recipe.place_of(key)}: {key} cannot be {quoted(dtype)}; choose from {', '.join(DTYPES)}")
    if recipe.tokenizer_source is not None:
        _check_tokenizer_source(recipe, recipe.tokenizer_source, references)
    template = recipe.chat_template
    if template is not None and template not in CHAT_TEMPLATES and not _JINJA.search(template):
        place, near = recipe.place_of("chat_template"), suggestion(template.strip().lower(), CHAT_TEMPLATES)
        raise BadInput(f"{place}: chat_template {quoted(template)} is neither a name nor Jinja text{near}")


def _refuse_repeated_model(recipe: Recipe) -> None:
    seen: set[str] = set()
    for source in recipe.models:
        if source.model in seen:
            message = "is listed twice; list it once, with the sum of the weights"
            raise BadInput(f"{source.place}: the model {quoted(source.model)} {message}")
        seen.add(source.model)


def _check_tokenizer_source(recipe: Recipe, tokenizer_source: str, references: tuple[str, ...]) -> None:
    place = recipe.place_of("tokenizer_source")
    if tokenizer_source == "union":
        reason = "it changes the vocabulary and the rows of the embeddings"
        raise BadInput(f"{place}: tokenizer_source union is not accepted: {reason}; write `base` or name a model")
    if tokenizer_source == "base" and recipe.base_model is None:
        raise BadInput(
            f"{place}: tokenizer_source is base and the recipe has no base_model; name a model of the recipe"
        )
    if tokenizer_source not in ("base", *references):
        near = suggestion(tokenizer_source, ("base", *references))
        raise BadInput(f"{place}: tokenizer_source {quoted(tokenizer_source)} is not a model of the recipe{near}")


def _interpolated(gradient: Gradient, position: float | Fraction) -> Fraction | bool:
    # idx / (layers − 1) arrives as a float; the nearest fraction with a small denominator is the one that was meant
    exact = position if isinstance(position, Fraction) else Fraction(position).limit_denominator(1_000_000)
    scaled = exact * (len(gradient) - 1)
    left = min(int(scaled), len(gradient) - 1)
    if isinstance(gradient[left], bool):
        return gradient[left]
    right = min(left + 1, len(gradient) - 1)
    return gradient[left] + (gradient[right] - gradient[left]) * (scaled - left)


def _source_document(source: Source) -> dict[str, Any]:
    document: dict[str, Any] = {"model": source.model}
    if source.parameters:
        document["parameters"] = {name: _plain(setting) for name, setting in source.parameters.items()}
    return document


def _plain(setting: Setting | Filtered) -> Any:
    if isinstance(setting, Fraction):
        return setting.numerator if setting.denominator == 1 else float(setting)
    if isinstance(setting, tuple):
        return [_plain(part) for part in setting]
    if isinstance(setting, Filtered):
        named = {} if setting.filter is None else {"filter": setting.filter}
        return named | {"value": _plain(setting.value)}
    return setting
