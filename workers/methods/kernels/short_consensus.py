"""The consensus that most merges by ties consist of, without a line of memory between its operations.

One point of two task vectors, each trimmed by one limit, of bfloat16 in float32. As in `short_sum`, a word of memory
has two elements. `consensus` trims once for many points; for one, an element costs a quarter more there.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import ROUNDS_TO_INFINITY, higher, lower, magnitude, paired

Number = Any
"""Of the dtype of the arithmetic, float32 or float64."""


@kernel("u32*", "u32*", "u32*", "i64", "i64", "f32", "f32", "f32", "i64", "i64", "u32*", "u8*")
def short_consensus(
    base: Pointer,
    a: Pointer,
    b: Pointer,
    above_a: int,
    above_b: int,
    x: float,
    y: float,
    scale: float,
    mean: int,
    words: int,
    into: Pointer,
    broken: Pointer,
) -> None:
    """Writes base + scale · the elected sum, or `mean`, of x · δa and y · δb, each kept above a magnitude's bits.

    Where a number is not finite, `broken` becomes 1, and what is written is wrong.
    """
    plus, least_a, least_b = np.float32(1), np.int32(above_a), np.int32(above_b)
    largest = np.uint32(0)
    if mean:
        for i in range(words):
            ground, other = lower(base[i]), higher(base[i])
            one, two = _kept(lower(a[i]) - ground, least_a) * x, _kept(lower(b[i]) - ground, least_b) * y
            low = ground + elected_mean(one, two, x, y, plus) * scale
            one, two = _kept(higher(a[i]) - other, least_a) * x, _kept(higher(b[i]) - other, least_b) * y
            high = other + elected_mean(one, two, x, y, plus) * scale
            largest = max(largest, max(magnitude(low), magnitude(high)))
            into[i] = paired(low, high)
    else:
        for i in range(words):
            ground, other = lower(base[i]), higher(base[i])
            one, two = _kept(lower(a[i]) - ground, least_a) * x, _kept(lower(b[i]) - ground, least_b) * y
            low = ground + elected(one, two, plus) * scale
            one, two = _kept(higher(a[i]) - other, least_a) * x, _kept(higher(b[i]) - other, least_b) * y
            high = other + elected(one, two, plus) * scale
            largest = max(largest, max(magnitude(low), magnitude(high)))
            into[i] = paired(low, high)
    if largest >= ROUNDS_TO_INFINITY:
        broken[0] = 1


def _kept(delta: np.float32, above: np.int32) -> np.float32:
    return delta * np.float32(np.int32(magnitude(delta)) > above)


def elected(one: Number, other: Number, plus: Number) -> Number:
    """The sum of those of two terms that have its sign. `plus` is 1."""
    none = plus - plus
    sign = plus if one + other >= none else -plus
    one, other = one * sign, other * sign
    one, other = none if one < none else one, none if other < none else other
    return (one + other) * sign


def elected_mean(one: Number, other: Number, x: Number, y: Number, plus: Number) -> Number:
    """The same, divided by the weights of the terms that it has: x of one, y of the other."""
    none = plus - plus
    sign = plus if one + other >= none else -plus
    one, other = one * sign, other * sign
    divisor = (x if one > none else none) + (y if other > none else none)
    one, other = none if one < none else one, none if other < none else other
    return (one + other) * sign / (plus if divisor == none else divisor)
