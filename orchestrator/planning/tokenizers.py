"""One vocabulary for all members of a merge: which token has which row, and where each member's row comes from.

The rules are those of mergekit 0.1.5: tokens go by their text; a member that lacks a token gets the row of the only
member that has it, else the base's, else the mean of all that have it. Rows of padding are kept, which mergekit cuts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jobs.errors import BadInput
from jobs.merge_tasks import DTYPE_BITS, Derived, ParentTensor, Rows, Source
from jobs.recipe import Recipe
from jobs.tokenizers import AddedToken, TokenSource
from jobs.yaml_nodes import quoted
from orchestrator.planning.compatibility import check_tokenizers
from workers.checkpoints.canonical import stored_name
from workers.checkpoints.configs import text_fields, with_vocabulary
from workers.checkpoints.dtypes import FLOATS
from workers.checkpoints.opening import Checkpoint
from workers.checkpoints.stacks import layer_of
from workers.checkpoints.vocabularies import Vocabulary, read_vocabulary, vocabulary_files
from workers.storage import open_store

_INPUT = re.compile(
    r"(.*\.)?(embed_tokens|wte|word_embeddings?|embed_in|tok_embeddings|shared|embeddings|model\.embed)\.weight"
)
_OUTPUT = re.compile(
    r"(.*\.)?(lm_head(\.decoder|\.linear)?|embed_out|output|output_layer|head|decoder|predictions(\.decoder)?|lm_loss"
    r"|generator_lm_head|vocab_projector|shared_head\.head)\.(weight|bias)"
)
"""Embeddings and heads by their names in transformers and in the code of models beside it; heads have as many rows."""

MOST_ROWS = 10_000_000
"""Forty times the largest vocabulary; a damaged tokenizer may have any id."""

_IN_LAYERS = re.compile(r".*\.(embed_tokens|shared_head\.head)\.weight")
"""Those of the layers for multi-token prediction; other tensors of layers have no rows of tokens."""


@dataclass(frozen=True)
class Fitted:
    """Members with one vocabulary, the rows of their embeddings if those are new, and the tokenizer's new tokens.

    With `renumbered`, tokens of the donor have other ids or none.
    """

    members: Sequence[Checkpoint]
    rows: int | None = None
    added: tuple[AddedToken, ...] = ()
    remarks: tuple[str, ...] = ()
    renumbered: bool = False


def fitted(
    recipe: Recipe, members: Sequence[Checkpoint], owner: Checkpoint, donor: str, tied: Mapping[str, str]
) -> Fitted:
    """The members with embeddings and heads that have the rows of one vocabulary; `owner` has its tokenizer.

    `donor` is the member whose config holds.

    Without a `tokenizer_source` only rows of padding are added. `BadInput` for vocabularies that differ then, for those
    that cannot be read, and for a token without a row where the recipe asks for one.
    """
    tables = sorted({name for member in members for name in _tables(member)})
    sizes = {member.name: size for member in members if (size := _rows(member, tables)) is not None}
    if not _alike(members, tables, tied):
        return Fitted(members)
    if recipe.tokenizer_source is None:
        if len({*sizes.values()}) <= 1 or not any(vocabulary_files(member.side_files) for member in members):
            return Fitted(members)
        check_tokenizers(members, recipe.place)
    place = recipe.place_of("tokenizer" if recipe.tokenizer else "tokenizer_source")
    vocabularies = {member.name: _vocabulary(member) for member in (*members, owner)}
    own = vocabularies[owner.name] or Vocabulary("", "", {})
    others = [found or own for found in vocabularies.values()]
    equal = all(found.tokens == own.tokens and (found.tokens or found.sha256 == own.sha256) for found in others)
    if equal and recipe.tokenizer is None and len({*sizes.values()}) <= 1:
        return Fitted(members)
    if recipe.tokenizer_source is not None and not all(found.tokens for found in others):
        unread = next(name for name, found in vocabularies.items() if found is not None and not found.tokens)
        if recipe.tokenizer_source == "union" or recipe.tokenizer is not None:
            raise BadInput(
                f"{place}: the vocabulary of {unread} cannot be read; name the model"
                " whose tokenizer is copied with `tokenizer_source: MODEL`, which leaves the rows as they are"
            )
        return Fitted(members, remarks=(f"the vocabulary of {unread} cannot be read; all rows stay as they are",))
    if not sizes:
        raise BadInput(
            f"{place}: no tensor of {members[0].name} has the name of embeddings, so the"
            " vocabularies cannot be made equal; merge parents of one vocabulary"
        )
    added = _added(recipe, [owner, *members], vocabularies, sizes)
    out = {**own.tokens, **{token.content: token.id for token in added}}
    fitting = _Fitting(recipe, members, sizes, dict(zip(vocabularies, others, strict=True)), own, out, owner.name)
    changed = fitting.tensors(tables, tied)
    rows = fitting.rows if changed or {*sizes.values()} != {fitting.rows} else None
    return Fitted(
        [_with(member, changed, rows) for member in members],
        rows,
        added,
        tuple(_remarks(recipe, own, owner.name, sizes, fitting.rows, added)),
        any(out.get(token) != number for token, number in (vocabularies[donor] or own).tokens.items()),
    )


def _tables(member: Checkpoint) -> list[str]:
    """The tensors that have a row for each token of the text; a model of speech has tables of other tokens too."""
    outside = [
        name
        for name, tensor in member.tensors.items()
        if tensor.dtype in FLOATS and (layer_of(name) is None or _IN_LAYERS.fullmatch(name))
    ]
    inputs = [name for name in outside if _INPUT.fullmatch(name)]
    stated = text_fields(member.config).get("vocab_size")
    inputs = [name for name in inputs if member.shapes[name][0] == stated] or inputs
    sizes = {member.shapes[name][0] for name in inputs}
    outputs = [name for name in outside if _OUTPUT.fullmatch(name) and (not sizes or member.shapes[name][0] in sizes)]
    return [*inputs, *outputs]


def _rows(member: Checkpoint, tables: Collection[str]) -> int | None:
    """The rows of the member's embeddings, or of its head if it has no embeddings."""
    own = sorted((name for name in tables if name in member.tensors), key=lambda name: _INPUT.fullmatch(name) is None)
    return member.shapes[own[0]][0] if own else None


