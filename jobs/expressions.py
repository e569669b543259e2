"""Exact arithmetic over axis names: the text between `${` and `}` in a recipe, and `{` and `}` in a point's name.

    sum     = product (("+" | "-") product)*
    product = sign (("*" | "/") sign)*
    sign    = "-" sign | "+" sign | power
    power   = atom ["**" sign]                  an exponent is a whole number from -64 to 64
    atom    = number | axis | "(" sum ")"

An axis may be called anything of letters, digits and `_`, `lambda` included; a dot stands in the axes of a group, as in
`layers.0`. A lone axis name may stand for text.
Nothing here calls `eval`; texts, nesting and results are bounded, so that no expression can take the machine with it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

from jobs.errors import BadInput
from jobs.yaml_nodes import quoted, suggestion

Value = Fraction | str
Bindings = Mapping[str, Value]
AXIS_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)
REFERENCE = re.compile(rf"{AXIS_NAME.pattern}(?:\.\w+)*", re.ASCII)
"""An axis, or one of a group of axes of a search."""
TOKEN = re.compile(
    r"\s*(?:(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d{1,3})?)(?![\w.])|(?P<name>[A-Za-z_]\w*(?:\.\w+)*)|(?P<sign>\*\*|[-+*/()]))",
    re.ASCII,
)
PLACEHOLDER = re.compile(r"\$\{([^{}]*)\}")
NAME_PLACEHOLDER = re.compile(r"\$?\{([^{}]*)\}")
MAX_LENGTH = 200
MAX_PLACEHOLDERS = 100
MAX_NESTING = 20
MAX_POWER = 64
MAX_BITS = 4096
MAX_MAGNITUDE_BITS = 1000  # every result still fits a float
MAX_EXPONENT = 300


class _Unusable(Exception):
    """The fault of an expression, without its place."""


Evaluator = Callable[[Bindings], Fraction]


@dataclass(frozen=True, slots=True)
class Expression:
    """One parsed expression: its text, the axes it needs, and how to compute it."""

    text: str
    names: frozenset[str]
    lone_name: str | None
    compute: Evaluator

    def evaluate(self, bindings: Bindings, place: str) -> Value:
        """The exact value under `bindings`; text only where the expression is an axis name and nothing else."""
        try:
            if self.lone_name is not None:
                return _value_of(self.lone_name, bindings)
            return self.compute(bindings)
        except _Unusable as error:
            raise BadInput(f"{place}: {error} in {quoted(self.text)}") from None


@dataclass(frozen=True, slots=True)
class Template:
    """Text with placeholders, parsed once and bound many times."""

    parts: tuple[str | Expression, ...]
    place: str
    given: frozenset[str] = frozenset()

    @property
    def names(self) -> frozenset[str]:
        """The axes in the placeholders: all names but the `given` ones."""
        used = frozenset[str]().union(*(part.names for part in self.parts if isinstance(part, Expression)))
        return used - self.given

    def bind(self, bindings: Bindings) -> Value:
        """The value itself where the text is exactly one placeholder, else the text with its values written in."""
        first = self.parts[0]
        if len(self.parts) == 1 and isinstance(first, Expression):
            return first.evaluate(bindings, self.place)
        return self.render(bindings)

    def render(self, bindings: Bindings) -> str:
        """The text with its values written in."""
        return "".join(
            part if isinstance(part, str) else _written(part.evaluate(bindings, self.place)) for part in self.parts
        )


def evaluate(text: str, bindings: Bindings, place: str) -> Value:
    """The exact value of `text`; `BadInput` with `place` if it is not arithmetic over the names in `bindings`."""
    return _parsed(text, place).evaluate(bindings, place)


def names(text: str) -> set[str]:
    """The axis names in one expression."""
    return set(_parsed(text, "expression").names)


def template(text: str, place: str, given: frozenset[str] = frozenset()) -> Template | None:
    """`text` with its `${…}` parsed, or None if there are none; `given` are names that are no axes."""
    if "${" not in text:
        return None
    return Template(_parts(text, PLACEHOLDER, place), place, given)


def name_template(text: str, place: str) -> Template:
    """A point's name with its `{…}` (or `${…}`) parsed."""
    return Template(_parts(text, NAME_PLACEHOLDER, place), place)


def render(template: str, bindings: Bindings, place: str) -> str:
    """A point's name from its template with `{…}`."""
    return name_template(template, place).render(bindings)


@lru_cache(maxsize=65536)
def format_number(number: Fraction) -> str:
    """As a person would write it: exact to 12 decimals (`0.7`, `1`, `-2.5`), else 4 significant digits (`0.3333`)."""
    decimals = 12
    if 10**decimals % number.denominator:
        magnitude, digits = 0, 4
        size = abs(number)
        while size >= 10 ** (magnitude + 1):
            magnitude += 1
        while size < Fraction(10) ** magnitude:
            magnitude -= 1
        decimals = digits - 1 - magnitude
    scaled = round(number * Fraction(10) ** decimals)
    if decimals <= 0:
        return str(scaled * 10**-decimals)
    whole, rest = divmod(abs(scaled), 10**decimals)
    return f"{'-' if scaled < 0 else ''}{whole}.{rest:0{decimals}d}".rstrip("0").rstrip(".")


def _written(value: Value) -> str:
    return value if isinstance(value, str) else format_number(value)


