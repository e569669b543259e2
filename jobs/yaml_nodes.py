"""YAML text → `Node`: a cursor that knows its value, its path and the line it stands on.

Strict where a slip would be costly: no tags, no key twice, at most 1 MiB and 32 levels. Anchors,
aliases and merge keys are taken as YAML 1.1 has them; aliases repeat at most 100,000 values. Numbers are read as YAML
1.2 reads them (`1e-6` is a number, `012` is 12, `1:30` is text) and stay exact: `0.7` is `Fraction(7, 10)`. Booleans
are PyYAML's (`true/false`, `yes/no`, `on/off`). Dates are text.
Every refusal is a `BadInput` that begins with `job.yaml:14: `.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from fractions import Fraction
from typing import Any, Literal, NoReturn

import yaml

from jobs.errors import BadInput, printable

MAX_BYTES = 1 << 20
MAX_DEPTH = 32
MAX_REPEATED = 100_000
NULLS = frozenset({"", "~", "null", "Null", "NULL"})
BOOLEANS = {
    spelling: value
    for word, value in {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}.items()
    for spelling in (word, word.capitalize(), word.upper())
}
NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE]([-+]?\d{1,9}))?", re.ASCII)
MAX_NUMBER_LENGTH = 64
MAX_EXPONENT = 308
MAX_NUMBER = 10**300
NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT]i?B|B)", re.ASCII)
SIZE_UNITS = {"B": 1} | {
    f"{letter}{suffix}": base ** (index + 1)
    for suffix, base in (("B", 1000), ("iB", 1024))
    for index, letter in enumerate("KMGT")
}
Kind = Literal["mapping", "list", "string", "number", "boolean", "nothing"]


NEAR = 0.65
"""difflib's ratio from which a word counts as misspelt; that of `cso` and `cos` is 0.67."""


def quoted(text: str, longest: int = 80) -> str:
    """`text` in double quotes on one line, cut at `longest` characters; invisible characters are escaped."""
    shown = json.dumps(text if len(text) <= longest else f"{text[: longest - 3]}...", ensure_ascii=False)
    return printable(shown)


def nearest(name: str, choices: Collection[str]) -> str | None:
    """The choice that `name` is probably a misspelling of."""
    near = difflib.get_close_matches(name[:80], choices, 1, cutoff=NEAR)
    return near[0] if near else None


def suggestion(name: str, choices: Collection[str]) -> str:
    """`; did you mean "weight"?`, or the choices where none is near and they are few, or nothing."""
    if near := nearest(name, choices):
        return f"; did you mean {quoted(near)}?"
    in_order = sorted(choices, key=lambda choice: (len(choice) if choice.isdecimal() else 0, choice))  # 256 before 1024
    return f"; choose from {', '.join(in_order)}" if 0 < len(in_order) <= 24 else ""


def _twice(key: str, first: int) -> str:
    return f"the key {quoted(key)} stands here twice (first on line {first})"


