"""Slices and modules of a recipe: which layers of which models are merged into which layers of the output.

A slice is a stretch of the output's layers, merged from equally long ranges of layers of its sources. The slices of a
model are stacked in their order. A module is one of several stacks of a model, as the vision tower of a multimodal one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.errors import BadInput
from jobs.expressions import Bindings, Template
from jobs.sources import (
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
    source_document,
    source_schema,
)
from jobs.trajectories import Trajectories, one_of
from jobs.yaml_nodes import Node, quoted


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """A stretch of layers and its sources; each source has its `layer_range`, and all ranges are equally long."""

    sources: tuple[Source, ...]
    base_model: str | None
    parameters: Mapping[str, Setting]
    place: str = field(compare=False)
    places: Mapping[str, str] = field(compare=False, repr=False)

    @property
    def length(self) -> int:
        """Layers of this slice."""
        first, end = self.sources[0].layer_range or (0, 0)
        return end - first

    def document(self) -> dict[str, Any]:
        """The slice as an entry of `slices:`."""
        base = {} if self.base_model is None else {"base_model": self.base_model}
        parameters = {"parameters": plain_parameters(self.parameters)} if self.parameters else {}
        return {"sources": [source_document(source) for source in self.sources], **base, **parameters}


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One module of the model: models that are merged whole, or slices."""

    name: str
    models: tuple[Source, ...]
    slices: tuple[Slice, ...]
    parameters: Mapping[str, Setting]
    place: str = field(compare=False)
    places: Mapping[str, str] = field(compare=False, repr=False)

    def document(self) -> dict[str, Any]:
        """The module as an entry of `modules:`."""
        parameters = {"parameters": plain_parameters(self.parameters)} if self.parameters else {}
        return {**parts_document(self.models, self.slices), **parameters}


def parts_document(models: Sequence[Source], slices: Sequence[Slice]) -> dict[str, Any]:
    """`models:` and `slices:`, whichever there is."""
    listed = {"models": [source_document(source) for source in models]} if models else {}
    return listed | ({"slices": [part.document() for part in slices]} if slices else {})


def sources_of(slices: Sequence[Slice], modules: Sequence[Module]) -> Iterator[Source]:
    """The models of slices and modules, in the order of the document."""
    for part in slices:
        yield from part.sources
    for module in modules:
        yield from (*module.models, *sources_of(module.slices, ()))


def bases_of(slices: Sequence[Slice], modules: Sequence[Module]) -> Iterator[str]:
    """The models that slices have as their base."""
    for part in (*slices, *(part for module in modules for part in module.slices)):
        if part.base_model is not None:
            yield part.base_model


def check_models(sources: Sequence[Source]) -> None:
    """Refuses a model that stands twice in one list."""
    seen: set[str] = set()
    for source in sources:
        if source.model in seen:
            message = "is listed twice; list it once, with the sum of the weights"
            if source.layer_range is not None:
                message = "is a source of this slice twice; a slice takes one range of each model"
            raise BadInput(f"{source.place}: the model {quoted(source.model)} {message}")
        seen.add(source.model)


@dataclass(frozen=True, slots=True)
class SliceTemplate:
    """A slice whose placeholders wait for values."""

    sources: tuple[SourceTemplate, ...]
    base_model: str | Template | None
    parameters: Mapping[str, Slot]
    place: str
    places: Mapping[str, str]

    def bind(self, bindings: Bindings, trajectories: Trajectories) -> Slice:
        """The slice at one point; `BadInput` for sources of different lengths, or the same model twice."""
        bound = Slice(
            sources=tuple(source.bind(bindings, trajectories) for source in self.sources),
            base_model=None
            if self.base_model is None
            else one_of(bound_text(self.base_model, bindings), trajectories, self.places["base_model"]),
            parameters=bound_parameters(self.parameters, bindings),
            place=self.place,
            places=self.places,
        )
        check_models(bound.sources)
        for source in bound.sources[1:]:
            first, end = source.layer_range or (0, 0)
            if end - first != bound.length:
                raise BadInput(
                    f"{source.place}: layer_range [{first}, {end}] holds {end - first} layers, that of"
                    f" {bound.sources[0].model} {bound.length}; the sources of a slice have equally many"
                )
        return bound


