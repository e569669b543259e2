"""Which prompts are prefilled together: pure arithmetic on token ids, no model.

Prompts that share a prefix become one *row*: a trunk prefilled once, and one *branch* a prompt. Rows are ordered so
that neighbours share as many leading tokens as they can: a row starts from the keys and values of the row before it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Row:
    """One trunk and its branches: the ids of prompt `members[j]` are `trunk` and then `branches[j]` (never empty)."""

    members: tuple[int, ...]
    trunk: Ids
    branches: tuple[Ids, ...]
    max_new_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens with keys and values before decoding starts; the last of each branch is decoding's first input."""
        return len(self.trunk) + sum(len(branch) - 1 for branch in self.branches)


def common_prefix(left: Ids, right: Ids) -> int:
    """How many leading ids are equal."""
    length = min(len(left), len(right))
    differs = np.flatnonzero(left[:length] != right[:length])
    return int(differs[0]) if len(differs) else length


def make_rows(ids: Sequence[Ids], prefixes: Sequence[str], new_tokens: Sequence[int], max_branches: int) -> list[Row]:
    """Rows for all prompts, sorted for `batches`; neighbours with an equal non-empty prefix string are one row.

    The trunk is the common start of the ids of the whole prompts, which may be less than the prefix string: a token
    may straddle its end.
    """
    rows: list[Row] = []
    for prefix, run in groupby(range(len(ids)), key=lambda index: prefixes[index]):
        members = list(run)
        step = max_branches if prefix else 1
        for first in range(0, len(members), step):
            rows.append(_row(members[first : first + step], ids, new_tokens))
    return sorted(rows, key=_order)


def batches(rows: Sequence[Row], *, max_branches: int, max_cells: int) -> Iterator[list[Row]]:
    """Consecutive rows whose cache (rows × columns) stays within `max_cells`; at least one row a batch."""
    batch: list[Row] = []
    for row in rows:
        bigger = [*batch, row]
        branches = sum(len(member.branches) for member in bigger)
        if batch and (branches > max_branches or len(bigger) * columns(bigger) > max_cells):
            yield batch
            bigger = [row]
        batch = bigger
    if batch:
        yield batch


def halves(batch: Sequence[Row]) -> list[list[Row]]:
    """The batch in two, a single row by its branches; nothing where it is one prompt alone."""
    if len(batch) > 1:
        return [list(batch[: len(batch) // 2]), list(batch[len(batch) // 2 :])]
    [row] = batch
    half = len(row.branches) // 2
    if half == 0:
        return []
    return [
        [Row(row.members[part], row.trunk, row.branches[part], row.max_new_tokens)]
        for part in (slice(None, half), slice(half, None))
    ]


def columns(batch: Sequence[Row]) -> int:
    """Columns of the cache that a batch needs: its longest row, then every branch's new tokens, side by side."""
    widest = max(len(row.branches) for row in batch)
    return max(row.tokens for row in batch) + widest * max(row.max_new_tokens for row in batch)


def _row(members: Sequence[int], ids: Sequence[Ids], new_tokens: Sequence[int]) -> Row:
    first = ids[members[0]]
    shared = min(common_prefix(first, ids[member]) for member in members)
    shared = min(shared, *(len(ids[member]) - 1 for member in members))
    return Row(
        members=tuple(members),
        trunk=first[:shared],
        branches=tuple(ids[member][shared:] for member in members),
        max_new_tokens=max(new_tokens[member] for member in members),
    )


def _order(row: Row) -> tuple[int, bytes]:
    # longest first, so that memory runs out at the start if at all; within 19 % of length, by the tokens themselves
    return -math.ceil(4 * math.log2(row.tokens + 1)), row.trunk.astype(">u4").tobytes()
