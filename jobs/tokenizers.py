"""The `tokenizer:` block of a recipe: whose vocabulary the output has, and the sources of the rows of single tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from jobs.errors import BadInput
from jobs.expressions import Bindings, Template
from jobs.sources import Reader, bound_text, model_name, reference_schema
from jobs.trajectories import Trajectories, one_of
from jobs.yaml_nodes import Node, quoted

KEYS = {
    "source": "`union`, `base` or a model; the default is `union`",
    "tokens": "where the rows of single tokens come from",
    "pad_to_multiple_of": "the number of rows of the vocabulary becomes a multiple of this",
}
"""The keys of the block and their meanings."""

KINDS = ("model_token", "zero")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddedToken:
    """A token that the output has and its tokenizer's files lack: its id, and how a tokenizer finds it in a text.

    A `piece` is of another parent's model of subwords: it has an id, and the tokenizer cuts texts as it did before.
    """

    content: str
    id: int
    piece: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True
    special: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenSource:
    """The row of one token where a model lacks the token, or, with `force`, in every model.

    It is the row of `token` or `token_id` in `model`; of the token itself if neither is given; zeros without a model.
    """

    model: str | None = None
    token: str | None = None
    token_id: int | None = None
    force: bool = False
    place: str = field(compare=False)

    def document(self) -> dict[str, Any]:
        """As mergekit writes it."""
        source: Any = self.model
        if self.model is None:
            source = {"kind": "zero"}
        elif self.token is not None or self.token_id is not None:
            row = {"token": self.token} if self.token is not None else {"token_id": self.token_id}
            source = {"kind": "model_token", "model": self.model, **row}
        return {"source": source, **({"force": True} if self.force else {})}


@dataclass(frozen=True, slots=True)
class TokenizerSettings:
    """The block without its `source`; a token without a source of its own is only added to the vocabulary."""

    tokens: Mapping[str, TokenSource | None]
    pad_to_multiple_of: int | None

    def document(self, source: str) -> dict[str, Any]:
        """The block."""
        found: dict[str, Any] = {"source": source}
        if self.tokens:
            found["tokens"] = {token: {} if of is None else of.document() for token, of in self.tokens.items()}
        if self.pad_to_multiple_of is not None:
            found["pad_to_multiple_of"] = self.pad_to_multiple_of
        return found


@dataclass(frozen=True, slots=True)
class TokenizerTemplate:
    """A checked block whose placeholders wait for values."""

    source: str | Template
    tokens: Mapping[str, _TokenTemplate | None]
    pad_to_multiple_of: int | Template | None
    place: str

    def bind(self, bindings: Bindings, trajectories: Trajectories) -> tuple[str, TokenizerSettings | None]:
        """The source and the rest of the block, None if there is no more."""
        source = one_of(bound_text(self.source, bindings), trajectories, self.place)
        pad = _whole(self.pad_to_multiple_of, bindings, "pad_to_multiple_of")
        if pad is not None and pad < 1:
            raise BadInput(f"{self.place}: pad_to_multiple_of must be at least 1, not {pad}")
        tokens = {token: None if of is None else of.bind(bindings, trajectories) for token, of in self.tokens.items()}
        return source, TokenizerSettings(tokens, pad) if tokens or pad is not None else None


@dataclass(frozen=True, slots=True)
class _TokenTemplate:
    model: str | Template | None
    token: str | Template | None
    token_id: int | Template | None
    force: bool
    place: str

    def bind(self, bindings: Bindings, trajectories: Trajectories) -> TokenSource:
        model = None if self.model is None else one_of(bound_text(self.model, bindings), trajectories, self.place)
        token = None if self.token is None else bound_text(self.token, bindings)
        number = _whole(self.token_id, bindings, "token_id")
        return TokenSource(model=model, token=token, token_id=number, force=self.force, place=self.place)


def tokenizer_template(node: Node, reader: Reader) -> TokenizerTemplate:
    """The block at `node`."""
    keys = _given(reader.keys(node, KEYS))
    tokens = keys["tokens"].mapping() if "tokens" in keys else {}
    pad = keys.get("pad_to_multiple_of")
    return TokenizerTemplate(
        source=reader.text(model_name(keys["source"])) if "source" in keys else "union",
        tokens={token: _token(of, reader) for token, of in tokens.items()},
        pad_to_multiple_of=None if pad is None else _number(pad, reader),
        place=node.place,
    )


def tokenizer_schema() -> dict[str, Any]:
    """The JSON Schema of the block."""
    reference = reference_schema()
    number = {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": r"\$\{"}]}
    by_kind = {
        "type": "object",
        "properties": {
            "kind": {"enum": [*KINDS]},
            "model": reference,
            "token": {"type": ["string", "null"]},
            "token_id": {"anyOf": [*number["anyOf"], {"type": "null"}]},
        },
        "required": ["kind"],
        "additionalProperties": False,
    }
    token = {
        "type": ["object", "null"],
        "properties": {
            "source": {"anyOf": [*reference["anyOf"], by_kind, {"type": "null"}]},
            "force": {"type": "boolean"},
        },
        "additionalProperties": False,
    }
    known = {
        "source": {"anyOf": [*reference["anyOf"], {"type": "null"}]},
        "tokens": {"type": ["object", "null"], "additionalProperties": token},
        "pad_to_multiple_of": {"anyOf": [*number["anyOf"], {"type": "null"}]},
    }
    return {
        "type": ["object", "null"],
        "properties": {key: {**known[key], "description": meaning} for key, meaning in KEYS.items()},
        "additionalProperties": False,
    }


def _token(node: Node, reader: Reader) -> _TokenTemplate | None:
    keys = {} if node.kind == "nothing" else _given(reader.keys(node, ("source", "force")))
    force = keys["force"].boolean() if "force" in keys else False
    if "source" not in keys:
        if force:
            raise node.error("`force: true` needs a `source:`: a model, `{kind: model_token, …}` or `{kind: zero}`")
        return None
    source = keys["source"]
    if source.kind != "mapping" or "kind" not in source.mapping():
        return _TokenTemplate(reader.text(model_name(source)), None, None, force, source.place)
    if source.mapping()["kind"].choice(KINDS) == "zero":
        source.mapping(("kind",))
        return _TokenTemplate(None, None, None, force, source.place)
    parts = _given(source.mapping(("kind", "model", "token", "token_id"), ("model",)))
    if ("token" in parts) == ("token_id" in parts):
        raise source.error("a model_token has a `model:` and either a `token:` or a `token_id:`")
    token = reader.text(parts["token"]) if "token" in parts else None
    number = _number(parts["token_id"], reader) if "token_id" in parts else None
    return _TokenTemplate(reader.text(model_name(parts["model"])), token, number, force, source.place)


def _given(keys: Mapping[str, Node]) -> dict[str, Node]:
    """The keys that have a value."""
    return {key: node for key, node in keys.items() if node.kind != "nothing"}


def _number(node: Node, reader: Reader) -> int | Template:
    if node.kind == "string" and isinstance(parsed := reader.text(node), Template):
        return parsed
    return node.integer(minimum=0)


def _whole(slot: int | Template | None, bindings: Bindings, key: str) -> int | None:
    if not isinstance(slot, Template):
        return slot
    value = slot.bind(bindings)
    if not isinstance(value, Fraction) or value.denominator > 1 or value < 0:
        raise BadInput(f"{slot.place}: {key} must be a whole number, not {quoted(str(value))}")
    return value.numerator
