"""The models that go into a merge, each with its parameters; and their templates, where `${…}` waits for a point.

A parameter is a value, a gradient over the layers, or a list of both by the names of tensors. Which parameters exist is
not known in this package.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from jobs.errors import BadInput
from jobs.expressions import Bindings, Template, format_number, template
from jobs.trajectories import AGE, DEFAULT_ALPHA, NO_TRAJECTORIES, Trajectories, is_window, one_of, weight, window
from jobs.yaml_nodes import NUMBER, Node, nearest, quoted

LATER: Mapping[str, bool] = {"later": True}
"""Metadata of a field that is newer than the first jobs: at its default it is not in digests, so that those stay."""

_OCTAL = re.compile(r"[-+]?0[0-7]+")

Scalar = Fraction | bool | str
Gradient = tuple[Fraction, ...] | tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class Filtered:
    """A value for the tensors whose name contains `filter`; None or `*` is every tensor."""

    filter: str | None
    value: Scalar | Gradient


Setting = Scalar | Gradient | tuple[Filtered, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One model that goes in, and the parameters that are its own.

    In a slice, it goes in with the layers of `layer_range`: from the first number up to, but without, the second.
    """

    model: str
    parameters: Mapping[str, Setting]
    place: str = field(compare=False)
    places: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    layer_range: tuple[int, int] | None = field(default=None, metadata=LATER)

    def place_of(self, parameter_name: str) -> str:
        """Where that parameter is set, or where this model is named."""
        return self.places.get(parameter_name, self.place)


@dataclass(frozen=True, slots=True)
class _FilteredTemplate:
    filter: str | Template | None
    value: _ValueSlot


@dataclass(frozen=True, slots=True)
class SourceTemplate:
    """A source whose placeholders wait for values."""

    model: str | Template
    parameters: Mapping[str, Slot]
    place: str
    places: Mapping[str, str]
    layer_range: _Ends | None

    def bind(self, bindings: Bindings, trajectories: Trajectories = NO_TRAJECTORIES) -> Source:
        """The source at one point; of `trajectories` it names at most one checkpoint.

        `BadInput` for a range that holds no layer.
        """
        model = one_of(bound_text(self.model, bindings), trajectories, self.place)
        layers = None if self.layer_range is None else self._bound_range(self.layer_range, bindings)
        return replace(self._source(model, bound_parameters(self.parameters, bindings)), layer_range=layers)

    def window(self, bindings: Bindings, trajectories: Trajectories) -> tuple[Source, ...]:
        """The source at one point, or the checkpoints of its window, with parameters by age."""
        members = window(bound_text(self.model, bindings), trajectories, self.place)
        if not isinstance(members, tuple):
            return (self.bind(bindings, trajectories),)
        oldest_first = [parent for checkpoints in trajectories.values() for parent in checkpoints if parent in members]
        last = len(members) - 1
        return tuple(
            self._source(member, self._aged(bindings, last - oldest_first.index(member), len(members)))
            for member in members
        )

    def _source(self, model: str, parameters: Mapping[str, Setting]) -> Source:
        return Source(model=model, parameters=parameters, place=self.place, places=self.places)

    def _aged(self, bindings: Bindings, age: int, size: int) -> dict[str, Setting]:
        """The parameters of the checkpoint of this age in a window of `size`."""
        parameters = bound_parameters(self.parameters, {**bindings, AGE: Fraction(age)})
        if (written := parameters.get("weight")) is None:
            return parameters
        alpha = parameters.pop("alpha", DEFAULT_ALPHA)
        if not isinstance(alpha, Fraction) or not 0 < alpha <= 1:
            raise BadInput(f"{self.places['alpha']}: the alpha of ema must be a number above 0 and at most 1")

        def by_age(value: Any) -> Any:
            if isinstance(value, Filtered):
                return replace(value, value=by_age(value.value))
            return weight(value, age, size, alpha, self.places["weight"]) if isinstance(value, str) else value

        parameters["weight"] = tuple(map(by_age, written)) if isinstance(written, tuple) else by_age(written)
        return parameters

    def _bound_range(self, ends: _Ends, bindings: Bindings) -> tuple[int, int]:
        place = self.places["layer_range"]
        first, end = (value.bind(bindings) if isinstance(value, Template) else value for value in ends)
        if isinstance(first, str) or isinstance(end, str) or first.denominator != 1 or end.denominator != 1:
            shown = ", ".join(value if isinstance(value, str) else format_number(value) for value in (first, end))
            raise BadInput(f"{place}: layer_range holds whole numbers, not [{shown}]")
        if not 0 <= first < end:
            raise BadInput(
                f"{place}: layer_range [{first}, {end}] holds no layer; layers count from 0, and the second number is"
                " the first layer that is not in it"
            )
        return int(first), int(end)


_Ends = tuple[Fraction | Template, Fraction | Template]
_ValueSlot = Scalar | Template | tuple[Fraction | Template, ...] | tuple[bool, ...]
Slot = _ValueSlot | tuple[_FilteredTemplate, ...]


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


