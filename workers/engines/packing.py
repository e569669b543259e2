"""Which prompts are prefilled and decoded together: pure arithmetic on token ids, no model.

Prompts that share a prefix become one *row*: a trunk prefilled once, and one *branch* a prompt. Rows are ordered so
that neighbours share as many leading tokens as they can: a row starts from the keys and values of the row before it.
Rows that need about as much memory form a *pool*: a number of slots, each of which takes the next row when its own has
ended.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


SHARED = 2
"""Columns of new tokens for each column of the trunk, at most, in a row of several branches."""


@dataclass(frozen=True, slots=True)
class Row:
    """One trunk and its branches: the ids of prompt `members[j]` are `trunk` and then `branches[j]` (never empty).

    It may generate up to `new_tokens[j]`.
    """

    members: tuple[int, ...]
    trunk: Ids
    branches: tuple[Ids, ...]
    new_tokens: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens with keys and values before decoding starts; the last of each branch is decoding's first input."""
        return len(self.trunk) + sum(len(branch) - 1 for branch in self.branches)

    def alone(self, members: Collection[int]) -> list[Row]:
        """A row of its own for each of these members."""
        asked = zip(self.members, self.branches, self.new_tokens, strict=True)
        whole = [(who, np.concatenate([self.trunk, branch]), new) for who, branch, new in asked if who in members]
        return [Row((who,), ids[:-1], (ids[-1:],), (new,)) for who, ids, new in whole]


def common_prefix(left: Ids, right: Ids) -> int:
    """How many leading ids are equal."""
    length = min(len(left), len(right))
    differs = np.flatnonzero(left[:length] != right[:length])
    return int(differs[0]) if len(differs) else length


@dataclass(frozen=True, slots=True)
class Pool:
    """Rows that are answered one after another in `slots` rows of the cache."""

    rows: tuple[Row, ...]
    slots: int

    @property
    def columns(self) -> int:
        """Columns of the cache: as many as the row that needs most."""
        return max(columns(row) for row in self.rows)

    @property
    def width(self) -> int:
        """Branches of the row that has most."""
        return max(len(row.branches) for row in self.rows)


def make_rows(ids: Sequence[Ids], prefixes: Sequence[str], new_tokens: Sequence[int], max_branches: int) -> list[Row]:
    """Rows for all prompts, sorted for `pools`; neighbours with an equal non-empty prefix string share rows.

    So do neighbours that are equal altogether, as the samples of one prompt. The trunk is the common start of the ids
    of the whole prompts, which may be less than the prefix string: a token may straddle its end. A query of a row
    passes over the columns of all its branches, so the branches of a row are few enough that their new tokens need at
    most `SHARED` times the columns of the trunk; the next row then copies the trunk.
    """
    rows: list[Row] = []
    for _, run in groupby(range(len(ids)), key=lambda index: prefixes[index] or ids[index].tobytes()):
        members = list(run)
        together = SHARED * _shared(members, ids) // max(new_tokens[member] for member in members)
        step = max(1, min(max_branches, together))
        for first in range(0, len(members), step):
            rows.append(_row(members[first : first + step], ids, new_tokens))
    return sorted(rows, key=_order)


def pools(rows: Sequence[Row], *, max_branches: int, max_cells: int) -> Iterator[Pool]:
    """Consecutive rows, with as many slots as branches and cells (slots × columns) allow; at least one slot.

    A new pool begins where it has at least twice the slots: a short row does not wait for the slot of a long one.
    """

    def slots(width: int, columns: int) -> int:
        return max(1, min(max_branches // width, max_cells // columns))

    pool: list[Row] = []
    width = longest = 0
    for row in rows:
        own = len(row.branches), columns(row)
        joint = max(width, own[0]), max(longest, own[1])
        if pool and max(slots(width, longest), slots(*own)) >= 2 * slots(*joint):
            yield Pool(tuple(pool), min(len(pool), slots(width, longest)))
            pool, joint = [], own
        pool.append(row)
        width, longest = joint
    if pool:
        yield Pool(tuple(pool), min(len(pool), slots(width, longest)))


def smaller(pool: Pool) -> Pool | None:
    """The pool in half the slots, at last with half the branches in a row; nothing where it is one prompt a time."""
    if pool.slots > 1:
        return Pool(pool.rows, min(len(pool.rows), pool.slots // 2))
    if pool.width == 1:
        return None
    rows: list[Row] = []
    for row in pool.rows:
        half = -(-len(row.branches) // 2)
        rows += [
            Row(row.members[part], row.trunk, row.branches[part], row.new_tokens[part])
            for part in (slice(None, half), slice(half, None))
            if row.members[part]
        ]
    return Pool(tuple(rows), 1)


def columns(row: Row) -> int:
    """Columns of the cache that a row needs: its tokens, then every new token of every branch."""
    return row.tokens + sum(row.new_tokens)


def _row(members: Sequence[int], ids: Sequence[Ids], new_tokens: Sequence[int]) -> Row:
    shared = _shared(members, ids)
    return Row(
        members=tuple(members),
        trunk=ids[members[0]][:shared],
        branches=tuple(ids[member][shared:] for member in members),
        new_tokens=tuple(new_tokens[member] for member in members),
    )


def _shared(members: Sequence[int], ids: Sequence[Ids]) -> int:
    """Leading tokens that all members have, less than all of any."""
    return min(min(common_prefix(ids[members[0]], ids[member]), len(ids[member]) - 1) for member in members)


def _order(row: Row) -> tuple[int, bytes]:
    # longest first, so that memory runs out at the start if at all; within 19 % of length, by the tokens themselves
    return -math.ceil(4 * math.log2(row.tokens + 1)), row.trunk.astype(">u4").tobytes()
