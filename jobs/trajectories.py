"""The checkpoints of one training run as parents, and windows of them as models of a recipe.

    parents:
      step: {url: "s3://bucket/run/step-{n}", n: {from: 1000, to: 20000, step: 1000}}

is the parents `step-1000`, `step-2000` … `step-20000`. A recipe names one of them as `step-1000` or `step[-1]`, and in
its list of models several as `step[-8:]`: a slice of Python over the checkpoints, the oldest first.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

from jobs.errors import BadInput
from jobs.expressions import evaluate, format_number
from jobs.ranges import range_schema, read_range
from jobs.yaml_nodes import NUMBER, Node, quoted, suggestion

Trajectories = Mapping[str, tuple[str, ...]]
"""The parents of each trajectory, the oldest first."""

NO_TRAJECTORIES: Trajectories = {}

AGE = "age"
"""The name in the expressions of a window: 0 for its newest checkpoint, 1 for the one before."""

SHAPES = ("uniform", "linear", "cosine", "1-sqrt", "ema")
"""The weights of a window that have a name."""

DEFAULT_ALPHA = Fraction(1, 5)
"""The weight of the newest checkpoint in an exponential moving average."""

MAX_CHECKPOINTS = 1000
WINDOW = re.compile(r"([^\[\]]+)\[([^\[\]]*)\]")
_NUMBER_IN_URL = re.compile(r"\{n(?::0(\d{1,2})d?)?\}")
_EXACT = 10**12


def read_parents(node: Node, name: re.Pattern[str]) -> tuple[dict[str, str], dict[str, tuple[str, ...]]]:
    """(the URL of each parent, the trajectories); names of parents match `name`."""
    entries = node.mapping()
    if not entries:
        raise node.error("the job has no parents; name at least one")
    parents: dict[str, str] = {}
    trajectories: dict[str, tuple[str, ...]] = {}
    for key, entry in entries.items():
        if not name.fullmatch(key):
            raise entry.error(f"{quoted(key)} cannot name a parent; letters, digits and . _ -")
        if entry.kind != "mapping":
            named = {key: entry.string()}
        else:
            named = _checkpoints(key, entry)
            trajectories[key] = tuple(named)
        for parent, url in named.items():
            if parent in parents or (parent in entries and parent != key):
                raise entry.error(f"two parents are called {quoted(parent)}; rename {quoted(key)}")
            parents[parent] = url
    return parents, trajectories


def parents_document(parents: Mapping[str, str], trajectories: Trajectories) -> dict[str, Any]:
    """The parents as plain data that `read_parents` reads: of a trajectory, the URL of each number."""
    of = {parent: name for name, members in trajectories.items() for parent in members}
    document: dict[str, Any] = {}
    for parent, url in parents.items():
        if (name := of.get(parent)) is None:
            document[parent] = url
        else:
            document.setdefault(name, {})[parent.removeprefix(f"{name}-")] = url
    return document


def parents_schema(name: re.Pattern[str]) -> dict[str, Any]:
    """The JSON Schema of `parents:`."""
    url = {"type": "string", "minLength": 1}
    numbers = {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 1, "uniqueItems": True}
    trajectory = {
        "type": "object",
        "properties": {
            "url": url | {"pattern": _NUMBER_IN_URL.pattern},
            "n": {"anyOf": [numbers, range_schema()]},
        },
        "required": ["url", "n"],
        "additionalProperties": False,
    }
    listed = {
        "type": "object",
        "propertyNames": {"pattern": f"^{NUMBER.pattern}$"},
        "additionalProperties": url,
        "minProperties": 1,
    }
    return {
        "type": "object",
        "minProperties": 1,
        "propertyNames": {"pattern": f"^{name.pattern}$"},
        "additionalProperties": {"anyOf": [url, trajectory, listed]},
    }


def _checkpoints(name: str, node: Node) -> dict[str, str]:
    """The URL of each parent of a trajectory, by number."""
    entries = node.mapping()
    if entries and all(NUMBER.fullmatch(key) for key in entries):
        urls = {_number(Fraction(key), entry): entry.string() for key, entry in entries.items()}
        if len(urls) < len(entries):
            raise node.error("a number of the trajectory stands there twice")
    else:
        keys = node.mapping(("url", "n"), ("url", "n"))
        if "{" not in keys["url"].string():
            raise keys["url"].error("all checkpoints would have one URL; write {n} where the number stands")
        urls = {number: _url(keys["url"], number) for number in _numbers(keys["n"])}
    if len(urls) > MAX_CHECKPOINTS:
        raise node.error(f"{len(urls)} checkpoints are too many; at most {MAX_CHECKPOINTS}")
    return {f"{name}-{format_number(number)}": urls[number] for number in sorted(urls)}


def _numbers(node: Node) -> list[Fraction]:
    if node.kind == "mapping":
        count, numbers = read_range(node)
        if count > MAX_CHECKPOINTS:
            raise node.error(f"{count} checkpoints are too many; at most {MAX_CHECKPOINTS}")
        return [_number(number, node) for number in numbers]
    found = [_number(entry.number(), entry) for entry in node.sequence()]
    for number, entry in zip(found, node.sequence(), strict=True):
        if found.count(number) > 1:
            raise entry.error(f"the number {format_number(number)} is listed twice")
    return found


def _number(number: Fraction, node: Node) -> Fraction:
    if number < 0 or Fraction(format_number(number)) != number:
        raise node.error(f"{format_number(number)} cannot number a checkpoint; take numbers ≥ 0 of at most 12 decimals")
    return number


def _url(node: Node, number: Fraction) -> str:
    pieces = _NUMBER_IN_URL.split(node.string())
    if any("{" in piece or "}" in piece for piece in pieces[::2]):
        raise node.error(
            f"the braces in {quoted(node.string())} are not {{n}}; write {{n}}, or {{n:06d}} for six digits"
        )
    for index, digits in enumerate(pieces[1::2]):
        if digits is not None and number.denominator != 1:
            raise node.error(f"{format_number(number)} has no {digits} digits; write {{n}}, or take whole numbers")
        pieces[2 * index + 1] = format_number(number).zfill(int(digits or 0))
    return "".join(pieces)


def one_of(text: str, trajectories: Trajectories, place: str) -> str:
    """The model that `text` names: the checkpoint of `step[-1]`, and any other name as it is."""
    members = window(text, trajectories, place)
    if members is None:
        return text
    if isinstance(members, str):
        return members
    raise BadInput(f"{place}: {quoted(text)} is a window, and one model stands here; write {_newest(text)}")


def window(text: str, trajectories: Trajectories, place: str) -> tuple[str, ...] | str | None:
    """The parents of `step[-8:]`, in the slice's order; the parent of `step[-1]`; None for other names."""
    if text in trajectories:
        count = len(trajectories[text])
        raise BadInput(
            f"{place}: {quoted(text)} is a trajectory of {count} checkpoints; write {text}[-1] for the newest,"
            f" or in `models:` {text}[-{min(8, count)}:] for several"
        )
    match = WINDOW.fullmatch(text) if trajectories else None
    if match is None:
        return None
    name, inside = match[1], match[2]
    if name not in trajectories:
        near = suggestion(name, trajectories)
        raise BadInput(f"{place}: {quoted(name)} in {quoted(text)} is not a trajectory of `parents:`{near}")
    members = trajectories[name]
    bounds = [_bound(part.strip(), text, place) for part in inside.split(":")]
    if len(bounds) == 1 and bounds[0] is not None:
        if not -len(members) <= bounds[0] < len(members):
            raise BadInput(f"{place}: {quoted(text)} is outside of the {len(members)} checkpoints of {quoted(name)}")
        return members[bounds[0]]
    if not 2 <= len(bounds) <= 3 or bounds[2:] == [0]:
        raise BadInput(f"{place}: {quoted(text)} is not a slice; write {name}[-1], or for several {name}[-8:]")
    if not (found := members[slice(*bounds)]):
        raise BadInput(
            f"{place}: {quoted(text)} holds none of the {len(members)} checkpoints of {quoted(name)}; write {name}[-8:]"
        )
    return found


