"""A search: the axes of a job, of which a run asks a few points, the next ones by the scores of the earlier ones.

    search:
      over:
        w: {from: 0, to: 1, step: 0.01}                  numbers: every axis has steps, so that points stay exact
        layers: {knots: 4, from: 0, to: 1, step: 0.05}   ${layers} is a gradient of four values along the depth
        method: [linear, ties]                           words
        soup: {subset: [a, b, c]}                        `model: ${soup}` stands for the models that go in
        simplex: {axes: [x, y, z], step: 0.05}           weights ≥ 0 that sum to 1
      maximize: score
      budget: {points: 60}

A point is a `Choice`: the index of its value on each axis. The points of a space are never listed: there may be 10^10.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import comb, prod
from typing import Annotated, Any, Literal

from jobs.errors import BadInput
from jobs.evaluate import SPECS, Count
from jobs.expressions import PLACEHOLDER, REFERENCE, Template, Value, format_number, name_template
from jobs.grid import POINT_NAME, Point, check_axis_name, check_distinct, grid_schema, read_simplex
from jobs.merge_tasks import digest
from jobs.ranges import range_schema, read_range
from jobs.specs import Between, Key, Reads, fields_of, read_spec, schema_of
from jobs.stages import StagesTemplate, stages_template
from jobs.trajectories import Trajectories
from jobs.yaml_nodes import Node, quoted, suggestion

Choice = tuple[int, ...]
"""The index of the value on each axis of a space, in the order of its axes."""

MOST_VALUES = 100_000
"""Values of one axis."""
MOST_KNOTS = 64
MOST_KINDS = 256
"""Kinds of points: combinations of words, checkpoints and models, each of which is planned before the first point."""
MOST_IN_BATCH = 256
MOST_DIGITS = 20
"""Characters of a number of tokens."""
TOKENS = re.compile(r"(\d+(?:\.\d+)?) ?([kMGT]?)", re.ASCII)
TOKEN_UNITS = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
METRIC = re.compile(r"(?P<sign>-?)(?P<name>[a-z_]+)(?:@(?P<length>\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Axis:
    """One axis; numbers are ascending. `layers.0` is a knot of `layers`, `soup.a` says whether `a` is in (1) or not."""

    name: str
    values: tuple[Value, ...]
    kind: Literal["numbers", "words"]
    place: str = field(compare=False)


@dataclass(frozen=True, slots=True)
class Space:
    """All points that a search may ask.

    The values of the axes of a simplex sum to 1. `knots` and `subsets` have the axes' names by the name of the group.
    """

    axes: tuple[Axis, ...]
    simplexes: tuple[tuple[str, ...], ...] = ()
    knots: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    subsets: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])

    @property
    def size(self) -> int:
        """How many points there are."""
        return prod(map(self.count, self.groups))

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The axes of each simplex and of each subset together, and every other axis by itself."""
        tied = {name: group for group in (*self.simplexes, *self.subsets.values()) for name in group}
        return tuple(dict.fromkeys(tied.get(axis.name, (axis.name,)) for axis in self.axes))

    def count(self, group: Sequence[str]) -> int:
        """How many choices of the axes of a group there are."""
        values = self.length(group)
        if group in self.simplexes:
            return comb(values - 2 + len(group), len(group) - 1)
        return 2 ** len(group) - 1 if group in self.subsets.values() else values

    def choices(self, group: Sequence[str]) -> Iterator[Choice]:
        """The choices of the axes of a group, in ascending order."""
        values = range(self.length(group))
        if group not in self.simplexes:
            every = itertools.product(values, repeat=len(group))
            yield from every if group not in self.subsets.values() else filter(any, every)
            return
        for cuts in itertools.combinations_with_replacement(values, len(group) - 1):
            yield tuple(after - before for before, after in itertools.pairwise((0, *cuts, values[-1])))

    def length(self, group: Sequence[str]) -> int:
        """How many values each axis of a group has."""
        return next(len(axis.values) for axis in self.axes if axis.name == group[0])

    def bindings(self, choice: Choice) -> dict[str, Value]:
        """The value of each axis."""
        return {axis.name: axis.values[index] for axis, index in zip(self.axes, choice, strict=True)}

    def admits(self, choice: Choice) -> bool:
        """Whether the weights of each simplex sum to 1 and no subset is empty."""
        if len(choice) != len(self.axes) or not all(
            0 <= index < len(axis.values) for axis, index in zip(self.axes, choice, strict=True)
        ):
            return False
        bound = self.bindings(choice)
        sums = (sum(_number(bound[name]) for name in group) for group in self.simplexes)
        return all(total == 1 for total in sums) and all(
            any(bound[name] for name in group) for group in self.subsets.values()
        )

    def members(self, choice: Choice) -> dict[str, tuple[str, ...]]:
        """The models that go in, by subset."""
        bound = self.bindings(choice)
        return {
            group: tuple(name.removeprefix(f"{group}.") for name in names if bound[name])
            for group, names in self.subsets.items()
        }

    def middle(self) -> Choice:
        """The first word of each axis, the middle of its numbers, equal weights, every member of a subset."""
        chosen = {axis.name: 0 if axis.kind == "words" else len(axis.values) // 2 for axis in self.axes}
        for group in self.simplexes:
            steps = self.length(group) - 1
            for place, name in enumerate(group):
                chosen[name] = (steps * (place + 1)) // len(group) - (steps * place) // len(group)
        for group in self.subsets.values():
            chosen |= dict.fromkeys(group, 1)
        return tuple(chosen[axis.name] for axis in self.axes)

    def ends(self) -> dict[str, Choice]:
        """Points that are likely to be the parents, by a reason for each.

        With simplexes, the middle with one axis of a simplex at 1 and its others at 0; otherwise the middle with all
        axes of numbers at their least, and at their greatest.
        """
        column = {axis.name: index for index, axis in enumerate(self.axes)}
        moved: dict[str, dict[int, int]] = {}
        for group in self.simplexes:
            for name in group:
                most = len(self.axes[column[name]].values) - 1
                moved[f"{name} alone"] = {column[other]: most if other == name else 0 for other in group}
        members = {name for group in self.subsets.values() for name in group}
        numbers = [axis for axis in self.axes if axis.kind == "numbers" and axis.name not in members]
        if not moved and numbers:
            moved["the least of every axis"] = {column[axis.name]: 0 for axis in numbers}
            moved["the greatest of every axis"] = {column[axis.name]: len(axis.values) - 1 for axis in numbers}
        middle = dict(enumerate(self.middle()))
        return {reason: tuple((middle | places).values()) for reason, places in moved.items()}

    def described(self, choice: Choice) -> str:
        """`w=0.3_layers=0,0.5,1_soup=a+b`: exact, and different for different points."""
        bound, parts = self.bindings(choice), dict[str, str]()
        groups = {name: group for group, names in (*self.knots.items(), *self.subsets.items()) for name in names}
        members = self.members(choice)
        for axis in self.axes:
            group = groups.get(axis.name, axis.name)
            text = _written(bound[axis.name])
            if group in members:
                parts[group] = "+".join(members[group])
            elif len(axis.values) > 1 or group in self.knots:
                parts[group] = f"{parts[group]},{text}" if group in parts else text
        return "_".join(f"{group}={text}" for group, text in parts.items()) or "merge"


@dataclass(frozen=True, slots=True)
class Objective:
    """A figure of a point: `score` of all that ranks points, or of one benchmark, perhaps at one length alone.

    `output_tokens` counts the tokens of thoughts and answers. `sign` is -1 for a figure that should be small.
    """

    metric: str
    sign: Literal[1, -1] = 1
    place: str = field(default="", compare=False)

    def shown(self, value: float) -> str:
        """A value in its unit: a share of right answers as points of 100, tokens as they are."""
        return f"{value:.1f} tokens" if self.metric.startswith("output_tokens") else f"{100 * value:.2f}"

    def document(self) -> str:
        """As in the file: `-output_tokens`."""
        return f"{'-' if self.sign < 0 else ''}{self.metric}"


@dataclass(frozen=True, slots=True)
class Constraint:
    """A point may lose at most `margin` points of `metric` against the parent `of`, on the same items."""

    metric: str
    of: str
    margin: float
    place: str = field(default="", compare=False)

    def document(self) -> dict[str, Any]:
        """As in the file, without its metric."""
        return {"of": self.of, "margin": self.margin}


def _tokens(node: Node) -> int:
    found = TOKENS.fullmatch(node.value) if isinstance(node.value, str) and len(node.value) <= MOST_DIGITS else None
    if found is None or not (count := int(Fraction(found[1]) * TOKEN_UNITS[found[2]])):
        raise node.error(f"{quoted(node.path)} must be a number of tokens such as 300M, not {node.found}")
    return count


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """The end of a search; of several limits, the first that is reached."""

    points: Annotated[Count | None, "points that are asked"] = None
    tokens: Annotated[
        int | None,
        Reads(
            _tokens,
            {"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"^{TOKENS.pattern}$"}]},
        ),
        "tokens that points and parents read, such as 300M",
    ] = None
    hours: Annotated[
        float | None,
        Between(10**6, "give the hours of work as a number above 0"),
        "hours of one worker, by the recorded seconds of the answers",
    ] = None


def read_space(node: Node) -> Space:
    """The space under `over:`."""
    entries = node.mapping()
    if not entries:
        raise node.error("the search has no axis; give it one under `over:`")
    axes: list[Axis] = []
    simplexes: list[tuple[str, ...]] = []
    knots: dict[str, tuple[str, ...]] = {}
    subsets: dict[str, tuple[str, ...]] = {}
    for name, entry in entries.items():
        found = _axes(name, entry)
        if twice := next((axis for axis in found if axis.name in {known.name for known in axes}), None):
            raise entry.error(f"the axis {quoted(twice.name)} is defined twice")
        axes += found
        names = tuple(axis.name for axis in found)
        if name == "simplex":
            simplexes.append(names)
        elif entry.kind == "mapping":
            of = knots if "knots" in entry.mapping() else subsets if "subset" in entry.mapping() else {}
            of[name] = names
    return Space(tuple(axes), tuple(simplexes), knots, subsets)


def _axes(name: str, node: Node) -> list[Axis]:
    if name == "simplex":
        names, step = read_simplex(node)
        shares = tuple(step * count for count in range((1 / step).numerator + 1))
        return [Axis(axis, shares, "numbers", node.place) for axis in names]
    check_axis_name(name, node)
    if node.kind == "list":
        kinds = {entry.kind for entry in node.sequence()}
        if kinds != {"number"} and kinds != {"string"}:
            raise node.error(f"the axis {quoted(name)} must hold numbers alone or words alone; put numbers in quotes")
        words = tuple(entry.string() if entry.kind == "string" else entry.number() for entry in node.sequence())
        check_distinct(name, words, node)
        if kinds == {"string"}:
            return [Axis(name, words, "words", node.place)]
        return [_numbers(name, tuple(map(_number, words)), node)]
    if node.kind != "mapping":
        raise node.error(
            f"the axis {quoted(name)} must be a list, {{from, to, step}}, {{knots, from, to, step}} or {{subset: […]}}"
        )
    keys = node.mapping(("from", "to", "step", "num", "knots", "subset"))
    if "subset" in keys:
        members = [entry.string() for entry in node.mapping(("subset",))["subset"].sequence()]
        if len(members) < 2 or len({*members}) < len(members):
            raise keys["subset"].error("a subset needs two or more different models")
        return [Axis(f"{name}.{member}", (Fraction(0), Fraction(1)), "numbers", node.place) for member in members]
    spread = replace(node, value={key: entry for key, entry in keys.items() if key != "knots"})
    count, numbers = read_range(spread)
    if count > MOST_VALUES:
        raise node.error(f"the axis {quoted(name)} has {count} values; at most {MOST_VALUES}, take a longer step")
    axis = _numbers(name, tuple(numbers), node)
    if "knots" not in keys:
        return [axis]
    many = keys["knots"].integer(minimum=2)
    if many > MOST_KNOTS:
        raise keys["knots"].error(f"at most {MOST_KNOTS} knots, not {many}; take fewer")
    return [replace(axis, name=f"{name}.{number}") for number in range(many)]


def _numbers(name: str, values: tuple[Fraction, ...], node: Node) -> Axis:
    ascending = tuple(sorted(values))
    if len({format_number(value) for value in ascending}) < len(ascending):
        raise node.error(f"two values of {quoted(name)} have one name; take steps of at most 12 decimals")
    return Axis(name, ascending, "numbers", node.place)


def _number(value: Value) -> Fraction:
    assert isinstance(value, Fraction), "an axis of numbers"
    return value


def _written(value: Value) -> str:
    return value if isinstance(value, str) else format_number(value)


def _start(node: Node, space: Space) -> Choice:
    """One point of `start:`. A group of knots is one number or a list, a subset is the list of its members."""
    axes = {axis.name: axis for axis in space.axes}
    given = node.mapping([*space.knots, *space.subsets, *axes])
    if not given:
        axis = next(iter(axes))
        raise node.error(f"a point of `start:` names no axis; give a value as `{axis}: …`, or take the point out")
    chosen = dict(zip(axes, space.middle(), strict=True))
    for name, entry in given.items():
        if name in space.subsets:
            members = [f"{name}.{member.string()}" for member in entry.sequence()]
            if unknown := next((member for member in members if member not in space.subsets[name]), None):
                known = [member.removeprefix(f"{name}.") for member in space.subsets[name]]
                raise entry.error(
                    f"{quoted(unknown.removeprefix(f'{name}.'))} is not in the subset"
                    f"{suggestion(unknown.removeprefix(f'{name}.'), known)}"
                )
            chosen |= {axis: int(axis in members) for axis in space.subsets[name]}
            continue
        names = space.knots.get(name, (name,))
        values = entry.sequence() if name in space.knots and entry.kind == "list" else (entry,) * len(names)
        if len(values) != len(names):
            raise entry.error(f"{quoted(name)} has {len(names)} knots; give one number, or {len(names)}")
        for axis, value in zip(names, values, strict=True):
            chosen[axis] = _index(axes[axis], value)
    choice = tuple(chosen[name] for name in axes)
    if not space.admits(choice):
        raise node.error("the weights of a simplex must sum to 1; give each of its axes a value")
    return choice


def _index(axis: Axis, node: Node) -> int:
    value: Value = node.string() if axis.kind == "words" else node.number()
    if value in axis.values:
        return axis.values.index(value)
    if axis.kind == "words":
        near = suggestion(_written(value), [*map(_written, axis.values)])
        raise node.error(f"{_written(value)} is not a value of {axis.name}{near}")
    nearest = min(axis.values, key=lambda known: abs(_number(known) - _number(value)))
    raise node.error(f"{_written(value)} is not a value of {axis.name}; the nearest is {_written(nearest)}")


def metrics() -> tuple[str, ...]:
    """The figures that a search can name, without a length."""
    return ("score", "output_tokens", *SPECS)


def _metric(node: Node, text: str) -> Objective:
    found = METRIC.fullmatch(text)
    if found is None or found["name"] not in metrics():
        near = suggestion(found["name"] if found else text, metrics())
        raise node.error(f"{quoted(text)} is not a figure of a point{near}")
    name = found["name"] if found["length"] is None else f"{found['name']}@{int(found['length'])}"
    return Objective(name, -1 if found["sign"] else 1, node.place)


def _objectives(node: Node) -> tuple[Objective, ...]:
    entries = node.sequence() if node.kind == "list" else (node,)
    found = tuple(_metric(entry, entry.string()) for entry in entries)
    if len({objective.metric for objective in found}) < len(found):
        raise node.error("a figure is listed twice; keep one")
    return found


def _objectives_schema() -> dict[str, Any]:
    metric = {"type": "string", "pattern": f"^-?({'|'.join(metrics())})(@[0-9]+)?$"}
    return {"anyOf": [metric, {"type": "array", "items": metric, "minItems": 1, "uniqueItems": True}]}


def _constraints(node: Node) -> tuple[Constraint, ...]:
    found: list[Constraint] = []
    if not node.mapping():
        raise node.error("`at_least:` names no figure; give one as `needle: {of: fmt, margin: 1.0}`, or take it out")
    for name, entry in node.mapping().items():
        metric = _metric(entry, name)
        if metric.metric.startswith("output_tokens"):
            raise entry.error("a constraint holds a score; name -output_tokens under `maximize:`")
        if metric.sign < 0:
            raise entry.error(f"a constraint holds a figure up; write {quoted(metric.metric)}")
        if metric.metric in {known.metric for known in found}:
            raise entry.error(f"{quoted(metric.metric)} is constrained twice; keep one")
        keys = entry.mapping(("of", "margin"), ("of",))
        margin = float(keys["margin"].number(minimum=0)) if "margin" in keys else 1.0
        if margin >= 100:
            raise keys["margin"].error("a margin is a number of points below 100, such as 1.0")
        found.append(Constraint(metric.metric, keys["of"].string(), margin, keys["of"].place))
    return tuple(found)


def _constraints_schema() -> dict[str, Any]:
    properties = {"of": {"type": "string"}, "margin": {"type": "number", "minimum": 0, "exclusiveMaximum": 100}}
    entry = {"type": "object", "properties": properties, "required": ["of"], "additionalProperties": False}
    names = {"pattern": f"^({'|'.join(('score', *SPECS))})(@[0-9]+)?$"}
    return {"type": "object", "propertyNames": names, "additionalProperties": entry, "minProperties": 1}


def _budget(node: Node) -> Budget:
    budget = read_spec(Budget, node)
    if budget == Budget():
        raise node.error("a search needs an end; give `budget: {points: 60}`, or tokens, or hours")
    return budget


def _budget_schema() -> dict[str, Any]:
    return schema_of(Budget) | {"anyOf": [{"required": [entry.name]} for entry in fields_of(Budget)]}


def _batch(node: Node) -> int:
    count = node.integer(minimum=1)
    if count > MOST_IN_BATCH:
        raise node.error(f"at most {MOST_IN_BATCH} points a batch, not {count}; take fewer")
    return count


def space_schema() -> dict[str, Any]:
    """The JSON Schema of `over:`."""
    grid, knotted, plain = grid_schema()["anyOf"][0], range_schema(), range_schema()
    knotted["properties"] |= {"knots": {"type": "integer", "minimum": 2, "maximum": MOST_KNOTS}}
    knotted["required"] = ["knots", *knotted["required"]]
    names = {"type": "array", "items": {"type": "string"}, "minItems": 2, "uniqueItems": True}
    subset = {"type": "object", "properties": {"subset": names}, "required": ["subset"], "additionalProperties": False}
    numbers = {"type": "array", "items": {"type": "number"}, "minItems": 1, "uniqueItems": True}
    words = numbers | {"items": {"type": "string"}}
    return {"anyOf": [grid | {"additionalProperties": {"anyOf": [numbers, words, plain, knotted, subset]}}]}


By = Literal["auto", "cma-es", "gp", "greedy", "random", "sobol"]


def _later(node: Node) -> tuple[Choice, ...]:
    """`read_search` reads the points of the first batch, by the space."""
    return ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSpec:
    """A search over a space: batches of points, each proposed by the scores of the points before."""

    space: Annotated[Space, Key("over"), Reads(read_space, space_schema), "the axes"]
    maximize: Annotated[
        Sequence[Objective],
        Reads(_objectives, _objectives_schema),
        "figures that should be large, `-` before one that should be small; several make a front",
    ] = (Objective("score"),)
    at_least: Annotated[
        Sequence[Constraint],
        Reads(_constraints, _constraints_schema),
        "points that a figure may lose against a parent, as `{needle: {of: fmt, margin: 1.0}}`",
    ] = ()
    by: Annotated[
        By, "how points are proposed; auto: gp up to 12 axes of numbers, beyond cma-es, or sobol beside words"
    ] = "auto"
    budget: Annotated[Budget, Reads(_budget, _budget_schema), "the end of the search"]
    batch: Annotated[
        int,
        Reads(_batch, {"type": "integer", "minimum": 1, "maximum": MOST_IN_BATCH}),
        "points that are proposed together",
    ] = 8
    start: Annotated[
        Sequence[Choice],
        Reads(
            _later,
            {"type": "array", "items": {"type": "object", "minProperties": 1}, "minItems": 1},
        ),
        "points of the first batch; an axis that is left out has its middle value, or its first word",
    ] = ()
    place: str = field(default="", compare=False)
    plain: Any = field(default=None, compare=False, repr=False)

    def document(self) -> Any:
        """The section as it was written: it reads back as the same."""
        return self.plain


def read_search(node: Node) -> SearchSpec:
    """The section at `node`."""
    spec = read_spec(SearchSpec, node, given={"plain": node.plain()})
    keys = node.mapping()
    words = [axis for axis in spec.space.axes if axis.kind == "words" and len(axis.values) > 1]
    if spec.by == "cma-es" and words:
        raise keys["by"].error(
            f"cma-es draws numbers, and {quoted(words[0].name)} has words; take gp or sobol, or take the axis out"
        )
    if spec.by == "cma-es" and spec.space.size == 1:
        raise keys["by"].error("the space has one point; take sobol")
    if spec.by == "greedy":
        _check_greedy(spec, keys)
    if "start" not in keys:
        return spec
    start = tuple(_start(entry, spec.space) for entry in keys["start"].sequence())
    for number, choice in enumerate(start):
        if choice in start[:number]:
            raise keys["start"].sequence()[number].error("this point is in `start:` already; take it out")
    if len(start) > spec.batch:
        raise keys["start"].error(
            f"`start:` has {len(start)} points, and the first batch {spec.batch}; take a larger `batch:`, or fewer"
        )
    if spec.budget.points is not None and len(start) > spec.budget.points:
        raise keys["start"].error(
            f"`start:` has {len(start)} points, and the budget {spec.budget.points}; take some of them out"
        )
    return replace(spec, start=start)


def _check_greedy(spec: SearchSpec, keys: Mapping[str, Node]) -> None:
    """That the search is over one subset alone, for one score."""
    tied = {name for names in spec.space.subsets.values() for name in names}
    others = [axis.name for axis in spec.space.axes if axis.name not in tied and len(axis.values) > 1]
    if len(spec.space.subsets) != 1:
        raise keys["by"].error("greedy decides over one subset; give one alone, as `soup: {subset: [a, b, c]}`")
    if others:
        raise keys["by"].error(f"greedy decides over one subset, and nothing else; take {quoted(others[0])} out")
    if len(spec.maximize) > 1 or spec.maximize[0].sign < 0 or spec.maximize[0].metric.startswith("output_tokens"):
        raise keys["maximize"].error("greedy maximises one score; name one, such as score")
    for key in ("at_least", "start"):
        if key in keys:
            raise keys[key].error(f"greedy begins with each model alone, and keeps no constraint; take `{key}:` out")
    most, models = spec.budget.points, len(tied)
    if most is not None and most <= models:
        raise keys["budget"].error(
            f"greedy asks {models} models alone and then soups, and the budget has {most} points; give {2 * models - 1}"
        )


def search_schema() -> dict[str, Any]:
    """The JSON Schema of the section."""
    return schema_of(SearchSpec)


# ---- points of a space


class SearchedRecipe:
    """The recipe of a search: `point` makes one point, `kinds` has one point of each kind.

    Points of one kind differ in numbers alone, so that they share parents, method and layout. The first point with a
    name has it alone: make points in the order of asking, and `unnamed` ones of those that may not be asked.
    """

    def __init__(
        self, node: Node, space: Space, naming: Node | None, trajectories: Trajectories, parents: Sequence[str]
    ) -> None:
        self._made_of = node, space, naming, trajectories, parents
        self._node, self._space, self._trajectories = node, space, trajectories
        self._naming = None if naming is None else name_template(naming.string(), naming.place)
        self._templates: dict[tuple[tuple[str, ...], ...], StagesTemplate] = {}
        self._taken: dict[str, Choice | None] = dict.fromkeys(parents)
        self._names: dict[Choice, str] = {}
        self._check_used()
        if self._naming is not None:
            self._check_naming(self._naming)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy is made anew of the same documents: templates hold functions, which cannot be pickled."""
        return SearchedRecipe, self._made_of

    def anew(self) -> SearchedRecipe:
        """The same recipe, its names as before the first point that is asked."""
        other = SearchedRecipe.__new__(SearchedRecipe)
        other.__dict__.update(self.__dict__)
        other._taken, other._names = dict.fromkeys(self._made_of[-1]), {}
        other.kinds()
        return other

    def point(self, choice: Choice) -> Point:
        """The point of this choice; its name is its own among all that were made here."""
        return replace(self.unnamed(choice), name=self._name(choice))

    def unnamed(self, choice: Choice) -> Point:
        """The point of this choice, which takes no name."""
        bound = self._space.bindings(choice)
        return Point("unnamed", bound, *self.template(choice).bind(bound, self._trajectories))

    def named(self, choice: Choice, name: str) -> bool:
        """Gives a choice the name that it has in the files of a run; whether no other choice or parent has it."""
        if self._names.setdefault(choice, name) != name or self._taken.setdefault(name, choice) != choice:
            return False
        return POINT_NAME.fullmatch(name) is not None

    def _name(self, choice: Choice) -> str:
        if choice not in self._names:
            described = self._space.described(choice)
            name = described if self._naming is None else self._naming.render(self._space.bindings(choice))
            if self._naming is None and not POINT_NAME.fullmatch(name):
                name = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", name)
            if not POINT_NAME.fullmatch(name) or self._taken.setdefault(name, choice) != choice:
                name = f"point-{digest(described)[:16]}"
            self._names[choice] = name
        return self._names[choice]

    def template(self, choice: Choice) -> StagesTemplate:
        """The recipe with the models of its subsets, whose placeholders wait for the values of the axes."""
        members = self._space.members(choice)
        key = tuple(members.values())
        if key not in self._templates:
            self._templates[key] = stages_template(_unfolded(self._node, self._space, members))
        return self._templates[key]

    def kinds(self) -> tuple[Point, ...]:
        """One point of each kind, in the order of the axes; `BadInput` where there are too many kinds."""
        space, middle = self._space, self._space.middle()
        deciding = self._deciding()
        count = prod(map(space.count, deciding))
        if count > MOST_KINDS:
            place = next(axis.place for axis in space.axes if axis.name == deciding[0][0])
            raise BadInput(
                f"{place}: words, checkpoints, subsets and the axes of merges that feed others make {count} kinds of"
                f" merges; at most {MOST_KINDS}, take some of them out"
            )
        points: list[Point] = []
        names = [name for group in deciding for name in group]
        for values in itertools.product(*map(space.choices, deciding)):
            chosen = dict(zip(names, itertools.chain(*values), strict=True))
            choice = (chosen.get(axis.name, index) for axis, index in zip(space.axes, middle, strict=True))
            points.append(self.point(tuple(choice)))
        return tuple(points)

    def words(self, point: Point) -> tuple[Value, ...]:
        """The values of a point that choose its method, its models and its files."""
        outside = _names_outside_parameters(self._node)
        return tuple(value for name, value in point.bindings.items() if {name, name.partition(".")[0]} & outside)

    def _deciding(self) -> list[tuple[str, ...]]:
        """The groups of axes whose values make kinds of points."""
        names, subsets = _names_of_kinds(self._node), self._space.subsets.values()
        in_stages = isinstance(self._node.value, tuple)  # each choice of a subset has merges of its own
        return [
            group
            for group in self._space.groups
            if any({name, name.partition(".")[0]} & names for name in group) or (in_stages and group in subsets)
        ]

    def others_of_kind(self, point: Point, start: Sequence[Choice]) -> Iterator[Point]:
        """Other points that differ from this one in numbers alone: of `start`, the ends, and 64 drawn ones; unnamed."""
        space, numbers = self._space, random.Random(0)
        bound = {name: point.bindings[name] for group in self._deciding() for name in group}
        drawn = (_drawn(space, numbers) for _ in range(64))
        seen = {tuple(axis.values.index(point.bindings[axis.name]) for axis in space.axes)}
        for choice in itertools.chain(start, space.ends().values(), drawn):
            moved = tuple(
                axis.values.index(bound[axis.name]) if axis.name in bound else index
                for axis, index in zip(space.axes, choice, strict=True)
            )
            if space.admits(moved) and moved not in seen:
                seen.add(moved)
                yield self.unnamed(moved)

    def _check_used(self) -> None:
        space = self._space
        names = [axis.name for axis in space.axes]
        template = self.template(space.middle())
        used = frozenset[str]().union(*(placeholder.names for placeholder in template.placeholders))
        used |= {
            name for group in _names_outside_parameters(self._node) & {*space.subsets} for name in space.subsets[group]
        }
        for placeholder in template.placeholders:
            for name in sorted(placeholder.names - {*names}):
                raise BadInput(f"{placeholder.place}: unknown axis {quoted(name)}{suggestion(name, names)}")
        for axis in space.axes:
            if axis.name not in used:
                raise BadInput(
                    f"{axis.place}: the axis {quoted(axis.name)} is used nowhere in the recipe; write ${{{axis.name}}}"
                    " there"
                )

    def _check_naming(self, naming: Template) -> None:
        names = [axis.name for axis in self._space.axes]
        for name in sorted(naming.names - {*names}):
            raise BadInput(f"{naming.place}: unknown axis {quoted(name)}{suggestion(name, names)}")
        for axis in self._space.axes:
            if len(axis.values) > 1 and axis.name not in naming.names:
                raise BadInput(
                    f"{naming.place}: points that differ in {axis.name} alone would have one name; write"
                    f" {{{axis.name}}} there, or take `point:` out"
                )


def _drawn(space: Space, numbers: random.Random) -> Choice:
    """A point of the space: each axis by itself, the steps of a simplex cut at random places."""
    chosen = {axis.name: numbers.randrange(len(axis.values)) for axis in space.axes}
    for group in space.simplexes:
        steps = space.length(group) - 1
        cuts = [0, *sorted(numbers.randint(0, steps) for _ in group[1:]), steps]
        chosen |= {name: after - before for name, (before, after) in zip(group, itertools.pairwise(cuts), strict=True)}
    return tuple(chosen[axis.name] for axis in space.axes)


def _unfolded(node: Node, space: Space, members: Mapping[str, Sequence[str]]) -> Node:
    """The recipe with a model for each member of a subset, and a gradient of `${layers.0}`, … for `${layers}`."""
    if isinstance(node.value, tuple):
        return replace(node, value=tuple(_unfolded(each, space, members) for each in _in_full(node.value, members)))
    if not isinstance(node.value, str):
        return replace(node, value={key: _unfolded(each, space, members) for key, each in node.value.items()})
    used = [group for group in space.knots if _uses(node.value, group)]
    if not used:
        return node
    counts = {len(space.knots[group]) for group in used}
    if len(counts) > 1:
        raise node.error(f"{' and '.join(used)} have different numbers of knots; give them the same")
    texts = [_with_knot(node.value, used, number) for number in range(counts.pop())]
    return replace(node, value=tuple(replace(node, value=text, quoted=True) for text in texts))


def _in_full(nodes: Sequence[Node], members: Mapping[str, Sequence[str]]) -> Iterator[Node]:
    for node in nodes:
        model = node.value.get("model") if isinstance(node.value, Mapping) else None
        text = model.value.strip() if model is not None and isinstance(model.value, str) else ""
        group = text[2:-1].strip() if text.startswith("${") and text.endswith("}") else ""
        if model is None or group not in members or not isinstance(node.value, Mapping):
            yield node
            continue
        for member in members[group]:
            yield replace(node, value={**node.value, "model": replace(model, value=member, quoted=True)})


def _uses(text: str, name: str) -> bool:
    return any(re.search(_alone(name), inner) for inner in PLACEHOLDER.findall(text))


def _with_knot(text: str, groups: Sequence[str], number: int) -> str:
    def knot(found: re.Match[str]) -> str:
        inner = found[1]
        for group in groups:
            inner = re.sub(_alone(group), f"{group}.{number}", inner)
        return f"${{{inner}}}"

    return PLACEHOLDER.sub(knot, text)


def _alone(name: str) -> str:
    return rf"(?<![\w.]){re.escape(name)}(?![\w.])"


def _names_of_kinds(node: Node) -> set[str]:
    """The axes that make kinds of points: those outside parameters, and all of the merges that feed others."""
    feeding = node.value[:-1] if isinstance(node.value, tuple) else ()
    return _names_outside_parameters(node).union(*(_names_outside_parameters(each, but="") for each in feeding))


def _names_outside_parameters(node: Node, but: str = "parameters") -> set[str]:
    """The axes in texts that are not below `parameters:`: those that choose method, models and files."""
    if isinstance(node.value, tuple):
        return {name for each in node.value for name in _names_outside_parameters(each, but)}
    if not isinstance(node.value, str):
        inside = [each for key, each in node.value.items() if key != but]
        return {name for each in inside for name in _names_outside_parameters(each, but)}
    return {name for inner in PLACEHOLDER.findall(node.value) for name in REFERENCE.findall(inner)}
