"""Merges pulled back to their base by one number for each input channel, as `passes.Relaxed` defines it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import CODES, rounded, widened
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines


def _relaxations(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtype: int,
    merged: Pointer,
    points: int,
    factors: Pointer,
    width: int,
    stride: int,
    block: int,
    start: int,
    count: int,
    out_halves: Pointer,
    out_words: Pointer,
    out_longs: Pointer,
    out_dtype: int,
    broken_points: Pointer,
    lines: Pointer,
) -> None:
    """The base is one tensor, and `merged` one in the arithmetic dtype; `factors` are those of each point."""
    base, line, total = lines[0], lines[1], lines[2]
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        widened(dtype, halves, words, longs, first, size, base)
        for i in range(size):
            line[i] = merged[first + i]
        for point in range(points):
            relaxed(base, line, factors[point], width, stride, block, start + first, size, total)
            if rounded(out_dtype, total, size, out_halves[point], out_words[point], out_longs[point], first):
                broken_points[point] = 1


def relaxed(
    base: Pointer,
    merged: Pointer,
    factors: Pointer,
    width: int,
    stride: int,
    block: int,
    start: int,
    count: int,
    into: Pointer,
) -> None:
    """base + (merged − base) · factor for a line, whose first element is `start` of the tensor."""
    at = 0
    while at < count:
        place = start + at
        channel = place // stride % width
        index = place // block * width + channel
        if stride == 1:
            stretch = min(width - channel, count - at)
            for i in range(stretch):
                into[at + i] = base[at + i] + (merged[at + i] - base[at + i]) * factors[index + i]
        else:
            stretch, factor = min(stride - place % stride, count - at), factors[index]
            for i in range(stretch):
                into[at + i] = base[at + i] + (merged[at + i] - base[at + i]) * factor
        at += stretch


_TENSORS = ("u16**", "u32**", "u64**")
_KERNELS = {
    name: kernel(
        *("u16*", "u32*", "u64*", "i64", f"{short}*", "i64", f"{short}**", "i64", "i64", "i64", "i64", "i64"),
        *(*_TENSORS, "i64", "u8*", f"{short}**"),
    )(_relaxations)
    for name, short in (("float32", "f32"), ("float64", "f64"))
}


REPEATS, RELAXES = 4, 8
"""Modes of a point in other kernels."""


@dataclass(frozen=True, slots=True, eq=False)
class Relaxation:
    """Element i of the tensor has factor (i // block) · width + (i // stride) % width; `places` is those three."""

    factors: Array
    places: tuple[int, int, int]


class Relaxations:
    """Those of all points of another kernel, as its arguments; the points that repeat the merge of the one before."""

    def __init__(self, points: Sequence[tuple[Relaxation | None, bool]], arithmetic: np.dtype[Any]) -> None:
        none = Relaxation(np.zeros(0, arithmetic), (1, 1, 1))
        given = [relaxation for relaxation, _ in points if relaxation is not None]
        self.modes = np.array([REPEATS * again + RELAXES * (each is not None) for each, again in points], np.int64)
        self._kept = [none if each is None else each for each, _ in points]
        self._factors = addresses([each.factors for each in self._kept])
        self._places = given[0].places if given else none.places
        assert all(each.places == self._places and each.factors.dtype == arithmetic for each in given)

    @property
    def arguments(self) -> tuple[int, ...]:
        """The addresses of modes and factors, width, stride and block."""
        return address(self.modes), address(self._factors), *self._places


def run_relaxations(
    base: Array,
    merged: Array,
    factors: Sequence[Array],
    places: tuple[int, int, int],
    start: int,
    outputs: Sequence[Array],
) -> NDArray[np.bool_]:
    """Writes the elements of one point for each array of `factors`, each element rounded once.

    `merged` and the factors are of the arithmetic dtype. Element i of the tensor, the first of which is `start`, has
    factor (i // block) · width + (i // stride) % width, where `places` is (width, stride, block). Returns for each
    output whether any element is NaN or infinite.
    """
    assert all(each.size == base.size and each.flags.c_contiguous for each in (base, merged, *outputs))
    assert all(each.dtype == merged.dtype and each.flags.c_contiguous for each in factors)
    broken = np.zeros(len(outputs), np.bool_)
    lines, _memory = aligned_lines(3, BLOCK * merged.itemsize)
    numbers, out = addresses(factors), addresses(outputs)
    _KERNELS[merged.dtype.name](
        *(*3 * (address(base),), CODES[base.dtype], address(merged), len(outputs), address(numbers)),
        *(*places, start, base.size),
        *(*3 * (address(out),), CODES[outputs[0].dtype], address(broken), address(lines)),
    )
    return broken
