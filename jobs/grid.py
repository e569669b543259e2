"""A grid: the axes of a job, and from them its points, in a stable order with stable names.

    grid:
      w: {from: 0, to: 1, step: 0.1}              both ends included, exact; or `num: 11` in place of `step`
      method: [linear, slerp]                     numbers or words
      simplex: {axes: [a, b, c], step: 0.25}      every weighting ≥ 0 that sums to 1

Axes multiply in document order, the last one fastest. Or, in place of all of them, the points themselves:

    grid:
      points: [{w: 0.1, name: light}, {w: 0.9}]
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Any

from jobs.errors import BadInput
from jobs.expressions import AXIS_NAME, Bindings, Template, Value, format_number, name_template
from jobs.ranges import range_schema, read_range
from jobs.recipe import Recipe
from jobs.sources import LATER
from jobs.stages import StagesTemplate, stage_in
from jobs.trajectories import NO_TRAJECTORIES, Trajectories
from jobs.yaml_nodes import Node, quoted, suggestion

MAX_POINTS = 100_000
POINT_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=,-]{0,200}", re.ASCII)
RESERVED = ("simplex", "points", "name")


@dataclass(frozen=True, slots=True)
class Point:
    """One recipe with every placeholder bound, and the name it is stored under.

    `stages` are the merges that the recipe takes by name in place of a model, each after those that it takes itself.
    """

    name: str
    bindings: Mapping[str, Value]
    recipe: Recipe
    stages: Mapping[str, Recipe] = field(default_factory=dict[str, Recipe], metadata=LATER)

    @property
    def recipes(self) -> tuple[Recipe, ...]:
        """Those of the stages and the point's own."""
        return (*self.stages.values(), self.recipe)

    def parents(self) -> tuple[str, ...]:
        """Every model that a recipe names and that is no stage, and every adapter on a stage, once each."""
        names = dict.fromkeys(name for recipe in self.recipes for name in recipe.parents())
        found = {name: stage_in(name, self.stages) or ("", name) for name in names}
        return tuple(dict.fromkeys(parent for _, parent in found.values() if parent))

    def adapters(self) -> frozenset[str]:
        """The parents that are adapters on stages, as `lora` in `half+lora`."""
        found = (stage_in(name, self.stages) for recipe in self.recipes for name in recipe.parents())
        return frozenset(stage[1] for stage in found if stage is not None and stage[1])

    def documents(self) -> list[dict[str, Any]]:
        """The mergekit documents: the stages with their names, and the point's own as the last."""
        stages = [{"name": name, **recipe.document()} for name, recipe in self.stages.items()]
        return [*stages, self.recipe.document()]


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Axis names and where each stands, the combinations of their values in order, and the names that points give."""

    places: Mapping[str, str]
    combinations: tuple[tuple[Value, ...], ...]
    names: tuple[str | None, ...]
    place: str


@dataclass(frozen=True, slots=True)
class _Axis:
    """One or, for a simplex, several axes that move together; each row gives each of them a value."""

    names: tuple[str, ...]
    rows: tuple[tuple[Value, ...], ...]
    place: str


def parse_grid(node: Node | None, place: str) -> Grid:
    """The grid that stands at `node`; without one, a single point without axes."""
    if node is None:
        return Grid(places={}, combinations=((),), names=(None,), place=place)
    entries = node.mapping()
    if not entries:
        raise node.error("the grid has no axis; give it one, or take it out")
    if "points" not in entries:
        return _product(node, [_axis(name, entry) for name, entry in entries.items()])
    if len(entries) > 1:
        other = next(name for name in entries if name != "points")
        raise entries[other].error(
            f"`points:` stands alone; take {quoted(other)} out, or write its values into the points"
        )
    return _explicit(entries["points"])


def grid_schema() -> dict[str, Any]:
    """The JSON Schema of a grid."""
    number = {"type": "number"}
    values = {"type": "array", "items": {"type": ["number", "string"]}, "minItems": 1}
    names = {"type": "array", "items": {"type": "string"}, "minItems": 2, "uniqueItems": True}
    step = number | {"exclusiveMinimum": 0, "maximum": 1}
    simplex = _object({"axes": names, "step": step}) | {"required": ["axes", "step"]}
    point = {"type": "object", "additionalProperties": {"type": ["number", "string"]}}
    points = _object({"points": {"type": "array", "items": point, "minItems": 1}}) | {"required": ["points"]}
    axes = {
        "type": "object",
        "minProperties": 1,
        "properties": {"simplex": simplex, "points": False, "name": False},
        "propertyNames": {"pattern": f"^{AXIS_NAME.pattern}$", "maxLength": 80},
        "additionalProperties": {"anyOf": [values | {"uniqueItems": True}, range_schema()]},
    }
    return {"anyOf": [axes, points]}


def _object(properties: Mapping[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False}


def expand(
    recipe: StagesTemplate, grid: Grid, point_name: Template | None, trajectories: Trajectories = NO_TRAJECTORIES
) -> tuple[Point, ...]:
    """Every point of the grid; refuses unused and undefined axes, and names that are invalid or double."""
    used = frozenset[str]().union(*(placeholder.names for placeholder in recipe.placeholders))
    for axis, place in grid.places.items():
        if axis not in used:
            raise BadInput(f"{place}: the axis {quoted(axis)} is used nowhere in the recipe; write ${{{axis}}} there")
    for placeholder in (*recipe.placeholders, *([point_name] if point_name else [])):
        for axis in sorted(placeholder.names - grid.places.keys()):
            raise BadInput(f"{placeholder.place}: unknown axis {quoted(axis)}{suggestion(axis, grid.places.keys())}")
    naming = point_name or _default_name(grid)
    points: dict[str, Point] = {}
    for values, given_name in zip(grid.combinations, grid.names, strict=True):
        bindings = dict(zip(grid.places, values, strict=True))
        name = given_name or naming.render(bindings if point_name else _nameable(bindings))
        if not POINT_NAME.fullmatch(name):
            raise BadInput(
                f"{naming.place}: {quoted(name)} cannot name a point; "
                "at most 201 letters, digits and . _ + = , - beginning with a letter or digit"
            )
        if name in points:
            first = described(points[name].bindings)
            raise BadInput(
                f"{naming.place}: the points {first} and {described(bindings)} are both called {quoted(name)}; "
                "name every axis in `point:`, or give each point its `name` under `grid: points:`"
            )
        points[name] = Point(name, bindings, *recipe.bind(bindings, trajectories))
    return tuple(points.values())


def described(bindings: Bindings) -> str:
    """`w=0.7, method=ties`."""
    return ", ".join(
        f"{axis}={value if isinstance(value, str) else format_number(value)}" for axis, value in bindings.items()
    )


def _nameable(bindings: Bindings) -> dict[str, Value]:
    """The values for a default name: of a word that cannot stand in a name, its last part, with hyphens in it."""
    return {
        axis: value
        if not isinstance(value, str) or POINT_NAME.fullmatch(axis + value)
        else re.sub(r"[^A-Za-z0-9._+=,-]+", "-", value.rstrip("/").rpartition("/")[2]).strip("-")
        for axis, value in bindings.items()
    }


def _default_name(grid: Grid) -> Template:
    """`w{w}_k1={k1}_method={method}`: the axes that vary, with = where a name and a value would run together."""
    values = dict(zip(grid.places, zip(*grid.combinations, strict=True), strict=True))
    varying = {axis: of for axis, of in values.items() if len(set(of)) > 1} or values
    mark = {
        axis: "=" if axis[-1].isdigit() or any(isinstance(value, str) for value in of) else ""
        for axis, of in varying.items()
    }
    return name_template("_".join(f"{axis}{mark[axis]}{{{axis}}}" for axis in varying) or "merge", grid.place)


def _product(node: Node, axes: list[_Axis]) -> Grid:
    places: dict[str, str] = {}
    for axis in axes:
        for name in axis.names:
            if name in places:
                raise BadInput(f"{axis.place}: the axis {quoted(name)} is defined twice (first at {places[name]})")
            places[name] = axis.place
    _check_count(node, prod(len(axis.rows) for axis in axes))
    combinations = tuple(
        tuple(itertools.chain.from_iterable(rows)) for rows in itertools.product(*(axis.rows for axis in axes))
    )
    return Grid(places=places, combinations=combinations, names=(None,) * len(combinations), place=node.place)


def _explicit(node: Node) -> Grid:
    entries = node.sequence()
    _check_count(node, len(entries))
    axes = [name for name in entries[0].mapping() if name != "name"]
    for axis in axes:
        check_axis_name(axis, entries[0].mapping()[axis])
    for entry in entries:
        entry.mapping((*axes, "name"), axes)
    return Grid(
        places={axis: entries[0].mapping()[axis].place for axis in axes},
        combinations=tuple(tuple(_axis_value(entry.mapping()[axis]) for axis in axes) for entry in entries),
        names=tuple(entry.mapping()["name"].string() if "name" in entry.mapping() else None for entry in entries),
        place=node.place,
    )


def _axis(name: str, node: Node) -> _Axis:
    if name == "simplex":
        return _simplex(node)
    check_axis_name(name, node)
    if node.kind == "list":
        values = tuple(_axis_value(entry) for entry in node.sequence())
    elif node.kind == "mapping":
        count, numbers = read_range(node)
        _check_count(node, count)
        values = tuple(numbers)
    else:
        raise node.error(f"the axis {quoted(name)} must be a list, or {{from, to, step}}, or {{from, to, num}}")
    check_distinct(name, values, node)
    return _Axis((name,), tuple((value,) for value in values), node.place)


def read_simplex(node: Node) -> tuple[tuple[str, ...], Fraction]:
    """(the axes, the step of their weights) of `simplex: {axes: [a, b, c], step: 0.25}`."""
    keys = node.mapping(("axes", "step"), ("axes", "step"))
    names = tuple(entry.string() for entry in keys["axes"].sequence())
    for name, entry in zip(names, keys["axes"].sequence(), strict=True):
        check_axis_name(name, entry)
    if len(names) < 2 or len(set(names)) < len(names):
        raise keys["axes"].error("a simplex needs two or more different axes")
    step = keys["step"].number()
    if step <= 0 or (1 / step).denominator != 1:
        raise keys["step"].error("the step of a simplex must divide 1 into equal parts, as 0.5, 0.25, 0.2, 0.1 do")
    return names, step


def _simplex(node: Node) -> _Axis:
    names, step = read_simplex(node)
    parts = (1 / step).numerator
    _check_count(node, _compositions_count(parts, len(names)))
    rows = tuple(tuple(count * step for count in counts) for counts in _compositions(parts, len(names)))
    return _Axis(names, rows, node.place)


def _compositions(total: int, size: int) -> Iterator[tuple[int, ...]]:
    if size == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _compositions(total - first, size - 1):
            yield (first, *rest)


def _compositions_count(total: int, size: int) -> int:
    count = 1
    for index in range(1, size):
        count = count * (total + index) // index
        if count > MAX_POINTS:
            break
    return count


def _axis_value(node: Node) -> Value:
    if node.kind == "number":
        return node.number()
    if node.kind == "string":
        return node.string()
    raise node.error(f"an axis holds numbers and words, not {'true or false' if node.kind == 'boolean' else node.kind}")


def check_axis_name(name: str, node: Node) -> None:
    """Refuses a name that no axis can have."""
    if name in RESERVED:
        raise node.error(f"an axis cannot be called {quoted(name)}; the word has a meaning of its own here")
    if not AXIS_NAME.fullmatch(name) or len(name) > 80:
        raise node.error(f"{quoted(name)} cannot name an axis; letters, digits and _, beginning with a letter")


def check_distinct(name: str, values: tuple[Value, ...], node: Node) -> None:
    """Refuses an axis that holds a value twice."""
    seen: set[Value] = set()
    for value in values:
        if value in seen:
            raise node.error(f"the axis {quoted(name)} holds {described({name: value})} twice")
        seen.add(value)


def _check_count(node: Node, count: int) -> None:
    if count > MAX_POINTS:
        raise node.error(f"this makes {count if count < 10**12 else 'far too many'} points; at most {MAX_POINTS}")