def is_window(text: str) -> bool:
    """Whether a model's text, perhaps with placeholders, is a slice."""
    match = WINDOW.fullmatch(text)
    return match is not None and ":" in match[2]


def _bound(text: str, slice_text: str, place: str) -> int | None:
    if re.fullmatch(r"-0+", text):
        raise BadInput(f"{place}: in {quoted(slice_text)}, -0 would be the beginning; give a number from 1 on")
    if not re.fullmatch(r"([-+]?\d{1,9})?", text, re.ASCII):
        raise BadInput(f"{place}: {quoted(text)} in {quoted(slice_text)} is not a whole number")
    return int(text) if text else None


def _newest(text: str) -> str:
    return f"{text.partition('[')[0]}[-1]"


def weight(word: str, age: int, size: int, alpha: Fraction, place: str) -> Fraction:
    """The weight of one checkpoint in a window of `size`, for the name of a shape or an expression of the age."""
    if word in SHAPES:
        return shape_weights(word, size, alpha)[size - 1 - age]
    if re.fullmatch(r"[\w-]*[^\W\d][\w-]*", word) and word != AGE:
        near = suggestion(word, SHAPES)
        raise BadInput(
            f"{place}: the weight of a window is a shape or an expression of the age, not {quoted(word)}{near}"
        )
    value = evaluate(word, {AGE: Fraction(age)}, place)
    assert isinstance(value, Fraction), "an age is a number"
    return value


@lru_cache(maxsize=1024)
def shape_weights(shape: str, size: int, alpha: Fraction = DEFAULT_ALPHA) -> tuple[Fraction, ...]:
    """The weights of a window of `size` checkpoints, the oldest first; they sum to 1.

    A learning rate that decays by a curve d from d(0) = 1 to d(1) = 0 takes of the update before checkpoint i of k only
    the share d(i/k). The average that equals this has the weights d(i/k) − d((i+1)/k), i = 0 … k−1: WSM
    (arXiv 2507.17634, theorem 3.1), and `schedule_to_merge_coefficients` of Megatron-LM's weighted_merge.py, which has
    `linear` and `minus-sqrt`. `linear` is d(x) = 1 − x, and therefore the same as `uniform`; `cosine` is
    (1 + cos πx)/2 and `1-sqrt` is 1 − √x, both rounded to 12 decimals. `ema` is the moving average
    M ← α·θ + (1 − α)·M, which begins with the oldest checkpoint (PMA, arXiv 2505.12082).
    """
    if shape in ("uniform", "linear"):
        return (Fraction(1, size),) * size
    if shape == "ema":
        return ((1 - alpha) ** (size - 1), *(alpha * (1 - alpha) ** age for age in range(size - 2, -1, -1)))
    curve = [_decay(shape, index / size) for index in range(size)] + [Fraction(0)]
    return tuple(here - later for here, later in pairwise(curve))


def _decay(shape: str, x: float) -> Fraction:
    """A decay curve at x; 12 decimals are the same on every machine."""
    value = (1 + math.cos(math.pi * x)) / 2 if shape == "cosine" else 1 - math.sqrt(x)
    return Fraction(round(value * _EXACT), _EXACT)
