"""The table of a launch: a row describes a tensor of a point, and the programs that compute it.

A row is a `Head`, then a `Term` for each model, as 64-bit integers. Tensors and lists are given by their addresses;
numbers, and those of lists, are float64, in a row as their bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

BLOCK = 2048
"""Elements of a program: sixteen bytes of bfloat16 for each of 256 threads."""


class Head(NamedTuple):
    """What a row says of its tensor. `first` is its first program; `start` the place of its first element.

    `flag` is the index in `flags` that becomes 1 if a written element is NaN or infinite. `line` is the length of a
    row, where coefficients are those of rows, or the number of columns, where they are those of columns. Element i has
    the relaxation `factors`[(i // deep) · width + (i // stride) % width].
    """

    output: int
    flag: int
    first: int
    elements: int
    start: int
    base: int = 0
    line: int = 1
    scale: int = 0
    least: int = 0
    keep: int = -1
    keep_last: int = -1
    factors: int = 0
    width: int = 1
    stride: int = 1
    deep: int = 1


class Term(NamedTuple):
    """What a row says of a model: a tensor and its coefficient, which is an address for rows and columns.

    An element of its task vector is kept if its |δ| has bits above `keep`, or equal to it at a place up to `keep_last`;
    it is dropped by `drop` and `drop_last` in the same way. It is kept if its random bits are below `limit`, and if its
    byte of `mask` is 1. `factor` is that of `passes.Kept`, or the number of another pass.
    """

    model: int
    weight: int
    factor: int = 0
    keep: int = -1
    keep_last: int = -1
    drop: int = 0x7FFFFFFF
    drop_last: int = -1
    key_0: int = 0
    key_1: int = 0
    limit: int = 0
    mask: int = 0


SUM, CONSENSUS, SELECTED, OVERLAP, TALL, SWAP = range(6)
"""The passes."""

BASED, ELECTS, NORMALIZES, TRIMS, DRAWS, MASKS, FACTORED, RELAXES, OF_ROWS, OF_COLUMNS = (1 << bit for bit in range(10))
"""Flags of a launch: what its rows have in common."""


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of one point: parents are all of the dtype `stored`, the output of `out`, as torch names them."""

    kind: int
    mode: int
    stored: str
    out: str
    head: Head
    terms: tuple[Term, ...]