class Reader:
    """Reads the parts of a recipe and remembers every placeholder it met."""

    def __init__(self, *, foreign: bool = False) -> None:
        self.placeholders: list[Template] = []
        self.ignored: list[str] = []
        """A sentence on each key that was left out."""
        self._foreign = foreign
        self._given = frozenset[str]()
        """Names in expressions that are no axes."""

    def keys(self, node: Node, known: Collection[str], required: Collection[str] = ()) -> Mapping[str, Node]:
        """As `Node.mapping`; of a document for mergekit, unknown keys that do not look misspelt are left out.

        A key does not look so if the key that it is near to is there as well.
        """
        if self._foreign and isinstance(node.value, Mapping):
            absent = [key for key in known if key not in node.value]
            stray = {key: value for key, value in node.value.items() if key not in known and not nearest(key, absent)}
            self.ignored += [
                f"{value.place}: {quoted(key)} is not a key here and has no effect" for key, value in stray.items()
            ]
            node = replace(node, value={key: value for key, value in node.value.items() if key not in stray})
        return node.mapping(known, required)

    def text(self, node: Node) -> str | Template:
        """Text, or a template of text."""
        text = node.string()
        parsed = template(text, node.place, self._given)
        if parsed is None:
            return text
        self.placeholders.append(parsed)
        return parsed

    def source(self, node: Node, *, ranged: bool = False) -> SourceTemplate:
        """One entry of `models:` or, with a `layer_range`, of `sources:`."""
        if isinstance(node.value, Mapping) and "revision" in node.value:
            raise node.value["revision"].error(
                "`revision:` stands after the model's name: write `model: organisation/name@revision`"
            )
        wanted = ("model", "layer_range") if ranged else ("model",)
        keys = self.keys(node, (*wanted, "parameters"), wanted)
        name = model_name(keys["model"])
        model = self.text(name)
        self._given = frozenset({AGE}) if is_window(name.string()) else frozenset()
        parameters, places = self.parameters(keys.get("parameters"))
        self._given = frozenset()
        ends = None
        if ranged:
            places["layer_range"] = keys["layer_range"].place
            ends = self._range(keys["layer_range"])
        return SourceTemplate(model, parameters, keys["model"].place, places, ends)

    def _range(self, node: Node) -> _Ends:
        ends = node.sequence()
        if len(ends) != 2:
            raise node.error(f"layer_range takes two numbers, as in [0, 16], not {len(ends)}")
        return self._gradient_value(ends[0]), self._gradient_value(ends[1])

    def parameters(self, node: Node | None) -> tuple[dict[str, Slot], dict[str, str]]:
        """The settings by name, and where each stands."""
        if node is None or node.kind == "nothing":
            return {}, {}
        settings = node.mapping()
        return (
            {name: self._setting(setting) for name, setting in settings.items()},
            {name: setting.place for name, setting in settings.items()},
        )

    def _setting(self, node: Node) -> Slot:
        if node.kind == "mapping":
            return (self._filtered(node),)
        if node.kind == "list" and node.sequence()[0].kind == "mapping":
            return tuple(self._filtered(entry) for entry in node.sequence())
        return self.value(node)

    def _filtered(self, node: Node) -> _FilteredTemplate:
        keys = node.mapping(("filter", "value"), ("value",))
        unfiltered = "filter" not in keys or keys["filter"].kind == "nothing"
        return _FilteredTemplate(None if unfiltered else self.text(keys["filter"]), self.value(keys["value"]))

    def value(self, node: Node) -> _ValueSlot:
        """A number, a boolean, text, or a gradient."""
        if node.kind == "list":
            if all(entry.kind == "boolean" for entry in node.sequence()):
                return tuple(entry.boolean() for entry in node.sequence())
            return tuple(self._gradient_value(entry) for entry in node.sequence())
        if node.kind == "number":
            return _unambiguous(node).number()
        if node.kind == "boolean":
            return node.boolean()
        number = _number_in_quotes(node)
        return self.text(node) if number is None else number

    def _gradient_value(self, node: Node) -> Fraction | Template:
        if node.kind == "string" and isinstance(parsed := self.text(node), Template):
            return parsed
        number = _number_in_quotes(node)
        return _unambiguous(node).number() if number is None else number


def filled(keys: Mapping[str, Node]) -> dict[str, Node]:
    """The keys that have a value."""
    return {key: value for key, value in keys.items() if value.kind != "nothing"}


def model_name(node: Node) -> Node:
    """The text of a model, `NAME@REVISION+ADAPTER@REVISION`, also of mergekit's long form of two mappings.

    `override_architecture` names the architecture whose list of tensors mergekit takes. No list is needed here.
    """
    if node.kind != "mapping":
        return node
    keys = node.mapping(("model", "lora", "override_architecture"), ("model",))
    name = _path_and_revision(keys["model"])
    lora = keys.get("lora")
    if lora is None or lora.kind == "nothing":
        return name
    return replace(name, value=f"{name.string()}+{_path_and_revision(lora).string()}")