def _alike(members: Sequence[Checkpoint], tables: Iterable[str], tied: Mapping[str, str]) -> bool:
    """Whether all members' tensors of each table differ in the number of rows alone."""
    for name in tables:
        stored = [(member, at) for member in members if (at := stored_name(name, member, tied)) is not None]
        if len({member.shapes[at][1:] for member, at in stored}) > 1:
            return False
    return True


def _vocabulary(member: Checkpoint) -> Vocabulary | None:
    """The vocabulary of a checkpoint's tokenizer; None if it has none."""
    files = vocabulary_files(member.side_files)
    return read_vocabulary(open_store(member.url), member.side_files, files[0]) if files else None


def _added(
    recipe: Recipe,
    members: Sequence[Checkpoint],
    vocabularies: Mapping[str, Vocabulary | None],
    sizes: Mapping[str, int],
) -> tuple[AddedToken, ...]:
    """The tokens that the first member's tokenizer lacks, with ids after its own.

    Those of a union come by member and id, subwords first, as in mergekit, whose subwords come in any order.
    """
    own = vocabularies[members[0].name] or Vocabulary("", "", {})
    free = max(own.tokens.values(), default=-1) + 1
    pieces: dict[str, None] = {}
    beside: dict[str, AddedToken] = {}
    for member in members[1:] if recipe.tokenizer_source == "union" else ():
        other = vocabularies[member.name] or own
        most = sizes.get(member.name, math.inf)
        for token, number in sorted(other.tokens.items(), key=lambda item: item[1]):
            if number >= most or token in own.added:
                continue
            if token in other.added:
                flags = {key: bool(other.added[token].get(key, default)) for key, default in _FLAGS.items()}
                beside.setdefault(token, AddedToken(content=token, id=own.tokens.get(token, -1), **flags))
            elif token not in own.tokens:
                pieces[token] = None
    for token in recipe.tokenizer.tokens if recipe.tokenizer else ():
        if token not in own.tokens:
            beside.setdefault(token, AddedToken(content=token, id=-1))
    tokens = [AddedToken(content=token, id=-1, piece=True) for token in pieces if token not in beside]
    found: list[AddedToken] = []
    for token in (*tokens, *beside.values()):
        found.append(token if token.id >= 0 else replace(token, id=free))
        free += token.id < 0
    return tuple(found)


_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


