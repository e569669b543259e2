"""A recipe: one mergekit document, strictly read; and its template, where `${…}` waits for a point of the grid.

The document's grammar is mergekit's: `merge_method`, `models` or `slices` or `modules`, `base_model`, `parameters`,
`dtype`, `out_dtype`, `tokenizer_source`, `chat_template`. Cases that mergekit ignores silently (unknown keys, the same
model twice) are refused here; of a document that was written for mergekit, strange keys are left out, and said. Which
methods and parameters exist is not known in this package: every `Recipe` and `Source` carries its place, so that
planning can still point at the line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobs.aim import Aim, AimTemplate, aim_schema, aim_template
from jobs.errors import BadInput
from jobs.expressions import Bindings, Template
from jobs.measured import Files, FilesTemplate, bound_files, files_schema, files_template
from jobs.slices import (
    Module,
    ModuleTemplate,
    Slice,
    SliceTemplate,
    bases_of,
    check_models,
    modules_schema,
    parts_document,
    read_modules,
    read_slices,
    slices_schema,
    sources_of,
)
from jobs.sources import (
    LATER,
    Reader,
    Setting,
    Slot,
    Source,
    SourceTemplate,
    bound_parameters,
    bound_text,
    filled,
    model_name,
    parameters_schema,
    plain_parameters,
    reference_schema,
    source_schema,
)
from jobs.tokenizers import TokenizerSettings, TokenizerTemplate, tokenizer_schema, tokenizer_template
from jobs.trajectories import NO_TRAJECTORIES, Trajectories, one_of
from jobs.yaml_nodes import Node, quoted, suggestion

KEYS = {
    "merge_method": "`linear`, `ties`, …",
    "models": "the parents to merge, each once",
    "slices": "in place of `models`: ranges of layers, stacked in this order",
    "modules": "in place of `models`: models or slices for each module of the model",
    "base_model": "the model that task vectors are differences from",
    "parameters": "settings for all models",
    "dtype": "of the output; the default is that of the parents",
    "out_dtype": "of the output, in place of `dtype`",
    "tokenizer_source": "whose vocabulary the output has: `union`, `base` or a model",
    "tokenizer": "the same as a block, with sources of single tokens",
    "chat_template": "a template in place of the tokenizer's: `auto`, a name or Jinja text",
    "aim": "statistics of the base's activations, which shrink task vectors",
    "grams": "for each model, the Gram matrices of its inputs, which `regmean` needs",
    "fisher": "for each model, its Fisher information, which `fisher` needs",
    "name": "a label, which is not used",
}
"""The keys of a recipe and their meanings."""
PARTS = ("models", "slices", "modules")
"""The keys that say which models go in; a recipe has one of them."""
DTYPES = ("float32", "float16", "bfloat16", "float64")
CHAT_TEMPLATES = ("auto", "alpaca", "chatml", "exaone", "llama3", "mistral")
"""mergekit's names of chat templates; `auto` is the commonest of the parents' own."""
REFUSED_KEYS = {
    "config_from": "it stands beside `recipe:` in a job; `mergeyard merge` has the option `--config-from`",
    **dict.fromkeys(
        ("gate_mode", "experts", "experts_per_token", "shared_experts"),
        "it builds a mixture of experts: run `mergeyard moe CONFIG OUT`",
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """One merge with every value bound. Two recipes are equal when they ask for the same merge, wherever they stand.

    Either `models` or `slices` or `modules` has entries.
    A `foreign` one was written for mergekit: of keys and parameters without effect only `ignored` tells, in sentences.
    """

    merge_method: str
    models: tuple[Source, ...] = ()
    base_model: str | None = None
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    chat_template: str | None = None
    tokenizer: TokenizerSettings | None = field(default=None, metadata=LATER)
    aim: Aim | None = field(default=None, metadata=LATER)
    grams: Files | None = field(default=None, metadata=LATER)
    fisher: Files | None = field(default=None, metadata=LATER)
    slices: tuple[Slice, ...] = field(default=(), metadata=LATER)
    modules: tuple[Module, ...] = field(default=(), metadata=LATER)
    place: str = field(compare=False)
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    foreign: bool = field(default=False, compare=False)
    ignored: tuple[str, ...] = field(default=(), compare=False)

    def document(self) -> dict[str, Any]:
        """The plain mergekit document (for `mergekit_config.yml`): whole numbers as int, others as float."""
        document: dict[str, Any] = {"merge_method": self.merge_method}
        if self.base_model is not None:
            document["base_model"] = self.base_model
        document |= parts_document(self.models, self.slices)
        if self.modules:
            document["modules"] = {module.name: module.document() for module in self.modules}
        if self.parameters:
            document["parameters"] = plain_parameters(self.parameters)
        for key in ("dtype", "out_dtype", "tokenizer_source", "chat_template"):
            if (value := getattr(self, key)) is not None:
                document[key] = value
        if self.tokenizer is not None:
            document["tokenizer"] = self.tokenizer.document(document.pop("tokenizer_source"))
        if self.aim is not None:
            document["aim"] = self.aim.document()
        for key, files in (("grams", self.grams), ("fisher", self.fisher)):
            if files is not None:
                document[key] = dict(files)
        return document

    def references(self) -> tuple[str, ...]:
        """Every model and the base, once each, in order of first appearance."""
        base = () if self.base_model is None else (self.base_model,)
        listed = (source.model for source in self.sources())
        return tuple(dict.fromkeys((*listed, *bases_of(self.slices, self.modules), *base)))

    def sources(self) -> tuple[Source, ...]:
        """Every model that goes in, of slices and modules too, in the order of the document."""
        return (*self.models, *sources_of(self.slices, self.modules))

    def residual_weights(self) -> tuple[str, ...]:
        """The places of `residual_weight:`, which mergekit reads and does not use."""
        parts = (*self.slices, *(part for module in self.modules for part in module.slices))
        return tuple(part.places["residual_weight"] for part in parts if "residual_weight" in part.places)

    def parents(self) -> tuple[str, ...]:
        """The references, and a model that gives its tokenizer alone."""
        named = self.tokenizer_source
        return tuple(dict.fromkeys((*self.references(), *([] if named in (None, "base", "union") else [named]))))

    def place_of(self, name: str) -> str:
        """Where a key of the document or a parameter is set: at the top, else at the first model that sets it."""
        if name in self.places:
            return self.places[name]
        return next((source.places[name] for source in self.sources() if name in source.places), self.place)


@dataclass(frozen=True, slots=True, kw_only=True)
class RecipeTemplate:
    """A checked recipe whose placeholders wait for values; `bind` is cheap."""

    texts: Mapping[str, str | Template]
    models: tuple[SourceTemplate, ...]
    slices: tuple[SliceTemplate, ...]
    modules: tuple[ModuleTemplate, ...]
    parameters: Mapping[str, Slot]
    chat_template: str | Template | None
    tokenizer: TokenizerTemplate | None
    aim: AimTemplate | None
    grams: FilesTemplate | None
    fisher: FilesTemplate | None
    place: str
    places: Mapping[str, str]
    placeholders: tuple[Template, ...]
    foreign: bool = False
    ignored: tuple[str, ...] = ()

    def bind(self, bindings: Bindings, trajectories: Trajectories = NO_TRAJECTORIES) -> Recipe:
        """The recipe at one point, the windows of `trajectories` as the models that they hold."""
        texts = {key: bound_text(text, bindings) for key, text in self.texts.items()}
        texts |= {key: one_of(texts[key], trajectories, self.places[key]) for key in _MODEL_KEYS if key in texts}
        if self.foreign:
            texts |= {key: texts[key].removeprefix("torch.") for key in ("dtype", "out_dtype") if key in texts}
        block, template = self.tokenizer, self.chat_template
        source, settings = (
            (texts.get("tokenizer_source"), None) if block is None else block.bind(bindings, trajectories)
        )
        recipe = Recipe(
            merge_method=texts["merge_method"],
            models=tuple(model for source in self.models for model in source.window(bindings, trajectories)),
            slices=tuple(part.bind(bindings, trajectories) for part in self.slices),
            modules=tuple(module.bind(bindings, trajectories) for module in self.modules),
            base_model=texts.get("base_model"),
            parameters=bound_parameters(self.parameters, bindings),
            dtype=texts.get("dtype"),
            out_dtype=texts.get("out_dtype"),
            tokenizer_source=None if source is None else source.removeprefix("model:"),  # as mergekit 0.0 had it
            chat_template=None if template is None else bound_text(template, bindings),
            tokenizer=settings,
            aim=None if self.aim is None else self.aim.bind(bindings),
            grams=None if self.grams is None else bound_files(self.grams, bindings),
            fisher=None if self.fisher is None else bound_files(self.fisher, bindings),
            place=self.place,
            places=self.places,
            foreign=self.foreign,
            ignored=self.ignored,
        )
        _check(recipe)
        return recipe


def recipe_template(node: Node, *, foreign: bool = False) -> RecipeTemplate:
    """The recipe that stands at `node`, its form checked, its placeholders kept.

    Of a `foreign` one, a document for mergekit, unknown keys are left out, unless they look misspelt.
    """
    for key, remedy in REFUSED_KEYS.items():
        if isinstance(node.value, Mapping) and key in node.value:
            raise node.value[key].error(f"`{key}:` is not accepted: {remedy}")
    node = node.without_anchors(KEYS)
    reader = Reader(foreign=foreign)
    keys = filled(reader.keys(node, KEYS, ("merge_method",)))
    if foreign:  # a key without entries, or with an empty text, is none to mergekit
        keys = {key: value for key, value in keys.items() if key not in _MAY_BE_EMPTY or value.value}
    texts = {
        key: reader.text(model_name(keys[key]) if key in _MODEL_KEYS else keys[key])
        for key in _TEXT_KEYS
        if key in keys
    }
    if "merge_method" not in texts:
        raise node.error('"merge_method" must have a value')
    given = [key for key in PARTS if key in keys]
    if not given:
        raise node.error("a recipe needs the key `models`, `slices` or `modules`")
    if len(given) > 1:
        raise keys[given[1]].error(f"`{given[0]}` and `{given[1]}` exclude each other; take one out")
    if "name" in keys:
        keys["name"].string()
    if "tokenizer" in keys and "tokenizer_source" in keys:
        raise keys["tokenizer"].error("`tokenizer:` and `tokenizer_source:` exclude each other; keep one")
    models = tuple(reader.source(model) for model in keys["models"].sequence()) if "models" in keys else ()
    slices, modules = read_slices(keys.get("slices"), reader), read_modules(keys.get("modules"), reader)
    parameters, parameter_places = reader.parameters(keys.get("parameters"))
    return RecipeTemplate(
        texts=texts,
        models=models,
        slices=slices,
        modules=modules,
        parameters=parameters,
        chat_template=_chat_template(keys["chat_template"], reader) if "chat_template" in keys else None,
        tokenizer=tokenizer_template(keys["tokenizer"], reader) if "tokenizer" in keys else None,
        aim=aim_template(keys["aim"], reader) if "aim" in keys else None,
        grams=files_template("grams", keys["grams"], reader) if "grams" in keys else None,
        fisher=files_template("fisher", keys["fisher"], reader) if "fisher" in keys else None,
        place=node.place,
        places={key: value.place for key, value in keys.items()} | parameter_places,
        placeholders=tuple(reader.placeholders),
        foreign=foreign,
        ignored=tuple(reader.ignored),
    )


def plain_recipe(node: Node) -> Any:
    """The recipe at `node` as plain data, without the keys that only hold anchors."""
    return node.without_anchors(KEYS).plain()


def recipe_schema() -> dict[str, Any]:
    """The JSON Schema of a recipe; its methods and their parameters are not known here."""
    dtype = {"anyOf": [{"enum": [*DTYPES, None]}, {"type": "string", "pattern": r"\$\{"}]}
    model = {"anyOf": [*reference_schema()["anyOf"], {"type": "null"}]}
    known = {
        "merge_method": {"type": "string", "minLength": 1},
        "models": {"type": "array", "items": source_schema(), "minItems": 1},
        "slices": slices_schema(),
        "modules": modules_schema(),
        "parameters": parameters_schema(),
        "base_model": model,
        "dtype": dtype,
        "out_dtype": dtype,
        "chat_template": {
            "anyOf": [{"enum": [*CHAT_TEMPLATES, None]}, {"type": "string", "pattern": rf"{_JINJA.pattern}|^\$\{{"}]
        },
        "tokenizer_source": model,
        "tokenizer": tokenizer_schema(),
        "aim": aim_schema(),
        "grams": files_schema(),
        "fisher": files_schema(),
    }
    text = {"type": ["string", "null"]}
    return {
        "type": "object",
        "properties": {key: {**known.get(key, text), "description": meaning} for key, meaning in KEYS.items()},
        "required": ["merge_method"],
        "oneOf": [{"required": [key]} for key in PARTS],
        "additionalProperties": False,
    }


_JINJA = re.compile(r"\{[{%]")
_TEXT_KEYS = ("merge_method", "base_model", "dtype", "out_dtype", "tokenizer_source")

_MODEL_KEYS = ("base_model", "tokenizer_source")
_MAY_BE_EMPTY = (*PARTS, "dtype", "out_dtype", "chat_template")


def _chat_template(node: Node, reader: Reader) -> str | Template:
    """A name or Jinja text; one placeholder alone is the value of an axis, since `${` is also Jinja's."""
    return reader.text(node) if re.fullmatch(r"\$\{[^{}]*\}", node.string()) else node.string()


def _check(recipe: Recipe) -> None:
    references = recipe.references()
    check_models(recipe.models)
    for key, dtype in (("dtype", recipe.dtype), ("out_dtype", recipe.out_dtype)):
        if dtype is not None and dtype not in DTYPES:
            raise BadInput(f"{recipe.place_of(key)}: {key} cannot be {quoted(dtype)}; choose from {', '.join(DTYPES)}")
    if recipe.tokenizer is not None:
        _check_token_sources(recipe, recipe.tokenizer, references)
    template = recipe.chat_template
    if template is not None and template not in CHAT_TEMPLATES and not _JINJA.search(template):
        place, near = recipe.place_of("chat_template"), suggestion(template.strip().lower(), CHAT_TEMPLATES)
        raise BadInput(f"{place}: chat_template {quoted(template)} is neither a name nor Jinja text{near}")


def _check_token_sources(recipe: Recipe, settings: TokenizerSettings, references: tuple[str, ...]) -> None:
    for token, source in settings.tokens.items():
        if source is not None and source.model is not None and source.model not in references:
            near = suggestion(source.model, references)
            raise BadInput(
                f"{source.place}: the row of the token {quoted(token)} comes from {quoted(source.model)}, which is not"
                f" a model of the recipe{near}"
            )
