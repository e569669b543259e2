"""Means of the models that are weighted by the Fisher information of each element, by the rule of `fisher`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import CODES, any_nonfinite, rounded, widened
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines


def _fisher_means(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    models: int,
    points: int,
    weights: Pointer,
    inverse: float,
    floor: float,
    count: int,
    out_halves: Pointer,
    out_words: Pointer,
    out_longs: Pointer,
    out_dtype: int,
    broken_parents: Pointer,
    broken_points: Pointer,
    lines: Pointer,
) -> None:
    """Parents are the models and then their Fisher information; `weights` holds those of each point in turn.

    See `passes.FisherMean`.
    """
    base, steps, total = lines[0], lines[2 * models], lines[2 * models + 1]
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        for parent in range(2 * models):
            code, half, word, long = dtypes[parent], halves[parent], words[parent], longs[parent]
            widened(code, half, word, long, first, size, lines[parent])
            if any_nonfinite(code, half, word, long, first, size):
                broken_parents[parent] = 1
        for model in range(models):
            line, share = lines[model], lines[models + model]
            for i in range(size):
                scaled = share[i] * inverse
                share[i] = floor if scaled < floor else scaled
            if model > 0:
                for i in range(size):
                    line[i] = line[i] - base[i]
        for point in range(points):
            weight = weights[point * models]
            share = lines[models]
            for i in range(size):
                total[i] = share[i] * weight
            for model in range(1, models):
                weight = weights[point * models + model]
                line, share = lines[model], lines[models + model]
                for i in range(size):
                    scaled = share[i] * weight
                    step = line[i] * scaled
                    total[i] = total[i] + scaled
                    steps[i] = step if model == 1 else steps[i] + step
            for i in range(size):
                total[i] = base[i] + steps[i] / total[i]
            half, word, long = out_halves[point], out_words[point], out_longs[point]
            rounded(out_dtype, total, size, half, word, long, first)
            if any_nonfinite(out_dtype, half, word, long, first, size):
                broken_points[point] = 1


_TENSORS = ("u16**", "u32**", "u64**")
_KERNELS = {
    name: kernel(
        *(*_TENSORS, "i64*", "i64", "i64", f"{short}*", short, short, "i64"),
        *(*_TENSORS, "i64", "u8*", "u8*", f"{short}**"),
    )(_fisher_means)
    for name, short in (("float32", "f32"), ("float64", "f64"))
}


def run_fisher_means(
    parents: Sequence[Array],
    weights: Sequence[Sequence[float]],
    inverse: float,
    floor: float,
    outputs: Sequence[Array],
    arithmetic: str,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Writes the elements of one point for each entry of `weights`, each rounded once; two models or more.

    `parents` are the models and then their Fisher information. Returns for each parent, and for each output, whether
    any element is NaN or infinite.
    """
    dtype, models = np.dtype(arithmetic), len(parents) // 2
    assert models > 1
    assert all(each.size == parents[0].size and each.flags.c_contiguous for each in (*parents, *outputs))
    numbers, dtypes = np.array(weights, dtype), np.array([CODES[each.dtype] for each in parents], np.int64)
    broken = np.zeros(len(parents), np.bool_), np.zeros(len(outputs), np.bool_)
    lines, _memory = aligned_lines(2 * models + 2, BLOCK * dtype.itemsize)
    raw, out = addresses(parents), addresses(outputs)
    _KERNELS[arithmetic](
        *(*3 * (address(raw),), address(dtypes), models, len(outputs), address(numbers), inverse, floor),
        *(parents[0].size, *3 * (address(out),), CODES[outputs[0].dtype]),
        *(address(broken[0]), address(broken[1]), address(lines)),
    )
    return broken
