"""Ranges of numbers: `{from: 0, to: 1, step: 0.1}` or `{from: 0, to: 1, num: 11}`, both ends included, exact."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from jobs.expressions import format_number
from jobs.yaml_nodes import Node


def read_range(node: Node) -> tuple[int, Iterator[Fraction]]:
    """How many numbers the range at `node` has, and the numbers."""
    keys = node.mapping(("from", "to", "step", "num"), ("from", "to"))
    if ("step" in keys) == ("num" in keys):
        raise node.error("a range needs `step` or `num`, one of the two")
    start, end = keys["from"].number(), keys["to"].number()
    count = _steps(keys["step"], start, end) + 1 if "step" in keys else keys["num"].integer(minimum=1)
    if count == 1 and start != end:
        raise node.error("a range of one value needs `from` and `to` to be equal; or write a list")
    if count > 1 and start == end:
        raise node.error("`from` and `to` are equal; a range of several values needs them to differ")
    return count, (start + (end - start) * index / max(count - 1, 1) for index in range(count))


def range_schema() -> dict[str, Any]:
    """The JSON Schema of a range."""
    number = {"type": "number"}
    return {
        "type": "object",
        "properties": {"from": number, "to": number, "step": number, "num": {"type": "integer", "minimum": 1}},
        "additionalProperties": False,
        "required": ["from", "to"],
        "oneOf": [{"required": ["step"]}, {"required": ["num"]}],
    }


def _steps(node: Node, start: Fraction, end: Fraction) -> int:
    step = node.number()
    if not step:
        raise node.error("a step cannot be 0")
    steps = (end - start) / step
    if steps < 0:
        raise node.error(f"steps of {format_number(step)} lead away from `to`; turn the sign")
    if steps.denominator != 1:
        reached = format_number(start + int(steps) * step)
        raise node.error(
            f"steps of {format_number(step)} from {format_number(start)} miss {format_number(end)}; "
            f"end at {reached}, or give `num` in place of `step`"
        )
    return steps.numerator
