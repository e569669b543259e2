"""Sections of a job file as frozen dataclasses: read from their annotated fields, written back, described as a schema.

A field's annotation says all about its key: the type, the rules (`Annotated[int, AtLeast(1)]`) and, as a string, the
meaning. The default stands in the dataclass alone. `place`, where a class has it, is the line of the section.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, Protocol, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from jobs.yaml_nodes import SIZE, Node, quoted

Spec = TypeVar("Spec")
Scalar = str | bool | int | float
SWITCH = {"enum": [True, False, "yes", "no", "on", "off"]}
"""The JSON Schema of a boolean; `on` is one in a job file, but text to an editor, which reads YAML 1.2."""
SHARES_OF_ONE = 10_000
"""Ray counts a resource in parts of this size."""
NOT_KEYS = ("place", "places", "plain", "source", "searched", "trajectories")
MADE: Mapping[str, bool] = {"made": True}
"""Metadata of a field that is made of other keys."""


class Rule(Protocol):
    """Reads one value and refuses a wrong one with its place; `schema` is the JSON Schema of the accepted values."""

    def read(self, node: Node) -> Any: ...

    @property
    def schema(self) -> Mapping[str, Any]: ...


@dataclass(frozen=True, slots=True)
class AtLeast:
    """A whole number ≥ `minimum`, and ≤ `maximum` if there is one."""

    minimum: int
    maximum: int | None = None

    def read(self, node: Node) -> int:
        number = node.integer(minimum=self.minimum)
        if self.maximum is not None and number > self.maximum:
            raise node.error(f"{quoted(node.path)} must be at most {self.maximum}, not {number}")
        return number

    @property
    def schema(self) -> Mapping[str, Any]:
        most = {} if self.maximum is None else {"maximum": self.maximum}
        return {"type": "integer", "minimum": self.minimum} | most


@dataclass(frozen=True, slots=True)
class NotNegative:
    """A number ≥ 0."""

    def read(self, node: Node) -> float:
        return float(node.number(minimum=0))

    @property
    def schema(self) -> Mapping[str, Any]:
        return {"type": "number", "minimum": 0}


@dataclass(frozen=True, slots=True)
class Gpus:
    """GPUs as Ray gives them out: whole numbers, or ten-thousandths of one."""

    def read(self, node: Node) -> float:
        number = float(node.number(minimum=0))
        if number > 1 and not number.is_integer():
            raise node.error(f"{quoted(node.path)} above 1 must be a whole number, not {number:g}")
        if 0 < number < 1 / SHARES_OF_ONE:
            raise node.error(f"{quoted(node.path)} must be 0 or at least {1 / SHARES_OF_ONE:g}, not {number:g}")
        return number

    @property
    def schema(self) -> Mapping[str, Any]:
        share = {"type": "number", "minimum": 1 / SHARES_OF_ONE, "maximum": 1}
        return {"anyOf": [{"type": "integer", "minimum": 0}, share]}


@dataclass(frozen=True, slots=True)
class Between:
    """A number in the open interval from 0 to `below`; `refusal` is completed by the number."""

    below: float
    refusal: str

    def read(self, node: Node) -> float:
        number = float(node.number())
        if not 0 < number < self.below:
            raise node.error(f"{self.refusal}, not {node.value}")
        return number

    @property
    def schema(self) -> Mapping[str, Any]:
        return {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": self.below}


@dataclass(frozen=True, slots=True)
class Bytes:
    """A size such as 4GB or 2GiB, or a number of bytes."""

    def read(self, node: Node) -> int:
        return node.size_bytes()

    @property
    def schema(self) -> Mapping[str, Any]:
        return {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"^{SIZE.pattern}$"}]}


@dataclass(frozen=True, slots=True)
class Reads:
    """A value with a reader and a schema of its own; a schema that is not fixed is made when it is asked for."""

    read: Callable[[Node], Any]
    described: Mapping[str, Any] | Callable[[], Mapping[str, Any]]

    @property
    def schema(self) -> Mapping[str, Any]:
        return self.described() if callable(self.described) else self.described


@dataclass(frozen=True, slots=True)
class Key:
    """The key in the file, where it is not the name of the field."""

    name: str


@dataclass(frozen=True, slots=True)
class Field:
    """A key of a section: its name in the file, its type and rule, its meaning, and whether it must be given."""

    name: str
    attribute: str
    kind: Any
    rule: Rule | None
    meaning: str
    default: Any

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING


@cache
def fields_of(spec: type[Any]) -> tuple[Field, ...]:
    """The keys of a section, in order."""
    hints = get_type_hints(spec, include_extras=True)
    entries = [entry for entry in dataclasses.fields(spec) if entry.name not in NOT_KEYS and entry.metadata != MADE]
    return tuple(_field(entry, hints[entry.name]) for entry in entries)


def _field(entry: dataclasses.Field[Any], hint: Any) -> Field:
    kind, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    kind, inner = _without_none(kind)
    marks += inner
    default = entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()
    return Field(
        name=next((mark.name for mark in marks if isinstance(mark, Key)), entry.name),
        attribute=entry.name,
        kind=kind,
        rule=next((mark for mark in marks if hasattr(mark, "read")), None),
        meaning=next((mark for mark in marks if isinstance(mark, str)), ""),
        default=default,
    )


def _without_none(kind: Any) -> tuple[Any, list[Any]]:
    """The type beside None, and its rules: `Annotated[int, AtLeast(1)] | None` is an int with that rule."""
    if get_origin(kind) in (Union, types.UnionType):
        kinds = [choice for choice in get_args(kind) if choice is not types.NoneType]
        if len(kinds) == 1:
            kind = kinds[0]
    if get_origin(kind) is Annotated:
        kind, *marks = get_args(kind)
        return kind, marks
    return kind, []


def read_spec(spec: type[Spec], node: Node, *, given: Mapping[str, Any] | None = None) -> Spec:
    """The section at `node`; `given` replaces attributes, whose keys need not stand there. Refuses unknown keys."""
    given = dict(given or {})
    keys, known = keys_at(spec, node, given), fields_of(spec)
    values = {field.attribute: read_value(field, keys[field.name]) for field in known if field.name in keys} | given
    if "place" in {entry.name for entry in dataclasses.fields(cast(Any, spec))}:
        values = {"place": node.place} | values
    return spec(**values)


def keys_at(spec: type[Any], node: Node, given: Mapping[str, Any]) -> Mapping[str, Node]:
    """The keys that stand at `node`; refuses unknown ones, and the lack of one that is required and not given."""
    known = fields_of(spec)
    required = [field.name for field in known if field.required and field.attribute not in given]
    return node.mapping([field.name for field in known], required)


def read_value(field: Field, node: Node) -> Any:
    """The value of one key."""
    return _read(field.kind, field.rule, node)


def _read(kind: Any, rule: Rule | None, node: Node) -> Any:
    if get_origin(kind) is tuple:
        element, *_ = get_args(kind)
        inner, marks = _without_none(element)
        rule = next((mark for mark in marks if hasattr(mark, "read")), None)
        return distinct(node, lambda entry: _read(inner, rule, entry))
    if rule is not None:
        return rule.read(node)
    if get_origin(kind) is Literal:
        return node.choice(get_args(kind))
    readers: Mapping[Any, Callable[[], Any]] = {bool: node.boolean, int: node.integer, str: node.string}
    return readers[kind]()


def distinct(node: Node, read: Callable[[Node], Spec]) -> tuple[Spec, ...]:
    """A list without repetitions."""
    seen: list[Spec] = []
    for entry in node.sequence():
        value = read(entry)
        if value in seen:
            raise entry.error(f"{quoted(str(value))} is listed twice")
        seen.append(value)
    return tuple(seen)


def read_scalar(node: Node) -> Scalar:
    """A word, a number or true and false."""
    if node.kind == "number":
        number = node.number()
        return number.numerator if number.denominator == 1 else float(number)
    return node.boolean() if node.kind == "boolean" else node.string()


def document_of(spec: Any) -> dict[str, Any]:
    """The section as plain data that reads back as the same: every key with a value, defaults included."""
    found = {field.name: getattr(spec, field.attribute) for field in fields_of(type(spec))}
    return {key: _plain(value) for key, value in found.items() if value is not None and value not in ((), {})}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if hasattr(value, "document"):
        return value.document()
    return document_of(value) if dataclasses.is_dataclass(value) else value


def schema_of(spec: type[Any]) -> dict[str, Any]:
    """The JSON Schema of a section, made from its fields."""
    return {
        "type": "object",
        "description": (spec.__doc__ or "").split("\n")[0],
        "properties": {field.name: _described(field) for field in fields_of(spec)},
        "required": [field.name for field in fields_of(spec) if field.required],
        "additionalProperties": False,
    }


def _described(field: Field) -> dict[str, Any]:
    described: dict[str, Any] = dict(_schema(field.kind, field.rule))
    if field.meaning:
        described["description"] = field.meaning
    if field.default not in (dataclasses.MISSING, None, (), {}):
        described["default"] = _plain(field.default)
    return described


def _schema(kind: Any, rule: Rule | None) -> Mapping[str, Any]:
    if get_origin(kind) is tuple:
        element, *_ = get_args(kind)
        inner, marks = _without_none(element)
        rule = next((mark for mark in marks if hasattr(mark, "read")), None)
        return {"type": "array", "items": _schema(inner, rule), "minItems": 1, "uniqueItems": True}
    if rule is not None:
        return rule.schema
    if get_origin(kind) is Literal:
        return {"enum": [*get_args(kind)]}
    return {bool: SWITCH, int: {"type": "integer"}, str: {"type": "string", "minLength": 1}}[kind]


def words_of(keys: Collection[str]) -> Reads:
    """A mapping from some of these keys to text."""
    return Reads(
        lambda node: {key: entry.string() for key, entry in node.mapping(keys).items()},
        {
            "type": "object",
            "properties": {key: {"type": "string", "minLength": 1} for key in keys},
            "additionalProperties": False,
        },
    )
