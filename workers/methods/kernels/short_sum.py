"""The sums that most merges consist of, of bfloat16 in float32, without a line of memory between their operations.

Σ of two terms, or base + one or two terms c · (x − base): an element costs two thirds of its time in `weighted_sum`.
"""

from __future__ import annotations

import numpy as np

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import BF16, any_nonfinite, of_bfloat16, to_bfloat16

_BLOCK = 4096
_LARGEST = np.uint32(0x7F7F)
"""The largest finite bfloat16."""


@kernel("u16**", "i64", "i64", "i64*", "i64*", "i64*", "f32*", "i64", "u16**", "u8*", "u8*")
def short_sums(
    parents: Pointer,
    of_parents: int,
    points: int,
    bases: Pointer,
    ends: Pointer,
    terms: Pointer,
    factors: Pointer,
    count: int,
    outputs: Pointer,
    broken_parents: Pointer,
    broken_points: Pointer,
) -> None:
    """Writes every point's elements. Term t of all points is `factors[t]` times parent `terms[t]`.

    Point p has the terms up to `ends[p]`, and subtracts and adds parent `bases[p]` unless that is −1.
    """
    for first in range(0, count, _BLOCK):
        size = min(_BLOCK, count - first)
        broken = False
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
            if largest > _LARGEST:
                broken_points[point] = 1
                broken = True
            term = last + 1
        if broken:  # an element of a parent that is NaN or infinite makes the sums so in which it takes part
            for parent in range(of_parents):
                raw = parents[parent]
                if any_nonfinite(BF16, raw, raw, raw, first, size):
                    broken_parents[parent] = 1


def _two(a: Pointer, b: Pointer, x: float, y: float, into: Pointer, start: int, count: int) -> np.uint32:
    largest = np.uint32(0)
    for i in range(start, start + count):
        half = to_bfloat16(of_bfloat16(a[i]) * x + of_bfloat16(b[i]) * y)
        largest = max(largest, np.uint32(half & np.uint16(0x7FFF)))
        into[i] = half
    return largest


def _base_and_one(base: Pointer, a: Pointer, x: float, into: Pointer, start: int, count: int) -> np.uint32:
    largest = np.uint32(0)
    for i in range(start, start + count):
        ground = of_bfloat16(base[i])
        half = to_bfloat16(ground + (of_bfloat16(a[i]) - ground) * x)
        largest = max(largest, np.uint32(half & np.uint16(0x7FFF)))
        into[i] = half
    return largest


def _base_and_two(
    base: Pointer, a: Pointer, b: Pointer, x: float, y: float, into: Pointer, start: int, count: int
) -> np.uint32:
    largest = np.uint32(0)
    for i in range(start, start + count):
        ground = of_bfloat16(base[i])
        half = to_bfloat16(ground + ((of_bfloat16(a[i]) - ground) * x + (of_bfloat16(b[i]) - ground) * y))
        largest = max(largest, np.uint32(half & np.uint16(0x7FFF)))
        into[i] = half
    return largest
