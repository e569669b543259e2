"""Merges pulled back to their base by one number for each input channel, as `passes.Relaxed` defines it."""

from __future__ import annotations

from collections.abc import Sequence

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
    base, step, total = lines[0], lines[1], lines[2]
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        widened(dtype, halves, words, longs, first, size, base)
        for i in range(size):
            step[i] = merged[first + i] - base[i]
        for point in range(points):
            _relax(base, step, factors[point], width, stride, block, start + first, size, total)
            if rounded(out_dtype, total, size, out_halves[point], out_words[point], out_longs[point], first):
                broken_points[point] = 1


def _relax(
    base: Pointer,
    step: Pointer,
    factors: Pointer,
    width: int,
    stride: int,
    block: int,
    start: int,
    count: int,
    total: Pointer,
) -> None:
    at = 0
    while at < count:
        place = start + at
        channel = place // stride % width
        index = place // block * width + channel
        if stride == 1:
            stretch = min(width - channel, count - at)
            for i in range(stretch):
                total[at + i] = base[at + i] + step[at + i] * factors[index + i]
        else:
            stretch, factor = min(stride - place % stride, count - at), factors[index]
            for i in range(stretch):
                total[at + i] = base[at + i] + step[at + i] * factor
        at += stretch


_TENSORS = ("u16**", "u32**", "u64**")
_KERNELS = {
    name: kernel(
        *("u16*", "u32*", "u64*", "i64", f"{short}*", "i64", f"{short}**", "i64", "i64", "i64", "i64", "i64"),
        *(*_TENSORS, "i64", "u8*", f"{short}**"),
    )(_relaxations)
    for name, short in (("float32", "f32"), ("float64", "f64"))
}


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
