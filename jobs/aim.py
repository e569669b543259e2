"""The key `aim:` of a recipe: statistics of the base's activations, and how far they shrink task vectors."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from jobs.errors import BadInput
from jobs.expressions import Bindings, Template
from jobs.sources import Reader, bound_text
from jobs.yaml_nodes import Node

OMEGA = Fraction(2, 5)
"""The paper's ω: 0.2 to 0.6 are near to each other there."""


@dataclass(frozen=True, slots=True)
class Aim:
    """The file of `mergeyard measure --what means`, and ω: the part of a task vector that stays in its top channel."""

    statistics: str
    omega: Fraction

    def document(self) -> dict[str, Any]:
        """The value of `aim:`."""
        whole = self.omega.denominator == 1
        return {"statistics": self.statistics, "omega": self.omega.numerator if whole else float(self.omega)}


@dataclass(frozen=True, slots=True)
class AimTemplate:
    """The same where placeholders wait for values."""

    statistics: str | Template
    omega: Fraction | Template
    place: str

    def bind(self, bindings: Bindings) -> Aim:
        """The value at one point; `BadInput` unless ω is a number from 0 to 1."""
        omega = self.omega.bind(bindings) if isinstance(self.omega, Template) else self.omega
        if isinstance(omega, str | bool):
            raise BadInput(f"{self.place}: omega is a number, not {omega}")
        if not 0 <= omega <= 1:
            raise BadInput(f"{self.place}: omega {float(omega):g} is outside [0, 1]; 1 leaves task vectors as they are")
        return Aim(bound_text(self.statistics, bindings), omega)


def aim_template(node: Node, reader: Reader) -> AimTemplate:
    """The value of `aim:` that stands at `node`."""
    keys = node.mapping(("statistics", "omega"), ("statistics",))
    statistics = reader.text(keys["statistics"])
    if "omega" not in keys:
        return AimTemplate(statistics, OMEGA, node.place)
    omega = reader.value(keys["omega"])
    if isinstance(omega, bool) or not isinstance(omega, Fraction | Template):
        raise keys["omega"].error("omega is a number, such as 0.4, or a placeholder")
    return AimTemplate(statistics, omega, keys["omega"].place)


def aim_schema() -> dict[str, Any]:
    """The JSON Schema of the value of `aim:`."""
    statistics = {
        "type": "string",
        "minLength": 1,
        "description": "URL or path of the file of `mergeyard measure --what means`",
    }
    omega = {"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, {"type": "string", "minLength": 1}]}
    return {
        "type": ["object", "null"],
        "properties": {"statistics": statistics, "omega": omega},
        "required": ["statistics"],
        "additionalProperties": False,
    }