def _path_and_revision(node: Node) -> Node:
    """The text of `{path: NAME, revision: REVISION}`."""
    if node.kind != "mapping":
        return node
    parts = node.mapping(("path", "revision"), ("path",))
    if "revision" not in parts or parts["revision"].kind == "nothing":
        return parts["path"]
    return replace(parts["path"], value=f"{parts['path'].string()}@{parts['revision'].string()}")


def _unambiguous(node: Node) -> Node:
    """The node; `BadInput` for a number that YAML 1.1, and so mergekit, reads as an octal one."""
    if isinstance(node.value, str) and _OCTAL.fullmatch(node.value):
        raise node.error(f"{node.value} is {int(node.value, 8)} in YAML 1.1; write the number without a leading zero")
    return node


def _number_in_quotes(node: Node) -> Fraction | None:
    """The number of `"0.5"`, which mergekit takes as well."""
    text = node.string() if node.kind == "string" else ""
    return replace(node, value=text.strip(), quoted=False).number() if NUMBER.fullmatch(text.strip()) else None


def bound_text(text: str | Template, bindings: Bindings) -> str:
    """A text at one point."""
    return text if isinstance(text, str) else text.render(bindings)


def bound_parameters(parameters: Mapping[str, Slot], bindings: Bindings) -> dict[str, Setting]:
    """Parameters at one point."""
    return {name: _bound(slot, bindings) for name, slot in parameters.items()}


def _bound(slot: Slot, bindings: Bindings) -> Setting:
    if isinstance(slot, tuple) and isinstance(slot[0], _FilteredTemplate):
        return tuple(_bound_filtered(part, bindings) for part in slot if isinstance(part, _FilteredTemplate))
    return _bound_value(slot, bindings)  # pyright: ignore[reportArgumentType]  (a tuple is of one kind throughout)


def _bound_filtered(part: _FilteredTemplate, bindings: Bindings) -> Filtered:
    text = None if part.filter is None else bound_text(part.filter, bindings)
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


def _interpolated(gradient: Gradient, position: float | Fraction) -> Fraction | bool:
    # idx / (layers − 1) arrives as a float; the nearest fraction with a small denominator is the one that was meant
    exact = position if isinstance(position, Fraction) else Fraction(position).limit_denominator(1_000_000)
    scaled = exact * (len(gradient) - 1)
    left = min(int(scaled), len(gradient) - 1)
    if isinstance(gradient[left], bool):
        return gradient[left]
    right = min(left + 1, len(gradient) - 1)
    return gradient[left] + (gradient[right] - gradient[left]) * (scaled - left)


def source_document(source: Source) -> dict[str, Any]:
    """The source as an entry of `models:` or `sources:`."""
    layers = {} if source.layer_range is None else {"layer_range": [*source.layer_range]}
    parameters = {"parameters": plain_parameters(source.parameters)} if source.parameters else {}
    return {"model": source.model, **layers, **parameters}


def plain_parameters(parameters: Mapping[str, Setting]) -> dict[str, Any]:
    """Parameters as plain data: whole numbers as int, others as float."""
    return {name: _plain(setting) for name, setting in parameters.items()}


def parameters_schema() -> dict[str, Any]:
    """The JSON Schema of parameters."""
    scalar = {"type": ["number", "boolean", "string"]}
    value = {"anyOf": [scalar, {"type": "array", "items": {"type": ["number", "boolean", "string"]}, "minItems": 1}]}
    filtered = {
        "type": "object",
        "properties": {"filter": {"type": ["string", "null"]}, "value": value},
        "required": ["value"],
        "additionalProperties": False,
    }
    setting = {"anyOf": [*value["anyOf"], filtered, {"type": "array", "items": filtered, "minItems": 1}]}
    return {"type": ["object", "null"], "additionalProperties": setting}


def reference_schema() -> dict[str, Any]:
    """The JSON Schema of a model's name."""
    named = {"type": "string", "minLength": 1}
    path = {"type": "object", "properties": {"path": named, "revision": {"type": ["string", "null"]}}}
    part = {"anyOf": [named, path]}
    properties = {"model": part, "lora": {"anyOf": [*part["anyOf"], {"type": "null"}]}}
    long = {"type": "object", "properties": properties, "required": ["model"]}
    return {"anyOf": [named, long]}


def source_schema() -> dict[str, Any]:
    """The JSON Schema of an entry of `models:`."""
    return {
        "type": "object",
        "properties": {"model": reference_schema(), "parameters": parameters_schema()},
        "required": ["model"],
        "additionalProperties": False,
    }


def _plain(setting: Setting | Filtered) -> Any:
    if isinstance(setting, Fraction):
        return setting.numerator if setting.denominator == 1 else float(setting)
    if isinstance(setting, tuple):
        return [_plain(part) for part in setting]
    if isinstance(setting, Filtered):
        named = {} if setting.filter is None else {"filter": setting.filter}
        return named | {"value": _plain(setting.value)}
    return setting
