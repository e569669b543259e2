"""The sums that most merges consist of, of bfloat16 in float32, without a line of memory between their operations.

Σ of two terms, or base + one or two terms c · (x − base). A word of memory has two elements: no vector of the processor
is widened to their sums, or narrowed to the results. An element costs a third of its time in `weighted_sum`.
"""

from __future__ import annotations

import numpy as np

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import ROUNDS_TO_INFINITY, higher, lower, magnitude, paired

_BLOCK = 2048


@kernel("u32**", "i64", "i64*", "i64*", "i64*", "f32*", "i64", "u32**", "u8*")
def short_sums(
    parents: Pointer,
    points: int,
    bases: Pointer,
    ends: Pointer,
    terms: Pointer,
    factors: Pointer,
    words: int,
    outputs: Pointer,
    broken: Pointer,
) -> None:
    """Writes every point's elements. Term t of all points is `factors[t]` times parent `terms[t]`.

    Point p has the terms up to `ends[p]`, and subtracts and adds parent `bases[p]` unless that is −1. Where a point has
    a number that is not finite, `broken` becomes 1, and what is written is wrong.
    """
    for first in range(0, words, _BLOCK):
        size = min(_BLOCK, words - first)
        term = 0
        for point in range(points):
            last = ends[point] - 1
            a, b, x, y = parents[terms[term]], parents[terms[last]], factors[term], factors[last]
            if bases[point] < 0:
                largest = _two(a, b, x, y, outputs[point], first, size)
            elif term == last:
                largest = _base_and_one(parents[bases[point]], a, x, outputs[point], first, size)
            else:
                largest = _base_and_two(parents[bases[point]], a, b, x, y, outputs[point], first, size)
            if largest >= ROUNDS_TO_INFINITY:
                broken[0] = 1
            term = last + 1


def _two(a: Pointer, b: Pointer, x: float, y: float, into: Pointer, start: int, count: int) -> np.uint32:
    largest = np.uint32(0)
    for i in range(start, start + count):
        low = lower(a[i]) * x + lower(b[i]) * y
        high = higher(a[i]) * x + higher(b[i]) * y
        largest = max(largest, max(magnitude(low), magnitude(high)))
        into[i] = paired(low, high)
    return largest


def _base_and_one(base: Pointer, a: Pointer, x: float, into: Pointer, start: int, count: int) -> np.uint32:
    largest = np.uint32(0)
    for i in range(start, start + count):
        ground, other = lower(base[i]), higher(base[i])
        low = ground + (lower(a[i]) - ground) * x
        high = other + (higher(a[i]) - other) * x
        largest = max(largest, max(magnitude(low), magnitude(high)))
        into[i] = paired(low, high)
    return largest


def _base_and_two(
    base: Pointer, a: Pointer, b: Pointer, x: float, y: float, into: Pointer, start: int, count: int
) -> np.uint32:
    largest = np.uint32(0)
    for i in range(start, start + count):
        ground, other = lower(base[i]), higher(base[i])
        low = ground + ((lower(a[i]) - ground) * x + (lower(b[i]) - ground) * y)
        high = other + ((higher(a[i]) - other) * x + (higher(b[i]) - other) * y)
        largest = max(largest, max(magnitude(low), magnitude(high)))
        into[i] = paired(low, high)
    return largest