@dataclass(frozen=True, slots=True)
class Node:
    """One value of the document. `line` is the line of its key, or of the value itself inside a list.

    `value` is the scalar's text, the list's nodes or the mapping's nodes by key; `quoted` tells `"0.7"` from `0.7`.
    An alias is the node of its anchor, with the anchor's path and line. `repeated` says that an alias repeats it.
    `earlier` is the line of an earlier value of the same key, where both have anchors; only `without_anchors` takes it.
    """

    value: str | tuple[Node, ...] | Mapping[str, Node]
    quoted: bool
    document: str
    line: int
    path: str
    repeated: bool = field(default=False, compare=False)
    earlier: int = field(default=0, compare=False)

    @property
    def place(self) -> str:
        """File and line, `job.yaml:14`; the document alone where no file holds it."""
        return f"{self.document}:{self.line}" if self.line else self.document

    @property
    def kind(self) -> Kind:
        """The kind of this value in YAML."""
        if isinstance(self.value, tuple):
            return "list"
        if not isinstance(self.value, str):
            return "mapping"
        if self.quoted:
            return "string"
        if self.value in NULLS:
            return "nothing"
        if self.value in BOOLEANS:
            return "boolean"
        return "number" if NUMBER.fullmatch(self.value) or NOT_FINITE.fullmatch(self.value) else "string"

    def error(self, message: str) -> BadInput:
        """A `BadInput` that says where: raise it."""
        return BadInput(f"{self.place}: {message}")

    def mapping(self, known: Collection[str] | None = None, required: Collection[str] = ()) -> Mapping[str, Node]:
        """The nodes by key, in document order; with `known`, any other key is refused and the nearest offered."""
        if isinstance(self.value, str | tuple):
            self._refuse("a mapping")
        for key, node in self.value.items():
            if node.earlier:
                raise node.error(_twice(key, node.earlier))
            if known is not None and key not in known:
                raise node.error(f"unknown key {quoted(key)}{suggestion(key, known)}")
        for key in required:
            if key not in self.value:
                raise self.error(f"{self._subject()} needs the key {quoted(key)}")
        return self.value

    def without_anchors(self, known: Collection[str]) -> Node:
        """This mapping without unknown keys such as `x: &settings {…}`, whose value is there to be repeated."""
        if not isinstance(self.value, Mapping):
            return self
        kept = {key: node for key, node in self.value.items() if key in known or not (node.repeated or node.earlier)}
        return replace(self, value=kept)

    def sequence(self) -> tuple[Node, ...]:
        """The nodes of a list that is not empty."""
        if not isinstance(self.value, tuple):
            self._refuse("a list")
        if not self.value:
            raise self.error(f"{self._subject()} is an empty list")
        return self.value

    def string(self) -> str:
        """Text that is not empty."""
        if not isinstance(self.value, str) or self.kind != "string":
            self._refuse("a string", "; put it in quotes" if self.kind in ("number", "boolean", "mapping") else "")
        if not self.value:
            raise self.error(f"{self._subject()} is empty")
        return self.value

    def choice(self, choices: Collection[str]) -> str:
        """One of `choices`."""
        text = self.string()
        if text not in choices:
            raise self.error(f"{self._subject()} cannot be {quoted(text)}; choose from {', '.join(choices)}")
        return text

    def number(self, *, minimum: int | None = None) -> Fraction:
        """The exact number that is written there."""
        if not isinstance(self.value, str) or self.kind != "number":
            self._refuse("a number", "; take off the quotes" if self.quoted and self._looks_like_a_number() else "")
        if NOT_FINITE.fullmatch(self.value):
            raise self.error(f"{self._subject()} must be finite, not {self.value}")
        match = NUMBER.fullmatch(self.value)
        exponent = int(match[1] or 0) if match else 0
        if len(self.value) > MAX_NUMBER_LENGTH or abs(exponent) > MAX_EXPONENT:
            raise self.error(f"{self._subject()} is out of range: {quoted(self.value)}")
        number = Fraction(self.value)
        if abs(number) > MAX_NUMBER:
            raise self.error(f"{self._subject()} is out of range: {quoted(self.value)}")
        if minimum is not None and number < minimum:
            raise self.error(f"{self._subject()} must be at least {minimum}, not {self.value}")
        return number

    def integer(self, *, minimum: int | None = None) -> int:
        """A whole number."""
        number = self.number(minimum=minimum)
        if number.denominator != 1:
            raise self.error(f"{self._subject()} must be a whole number, not {self.value}")
        return number.numerator

    def boolean(self) -> bool:
        """True or false."""
        if not isinstance(self.value, str) or self.kind != "boolean":
            self._refuse("true or false")
        return BOOLEANS[self.value]

    def size_bytes(self) -> int:
        """A number of bytes ≥ 1: `1GB` (10⁹), `2GiB` (2³⁰), `500MB`, or a bare whole number of bytes."""
        if self.kind == "number":
            return self.integer(minimum=1)
        match = SIZE.fullmatch(self.string()) if len(self.string()) <= MAX_NUMBER_LENGTH else None
        size = Fraction(match[1]) * SIZE_UNITS[match[2]] if match else Fraction(0)
        if size < 1:
            raise self.error(
                f"{self._subject()} must be a size such as 1GB, 500MB or 2GiB, not {quoted(self.string())}"
            )
        if match and match[2] == "B" and size < 1000:
            raise self.error(f"{self._subject()}: {match[0]} is {size} bytes; write {match[1]}GB for gigabytes")
        return int(size)

    def plain(self) -> Any:
        """The value as plain data: numbers exact, as int, float or Decimal; `node_of` turns it back."""
        if isinstance(self.value, tuple):
            return [entry.plain() for entry in self.value]
        if not isinstance(self.value, str):
            return {key: entry.plain() for key, entry in self.value.items()}
        match self.kind:
            case "number":
                return _plain_number(self.value)
            case "boolean":
                return BOOLEANS[self.value]
            case "nothing":
                return None
            case _:
                return self.value

    def _subject(self) -> str:
        return quoted(self.path) if self.path else "the document"

    def _looks_like_a_number(self) -> bool:
        return isinstance(self.value, str) and NUMBER.fullmatch(self.value) is not None

    @property
    def found(self) -> str:
        """This value in an error: a list, a number 3, a string "yes"."""
        found = f"{self.kind} {self.value}" if self.kind in ("number", "boolean") else self.kind
        found = f"string {quoted(self.value)}" if isinstance(self.value, str) and self.kind == "string" else found
        return _with_article(found)

    def _refuse(self, expected: str, remedy: str = "") -> NoReturn:
        raise self.error(f"{self._subject()} must be {expected}, not {self.found}{remedy}")


