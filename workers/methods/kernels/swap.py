"""From the base to the other model where the two are near to each other, by the rule of `nearswap`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import CODES, any_nonfinite, rounded, widened
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines


def _swaps(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    points: int,
    shares: Pointer,
    least: float,
    count: int,
    out_halves: Pointer,
    out_words: Pointer,
    out_longs: Pointer,
    out_dtype: int,
    broken_parents: Pointer,
    broken_points: Pointer,
    lines: Pointer,
) -> None:
    """The base is parent 0, the other model parent 1; `shares` holds t of each point. See `passes.Swap`."""
    nothing = least - least  # numbers of the right dtype
    one = nothing + np.float32(1)
    base, other, distance, total = lines[0], lines[1], lines[2], lines[3]
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        for parent in range(2):
            code, half, word, long = dtypes[parent], halves[parent], words[parent], longs[parent]
            widened(code, half, word, long, first, size, lines[parent])
            if any_nonfinite(code, half, word, long, first, size):
                broken_parents[parent] = 1
        for i in range(size):
            apart = abs(base[i] - other[i])
            distance[i] = least if apart < least else apart
        for point in range(points):
            t = shares[point]
            for i in range(size):
                share = t / distance[i]
                share = one if share > one else share
                share = nothing if share < nothing else share
                total[i] = share * other[i] + (one - share) * base[i]
            half, word, long = out_halves[point], out_words[point], out_longs[point]
            rounded(out_dtype, total, size, half, word, long, first)
            if any_nonfinite(out_dtype, half, word, long, first, size):
                broken_points[point] = 1


_TENSORS = ("u16**", "u32**", "u64**")
_KERNELS = {
    name: kernel(
        *(*_TENSORS, "i64*", "i64", f"{short}*", short, "i64"),
        *(*_TENSORS, "i64", "u8*", "u8*", f"{short}**"),
    )(_swaps)
    for name, short in (("float32", "f32"), ("float64", "f64"))
}


def run_swaps(
    base: Array, other: Array, shares: Sequence[float], least: float, outputs: Sequence[Array], arithmetic: str
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Writes the elements of one point for each t of `shares`, each rounded once.

    Returns for base and other, and for each output, whether any element is NaN or infinite.
    """
    parents, dtype = (base, other), np.dtype(arithmetic)
    assert all(each.size == base.size and each.flags.c_contiguous for each in (*parents, *outputs))
    numbers, dtypes = np.array(shares, dtype), np.array([CODES[each.dtype] for each in parents], np.int64)
    broken = np.zeros(2, np.bool_), np.zeros(len(outputs), np.bool_)
    lines, _memory = aligned_lines(4, BLOCK * dtype.itemsize)
    raw, out = addresses(parents), addresses(outputs)
    _KERNELS[arithmetic](
        *(*3 * (address(raw),), address(dtypes), len(outputs), address(numbers), least, base.size),
        *(*3 * (address(out),), CODES[outputs[0].dtype], address(broken[0]), address(broken[1]), address(lines)),
    )
    return broken