class _Fitting:
    """The rows of one output vocabulary in every member."""

    def __init__(
        self,
        recipe: Recipe,
        members: Sequence[Checkpoint],
        sizes: Mapping[str, int],
        vocabularies: Mapping[str, Vocabulary],
        own: Vocabulary,
        out: Mapping[str, int],
        owner: str,
    ) -> None:
        self._recipe, self._members, self._sizes, self._vocabularies = recipe, members, sizes, vocabularies
        self._base = recipe.base_model
        settings = recipe.tokenizer
        asked = settings.tokens if settings else {}
        used = 1 + max(
            (at for token, at in out.items() if token in asked or any(self._id(name, token) >= 0 for name in sizes)),
            default=-1,
        )
        pad = settings.pad_to_multiple_of if settings else None
        if pad is not None:
            self.rows = math.ceil(used / pad) * pad
        elif recipe.tokenizer_source is None:
            self.rows = max(sizes.values())
        else:
            self.rows = max(used, sizes.get(owner, 0))
        if self.rows > MOST_ROWS:
            name = "pad_to_multiple_of" if pad is not None and used <= MOST_ROWS else "the id of a token"
            raise BadInput(
                f"{recipe.place}: the vocabulary would have {self.rows} rows by {name}, more than {MOST_ROWS};"
                " correct it"
            )
        self._averaged = used if pad is not None and used < self.rows else None
        self._limit = self.rows if self._averaged is None else used
        self._at = {member.name: self._own_rows(member.name, own, out) for member in members}
        self._asked = {
            out[token]: (token, source) for token, source in asked.items() if source is not None and token in out
        }

    def _id(self, name: str, token: str) -> int:
        """The row of a token in a member, or −1."""
        number = self._vocabularies[name].tokens.get(token, -1)
        return number if number < self._sizes.get(name, 0) else -1

    def _own_rows(self, name: str, own: Vocabulary, out: Mapping[str, int]) -> list[int]:
        """For each row of the output the member's row, or −1: that of the same token, or of the same padding."""
        vocabulary, size = self._vocabularies[name], self._sizes.get(name, 0)
        at = [-1] * self.rows
        for token, number in out.items():
            if 0 <= number < self.rows and at[number] < 0:
                at[number] = self._id(name, token)
        taken = {*vocabulary.tokens.values()}
        # files of two kinds may list the special tokens or not: a row that no token has is that of the same id
        tokens = {*out.values()} if vocabulary.file == own.file else set[int]()
        for row in range(min(self._limit, size)):
            if at[row] < 0 and row not in taken and row not in tokens:
                at[row] = row
        return at

    def tensors(self, tables: Sequence[str], tied: Mapping[str, str]) -> dict[str, dict[str, Derived]]:
        """By member and name: the tables whose rows are not those that are stored."""
        found: dict[str, dict[str, Derived]] = {}
        rules: dict[tuple[str, ...], dict[str, tuple[Rows, tuple[str, ...]] | None]] = {}
        for name in tables:
            places = {
                member.name: (member.tensors[at], member.shapes[at])
                for member in self._members
                if (at := stored_name(name, member, tied)) is not None
            }
            having = tuple(places)
            if having not in rules:
                lacking = self._lacking(having)
                rules[having] = {member: self._rule(member, lacking) for member in having}
            for member, rule in rules[having].items():
                if rule is not None:
                    found.setdefault(member, {})[name] = _derived(*rule, places, self.rows)
        return found

    def _lacking(self, having: Sequence[str]) -> dict[int, Sequence[tuple[str, int]]]:
        """The rows that a member lacks, or that are forced: the rows of members whose mean they get; none is zero."""
        found: dict[int, Sequence[tuple[str, int]]] = {}
        for row, numbers in enumerate(zip(*(self._at[name] for name in having), strict=True)):
            if row in self._asked and (self._asked[row][1].force or min(numbers) < 0):
                found[row] = self._asked_row(*self._asked[row], dict(zip(having, numbers, strict=True)))
            elif min(numbers) < 0:
                there = {name: number for name, number in zip(having, numbers, strict=True) if number >= 0}
                only_base = self._base in there and len(there) > 1
                found[row] = [(self._base or "", there[self._base or ""])] if only_base else [*there.items()]
        return found

    def _asked_row(self, token: str, source: TokenSource, at: Mapping[str, int]) -> Sequence[tuple[str, int]]:
        if source.model is None:
            return ()
        sought = token if source.token is None else source.token
        number = at.get(source.model, -1) if source.token is None else self._id(source.model, sought)
        if source.token_id is not None:
            number = source.token_id if source.token_id < self._sizes.get(source.model, 0) else -1
            sought = f"number {source.token_id}"
        if source.model not in at or number < 0:
            raise BadInput(
                f"{source.place}: {source.model} has no row for the token {quoted(sought)}, which"
                f" {quoted(token)} would get; name another model or token"
            )
        return [(source.model, number)]

    def _rule(
        self, member: str, lacking: Mapping[int, Sequence[tuple[str, int]]]
    ) -> tuple[Rows, tuple[str, ...]] | None:
        """The rule and the members that it reads; None if the rows are those that are stored."""
        inputs = {member: 0}
        runs: list[list[int]] = []
        means: list[tuple[int, tuple[tuple[int, int], ...]]] = []
        for row, number in enumerate(self._at[member][: self._limit]):
            of = 0
            if row in lacking and (number < 0 or (row in self._asked and self._asked[row][1].force)):
                parts = [(inputs.setdefault(name, len(inputs)), at) for name, at in lacking[row]]
                if len(parts) != 1:
                    means += [(row, tuple(parts))] if parts else []
                    continue
                of, number = parts[0]
            last = runs[-1] if runs else None
            if last is not None and last[0] == of and last[1] + last[3] == row and last[2] + last[3] == number:
                last[3] += 1
            else:
                runs.append([of, row, number, 1])
        if self._averaged is None and runs == [[0, 0, 0, self._sizes[member]]] and self.rows == self._sizes[member]:
            return None
        rule = Rows(tuple((of, row, number, count) for of, row, number, count in runs), tuple(means), self._averaged)
        return rule, tuple(inputs)