def load_document(text: str, name: str) -> Node:
    """The root of the one document in `text`; `name` is the file's name in error messages."""
    root, *others = load_documents(text, name)
    if others:
        raise others[0].error("a second document begins here; keep one document in a file")
    return root


def load_documents(text: str, name: str) -> tuple[Node, ...]:
    """The roots of the documents in `text`, which `---` divides; empty ones between others are left out."""
    if len(text) > MAX_BYTES or len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise BadInput(f"{name}:1: the file is larger than 1 MiB")
    try:
        return _Composer(text, name).roots()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise BadInput(f"{name}:{line}: not YAML: {error.problem or error.context}{_hint(text, line)}") from None
    except yaml.reader.ReaderError as error:
        line = text.encode("utf-8", "surrogatepass")[: error.position].count(b"\n") + 1
        raise BadInput(f"{name}:{line}: not YAML: a character that is not allowed: {error.character!r}") from None
    except UnicodeEncodeError:
        raise BadInput(f"{name}:1: not YAML: the text is not valid Unicode") from None


def node_of(value: Any, document: str, path: str = "") -> Node:
    """The node of plain data; `document` stands in errors, without a line."""
    if isinstance(value, Mapping):
        entries = {key: node_of(part, document, f"{path}.{key}" if path else key) for key, part in value.items()}
        return Node(entries, False, document, 0, path)
    if isinstance(value, list | tuple):
        parts = tuple(node_of(part, document, f"{path}[{index}]") for index, part in enumerate(value))
        return Node(parts, False, document, 0, path)
    if isinstance(value, bool) or value is None:
        return Node("" if value is None else str(value).lower(), False, document, 0, path)
    return Node(str(value), isinstance(value, str), document, 0, path)


def yaml_text(value: Any) -> str:
    """Plain data as a YAML document that loads again as the same."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


class _Dumper(yaml.SafeDumper):
    """Without anchors; quotes text that would load as another kind, and keeps numbers exact."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = None if Node(text, False, "", 1, "").kind == "string" else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


def _number_node(dumper: yaml.SafeDumper, number: Decimal) -> yaml.ScalarNode:
    text = f"{number:f}" if abs(number.adjusted()) < 20 else f"{number:E}"
    digits, mark, exponent = text.partition("E")
    return dumper.represent_scalar(
        "tag:yaml.org,2002:float", f"{digits}{'' if '.' in digits else '.0'}{mark}{exponent}"
    )


_Dumper.add_representer(str, _text_node)
_Dumper.add_representer(Decimal, _number_node)


def _plain_number(text: str) -> int | float | Decimal:
    if not NUMBER.fullmatch(text):
        return float(text.replace(".inf", "inf").replace(".nan", "nan"))
    exact = Fraction(text)
    if exact.denominator == 1 and abs(exact) < 10**18:
        return exact.numerator
    rounded = float(text)
    return rounded if math.isfinite(rounded) and Fraction(repr(rounded)) == exact else Decimal(text)