def _value_of(name: str, bindings: Bindings) -> Value:
    try:
        return bindings[name]
    except KeyError:
        raise _Unusable(f"unknown axis {quoted(name)}{suggestion(name, bindings.keys())}") from None


def _parts(text: str, placeholder: re.Pattern[str], place: str) -> tuple[str | Expression, ...]:
    pieces = placeholder.split(text)
    if len(pieces) > 2 * MAX_PLACEHOLDERS + 1:
        raise BadInput(f"{place}: more than {MAX_PLACEHOLDERS} placeholders in one text")
    parts: list[str | Expression] = []
    for index, piece in enumerate(pieces):
        if index % 2:
            parts.append(_parsed(piece, place))
        elif "{" in piece and (placeholder is NAME_PLACEHOLDER or "${" in piece):
            raise BadInput(f"{place}: a brace is opened and not closed in {quoted(text)}")
        elif piece:
            parts.append(piece)
    return tuple(parts) or ("",)


def _parsed(text: str, place: str) -> Expression:
    try:
        return _parse(text)
    except _Unusable as error:
        raise BadInput(f"{place}: {error} in {quoted(text)}; use + - * / ** ( ) over axis names and numbers") from None


@lru_cache(maxsize=4096)
def _parse(text: str) -> Expression:
    if len(text) > MAX_LENGTH:
        raise _Unusable(f"more than {MAX_LENGTH} characters")
    tokens = _tokens(text)
    parser = _Parser(tokens)
    compute = parser.sum(0)
    if parser.token():
        raise _Unusable(f"{quoted(parser.token())} is not expected")
    lone = tokens[0] if len(tokens) == 1 and REFERENCE.fullmatch(tokens[0]) else None
    return Expression(text, frozenset(parser.names), lone, compute)


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    position, end = 0, len(text.rstrip())
    while position < end:
        match = TOKEN.match(text, position)
        if match is None:
            raise _Unusable(f"{quoted(text[position:end].strip()[:1])} is not arithmetic")
        tokens.append(match[match.lastgroup or 0])
        position = match.end()
    return tokens


class _Parser:
    """Recursive descent over the grammar at the top of this module."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._position = 0
        self.names: set[str] = set()

    def token(self) -> str:
        return self._tokens[self._position] if self._position < len(self._tokens) else ""

    def sum(self, nesting: int) -> Evaluator:
        left = self._product(nesting)
        while (sign := self.token()) in ("+", "-"):
            self._position += 1
            left = _combined(left, sign, self._product(nesting))
        return left

    def _product(self, nesting: int) -> Evaluator:
        left = self._sign(nesting)
        while (sign := self.token()) in ("*", "/"):
            self._position += 1
            left = _combined(left, sign, self._sign(nesting))
        return left

    def _sign(self, nesting: int) -> Evaluator:
        if nesting > MAX_NESTING:
            raise _Unusable(f"nested more than {MAX_NESTING} deep")
        if (sign := self.token()) in ("+", "-"):
            self._position += 1
            operand = self._sign(nesting + 1)
            return operand if sign == "+" else lambda bindings: -operand(bindings)
        base = self._atom(nesting)
        if self.token() != "**":
            return base
        self._position += 1
        return _combined(base, "**", self._sign(nesting + 1))

    def _atom(self, nesting: int) -> Evaluator:
        token = self.token()
        self._position += 1
        if token == "(":
            inside = self.sum(nesting + 1)
            if self.token() != ")":
                raise _Unusable("a bracket is not closed")
            self._position += 1
            return inside
        if REFERENCE.fullmatch(token):
            self.names.add(token)
            return lambda bindings: _number_of(token, bindings)
        if not token or token in "**/)":
            raise _Unusable(f"{quoted(token)} is not expected" if token else "an operand is missing")
        number = _constant(token)
        return lambda bindings: number


def _constant(token: str) -> Fraction:
    mantissa, _, exponent = token.lower().partition("e")
    if abs(int(exponent or 0)) > MAX_EXPONENT:
        raise _Unusable(f"{quoted(token)} is out of range")
    return Fraction(mantissa) * Fraction(10) ** int(exponent or 0)


def _number_of(name: str, bindings: Bindings) -> Fraction:
    value = _value_of(name, bindings)
    if isinstance(value, str):
        raise _Unusable(f"{quoted(name)} stands for the text {quoted(value)}, which is not a number,")
    return value


def _combined(left: Evaluator, sign: str, right: Evaluator) -> Evaluator:
    operate = OPERATIONS[sign]

    def compute(bindings: Bindings) -> Fraction:
        result = operate(left(bindings), right(bindings))
        above, below = result.numerator.bit_length(), result.denominator.bit_length()
        if above > MAX_BITS or below > MAX_BITS or above - below > MAX_MAGNITUDE_BITS:
            raise _Unusable("a number grows out of range")
        return result

    return compute


def _divide(left: Fraction, right: Fraction) -> Fraction:
    if not right:
        raise _Unusable("division by zero")
    return left / right


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1 or abs(exponent) > MAX_POWER:
        raise _Unusable(f"an exponent must be a whole number from -{MAX_POWER} to {MAX_POWER}")
    if not base and exponent < 0:
        raise _Unusable("division by zero")
    return base**exponent.numerator


OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": lambda left, right: left + right,
    "-": lambda left, right: left - right,
    "*": lambda left, right: left * right,
    "/": _divide,
    "**": _power,
}