def _derived(
    rule: Rows, inputs: Sequence[str], places: Mapping[str, tuple[Source, tuple[int, ...]]], rows: int
) -> Derived:
    """The tensor of that rule, which reads no more rows of others than it needs."""
    own, shape = places[inputs[0]]
    kinds = {places[name][0].dtype for name in inputs}
    wide = "F64" if "F64" in kinds else "F32" if len(kinds) > 1 else own.dtype
    read: list[tuple[str, Source]] = []
    first: list[int] = []
    for number, name in enumerate(inputs):
        place, (_, *width) = places[name]
        used = [(at, at + count) for of, _, at, count in rule.runs if of == number]
        used += [(at, at + 1) for _, parts in rule.means for of, at in parts if of == number]
        low, high = min((start for start, _ in used), default=0), max((stop for _, stop in used), default=0)
        if number == 0 or not isinstance(place, ParentTensor):
            low = 0
        else:
            size = math.prod(width) * DTYPE_BITS[place.dtype] // 8
            place = replace(place, start=place.start + low * size, end=place.start + high * size, digest="")
        read.append((name, place))
        first.append(low)
    rule = replace(
        rule,
        runs=tuple((of, row, at - first[of], count) for of, row, at, count in rule.runs),
        means=tuple((row, tuple((of, at - first[of]) for of, at in parts)) for row, parts in rule.means),
    )
    return Derived(wide, (rows, *shape[1:]), rule, tuple(read))


def _with(member: Checkpoint, changed: Mapping[str, Mapping[str, Derived]], rows: int | None) -> Checkpoint:
    new = changed.get(member.name, {})
    return replace(
        member,
        config=member.config if rows is None else with_vocabulary(member.config, rows),
        tensors={**member.tensors, **new},
        shapes={**member.shapes, **{name: tensor.shape for name, tensor in new.items()}},
    )


def _remarks(
    recipe: Recipe,
    own: Vocabulary,
    owner: str,
    sizes: Mapping[str, int],
    rows: int,
    added: Sequence[AddedToken],
) -> Iterable[str]:
    if recipe.tokenizer_source is None:
        fewer = [name for name, size in sizes.items() if size < rows]
        most = next(name for name, size in sizes.items() if size == rows)
        yield (
            f"the embeddings of {' and '.join(fewer)} have fewer rows than the {rows} of {most}; they get the missing"
            " rows from the parents that have them"
        )
    count = sum(token.piece for token in added)
    pieces = f"{count} subword{'s' * (count != 1)} of other vocabularies"
    if count and own.file == "tokenizer.json" and own.kind == "BPE":
        yield f"{pieces} added, and texts are cut as {owner} cuts them, without these"
    elif count and not (own.file == "tokenizer.json" and own.kind.startswith("Word")):
        yield f"{pieces} added, which {owner}'s tokenizer now finds anywhere in a text, also inside of words"