class _Composer:
    """Turns the parser's events into nodes; refuses the cases of the module's docstring before they cost memory."""

    def __init__(self, text: str, name: str) -> None:
        self._text = text
        self._anchors: dict[str, Node] = {}
        self._sizes: dict[str, int] = {}
        self._read = self._repeated = 0
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # libyaml where PyYAML has it: 10 × faster
        self._events: Iterator[Any] = yaml.parse(text, Loader=loader)
        self._name = name

    def roots(self) -> tuple[Node, ...]:
        next(self._events)  # StreamStart
        found: list[Node] = []
        while not isinstance(next(self._events), yaml.StreamEndEvent):  # else DocumentStart
            self._anchors.clear()
            event = next(self._events)
            found.append(self._node(event, event.start_mark.line + 1, "", 0))
            next(self._events)  # DocumentEnd
        if not found:
            raise BadInput(f"{self._name}:1: the file is empty")
        return tuple(root for root in found if root.kind != "nothing") or (found[0],)

    def _node(self, event: Any, line: int, path: str, depth: int) -> Node:
        if isinstance(event, yaml.AliasEvent):
            return self._aliased(event, depth)
        self._check(event, depth)
        before = self._read + self._repeated
        self._read += 1
        repeated = event.anchor is not None and f"*{event.anchor}" in self._text
        value: str | tuple[Node, ...] | Mapping[str, Node]
        if isinstance(event, yaml.ScalarEvent):
            value = str(event.value)
        elif isinstance(event, yaml.SequenceStartEvent):
            value = tuple(self._elements(path, depth))
        else:
            value = self._entries(path, depth)
        quoted = isinstance(event, yaml.ScalarEvent) and bool(event.style)
        node = Node(value, quoted, self._name, line, path, repeated)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
            self._sizes[event.anchor] = self._read + self._repeated - before
        return node

    def _aliased(self, event: Any, depth: int) -> Node:
        place = f"{self._name}:{event.start_mark.line + 1}"
        if event.anchor not in self._anchors:
            raise BadInput(f"{place}: no value above is marked &{event.anchor}; mark it, or write the value out")
        self._repeated += self._sizes[event.anchor]
        if self._repeated > MAX_REPEATED:
            raise BadInput(f"{place}: aliases repeat more than {MAX_REPEATED:,} values; write fewer")
        node = self._anchors[event.anchor]
        if depth + _height(node) > MAX_DEPTH:
            raise BadInput(f"{place}: nested more than {MAX_DEPTH} levels deep")
        return node

    def _elements(self, path: str, depth: int) -> Iterator[Node]:
        index = 0
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            yield self._node(event, event.start_mark.line + 1, f"{path}[{index}]", depth + 1)
            index += 1

    def _entries(self, path: str, depth: int) -> dict[str, Node]:
        entries: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        anchored: set[str] = set()
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            line = event.start_mark.line + 1
            key = self._key(event, line, depth)
            if key == "<<" and not event.style:
                merged = {**self._merged(line, path, depth), **merged}
                continue
            value = next(self._events)
            has_anchor = value.anchor is not None and not isinstance(value, yaml.AliasEvent)
            first = entries[key].line if key in entries else 0
            if first and not (has_anchor and key in anchored):
                raise BadInput(f"{self._name}:{line}: {_twice(key, first)}")
            node = self._node(value, line, f"{path}.{key}" if path else key, depth + 1)
            entries[key] = replace(node, earlier=first) if first else node
            anchored |= {key} if has_anchor else set()
        return {**merged, **entries}

    def _merged(self, line: int, path: str, depth: int) -> Mapping[str, Node]:
        """The entries under a merge key: of one mapping, or of several, where the first with a key gives its value."""
        node = self._node(next(self._events), line, f"{path}.<<" if path else "<<", depth + 1)
        merged: dict[str, Node] = {}
        for part in reversed(node.value) if isinstance(node.value, tuple) else (node,):
            if not isinstance(part.value, Mapping):
                raise BadInput(f"{self._name}:{line}: a merge key (<<) takes a mapping, or a list of mappings")
            merged |= part.value
        return merged

    def _key(self, event: Any, line: int, depth: int) -> str:
        if not isinstance(event, yaml.ScalarEvent):
            raise BadInput(f'{self._name}:{line}: a key must be a word; put placeholders such as "${{w}}" in quotes')
        self._check(event, depth)
        return str(event.value)

    def _check(self, event: Any, depth: int) -> None:
        place = f"{self._name}:{event.start_mark.line + 1}"
        if event.tag is not None:
            raise BadInput(f"{place}: the tag {quoted(event.tag)} is not accepted; take it out")
        if depth > MAX_DEPTH:
            raise BadInput(f"{place}: nested more than {MAX_DEPTH} levels deep")


def _height(node: Node) -> int:
    """Levels below a node."""
    parts = () if isinstance(node.value, str) else node.value if isinstance(node.value, tuple) else node.value.values()
    return max((1 + _height(part) for part in parts), default=0)


def _hint(text: str, line: int) -> str:
    lines = text.split("\n")
    if re.match(r"\s*\t", "".join(lines[line - 1 : line])):
        return "; the line begins with a tab: YAML indents by spaces"
    around = "\n".join(lines[max(0, line - 2) : line])
    return '; put what has braces in quotes: "${w}"' if re.search(r"\{[^{}:]*\}", around) else ""


def _with_article(noun: str) -> str:
    return noun if noun == "nothing" else f"a {noun}"