@dataclass(frozen=True, slots=True)
class ModuleTemplate:
    """A module whose placeholders wait for values."""

    name: str
    models: tuple[SourceTemplate, ...]
    slices: tuple[SliceTemplate, ...]
    parameters: Mapping[str, Slot]
    place: str
    places: Mapping[str, str]

    def bind(self, bindings: Bindings, trajectories: Trajectories) -> Module:
        """The module at one point."""
        models = tuple(source.bind(bindings, trajectories) for source in self.models)
        check_models(models)
        return Module(
            name=self.name,
            models=models,
            slices=tuple(part.bind(bindings, trajectories) for part in self.slices),
            parameters=bound_parameters(self.parameters, bindings),
            place=self.place,
            places=self.places,
        )


def read_slices(node: Node | None, reader: Reader) -> tuple[SliceTemplate, ...]:
    """The slices of a list of them."""
    return tuple(_slice(entry, reader) for entry in node.sequence()) if node is not None else ()


def read_modules(node: Node | None, reader: Reader) -> tuple[ModuleTemplate, ...]:
    """The modules of a mapping of names to them."""
    return tuple(_module(name, entry, reader) for name, entry in node.mapping().items()) if node is not None else ()


def _slice(node: Node, reader: Reader) -> SliceTemplate:
    keys = filled(reader.keys(node, ("sources", "base_model", "residual_weight", "parameters"), ("sources",)))
    if "sources" not in keys:
        raise node.error('"sources" must have a value')
    if "residual_weight" in keys:  # read and not used, as in mergekit; the plan has a remark
        keys["residual_weight"].number()
    parameters, places = reader.parameters(keys.get("parameters"))
    return SliceTemplate(
        sources=tuple(reader.source(source, ranged=True) for source in keys["sources"].sequence()),
        base_model=reader.text(model_name(keys["base_model"])) if "base_model" in keys else None,
        parameters=parameters,
        place=keys["sources"].place,
        places={key: value.place for key, value in keys.items()} | places,
    )


def _module(name: str, node: Node, reader: Reader) -> ModuleTemplate:
    keys = filled(reader.keys(node, ("models", "slices", "parameters")))
    if ("models" in keys) == ("slices" in keys):
        raise node.error(f"the module {quoted(name)} needs `models` or `slices`, one of the two")
    parameters, places = reader.parameters(keys.get("parameters"))
    return ModuleTemplate(
        name=name,
        models=tuple(reader.source(source) for source in keys["models"].sequence()) if "models" in keys else (),
        slices=read_slices(keys.get("slices"), reader),
        parameters=parameters,
        place=node.place,
        places={key: value.place for key, value in keys.items()} | places,
    )


def slices_schema() -> dict[str, Any]:
    """The JSON Schema of `slices:`."""
    source = source_schema()
    end = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string"}]}
    layers = {"type": "array", "items": end, "minItems": 2, "maxItems": 2}
    source = {**source, "properties": {**source["properties"], "layer_range": layers}}
    source["required"] = ["model", "layer_range"]
    part = {
        "type": "object",
        "properties": {
            "sources": {"type": "array", "items": source, "minItems": 1},
            "base_model": {"anyOf": [*reference_schema()["anyOf"], {"type": "null"}]},
            "parameters": parameters_schema(),
            "residual_weight": {"type": ["number", "null"]},
        },
        "required": ["sources"],
        "additionalProperties": False,
    }
    return {"type": "array", "items": part, "minItems": 1}


def modules_schema() -> dict[str, Any]:
    """The JSON Schema of `modules:`."""
    module = {
        "type": "object",
        "properties": {
            "models": {"type": "array", "items": source_schema(), "minItems": 1},
            "slices": slices_schema(),
            "parameters": parameters_schema(),
        },
        "oneOf": [{"required": ["models"]}, {"required": ["slices"]}],
        "additionalProperties": False,
    }
    return {"type": "object", "additionalProperties": module, "minProperties": 1}
