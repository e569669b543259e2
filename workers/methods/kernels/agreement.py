"""base + what the task vectors of a point have in common, by the rules of `sce`, `ram` and `consensus_ta`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Kernel, Pointer, kernel
from workers.methods.kernels.dtypes import CODES, any_nonfinite, rounded, widened
from workers.methods.kernels.masks import MOST_MASKS, Words
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines

Flags = tuple[NDArray[np.bool_], NDArray[np.bool_]]
"""For each parent, and for each output, whether any element is NaN or infinite."""


def _deltas(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    models: int,
    first: int,
    size: int,
    lines: Pointer,
    broken: Pointer,
) -> None:
    """Fills the lines of the models with their task vectors; the base is the parent after them."""
    for parent in range(models + 1):
        code, half, word, long = dtypes[parent], halves[parent], words[parent], longs[parent]
        widened(code, half, word, long, first, size, lines[parent])
        if any_nonfinite(code, half, word, long, first, size):
            broken[parent] = 1
    base = lines[models]
    for model in range(models):
        line = lines[model]
        for i in range(size):
            line[i] = line[i] - base[i]


def _stored(
    base: Pointer,
    total: Pointer,
    first: int,
    size: int,
    code: int,
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    broken: Pointer,
) -> None:
    """Writes base + total."""
    for i in range(size):
        total[i] = base[i] + total[i]
    if rounded(code, total, size, halves[0], words[0], longs[0], first):
        broken[0] = 1


def _selected(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    models: int,
    points: int,
    weights: Pointer,
    least: float,
    masks: Pointer,
    bits: Pointer,
    count: int,
    out_halves: Pointer,
    out_words: Pointer,
    out_longs: Pointer,
    out_dtype: int,
    broken_parents: Pointer,
    broken_points: Pointer,
    lines: Pointer,
    none: Pointer,
    merged: Pointer,
    total: Pointer,
    signs: Pointer,
    divisor: Pointer,
) -> None:
    """See `passes.SelectedConsensus`: points by their weights and by the bits of their masks in a word an element.

    `none` is the result where a mask lacks an element: of zeros, which have signs, or NaN where a task vector is
    NaN or infinite. The mask of a point has all elements if a weight is not finite. Points that have the weights of the
    one before have its `merged` elements.
    """
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        _deltas(halves, words, longs, dtypes, models, first, size, lines, broken_parents)
        base = lines[models]
        for model in range(models):
            delta = lines[model]
            for i in range(size):
                nothing = delta[i] * np.float32(0) * np.float32(0)
                none[i] = nothing if model == 0 else none[i] + nothing
                total[i] = delta[i] if model == 0 else total[i] + delta[i]
        for i in range(size):
            none[i] = base[i] + none[i] / least
            signs[i] = 1 if total[i] >= 0 else -1
        for point in range(points):
            own = point * models
            same = point > 0
            for model in range(models):
                same = same and weights[own + model] == weights[own - models + model]
            if not same:
                _weighed(lines, signs, weights, own, models, merged, divisor, size)
                for i in range(size):
                    merged[i] = base[i] + merged[i] / (least if divisor[i] < least else divisor[i])
            _chosen(masks, first, bits[point], merged, none, total, size)
            if rounded(out_dtype, total, size, out_halves[point], out_words[point], out_longs[point], first):
                broken_points[point] = 1


def _chosen(
    masks: Pointer, first: int, bit: np.uint16, merged: Pointer, none: Pointer, into: Pointer, size: int
) -> None:
    for i in range(size):
        one, other = merged[i], none[i]  # loaded in any case: vectors have no branches
        into[i] = one if (masks[first + i] & bit) != 0 else other


def _weighed(
    lines: Pointer, signs: Pointer, weights: Pointer, at: int, models: int, total: Pointer, divisor: Pointer, size: int
) -> None:
    """Σ δᵢ·wᵢ and Σ wᵢ over the models whose δᵢ has the sign; zero times the others."""
    for model in range(models):
        delta, weight = lines[model], weights[at + model]
        nothing = weight - weight  # a zero of the right dtype
        if model == 0:
            for i in range(size):
                share = weight if delta[i] * signs[i] > 0 else nothing
                total[i] = delta[i] * share
                divisor[i] = share
        else:
            for i in range(size):
                share = weight if delta[i] * signs[i] > 0 else nothing
                total[i] = total[i] + delta[i] * share
                divisor[i] = divisor[i] + share


def _overlapping(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    models: int,
    factors: Pointer,
    has_factors: int,
    epsilon: float,
    count: int,
    out_halves: Pointer,
    out_words: Pointer,
    out_longs: Pointer,
    out_dtype: int,
    broken_parents: Pointer,
    broken_output: Pointer,
    lines: Pointer,
    total: Pointer,
    active: Pointer,
    alone: Pointer,
) -> None:
    """See `passes.Overlap`."""
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        _deltas(halves, words, longs, dtypes, models, first, size, lines, broken_parents)
        for model in range(models):
            delta, factor = lines[model], factors[model]
            if model == 0:
                for i in range(size):
                    changed = np.float32(abs(delta[i]) > epsilon)
                    total[i] = delta[i] * changed
                    alone[i] = total[i] * factor
                    active[i] = changed
            else:
                for i in range(size):
                    changed = np.float32(abs(delta[i]) > epsilon)
                    change = delta[i] * changed
                    total[i] = total[i] + change
                    alone[i] = alone[i] + change * factor
                    active[i] = active[i] + changed
        one = epsilon - epsilon + np.float32(1)
        for i in range(size):
            mean = total[i] / (one if active[i] < one else active[i])
            total[i] = alone[i] if has_factors and active[i] == one else mean
        _stored(lines[models], total, first, size, out_dtype, out_halves, out_words, out_longs, broken_output)


def _tall(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    models: int,
    weights: Pointer,
    ratios: Pointer,
    least: float,
    scale: float,
    count: int,
    out_halves: Pointer,
    out_words: Pointer,
    out_longs: Pointer,
    out_dtype: int,
    broken_parents: Pointer,
    broken_output: Pointer,
    lines: Pointer,
    total: Pointer,
    users: Pointer,
) -> None:
    """See `passes.TallConsensus`."""
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        _deltas(halves, words, longs, dtypes, models, first, size, lines, broken_parents)
        for model in range(models):
            vote, weight = lines[model], weights[model]
            for i in range(size):
                vote[i] = vote[i] * weight
                total[i] = vote[i] if model == 0 else total[i] + vote[i]
        for model in range(models):
            vote, ratio = lines[model], ratios[model]
            for i in range(size):
                uses = np.float32(abs(vote[i]) > abs(total[i] - vote[i]) * ratio)
                users[i] = uses if model == 0 else users[i] + uses
        for i in range(size):
            total[i] = total[i] * np.float32(users[i] >= least) * scale
        _stored(lines[models], total, first, size, out_dtype, out_halves, out_words, out_longs, broken_output)


def _overlaps(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    models: int,
    epsilon: float,
    count: int,
    counts: Pointer,
    broken: Pointer,
    lines: Pointer,
    active: Pointer,
) -> None:
    """Counts for each model the elements that are active in it and in another, and in it alone."""
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        _deltas(halves, words, longs, dtypes, models, first, size, lines, broken)
        for i in range(size):
            active[i] = 0
        for model in range(models):
            delta = lines[model]
            for i in range(size):
                delta[i] = np.float32(abs(delta[i]) > epsilon)
                active[i] = active[i] + delta[i]
        for model in range(models):
            delta = lines[model]
            shared = only = 0
            for i in range(size):
                shared += np.int64((delta[i] > 0) & (active[i] > 1))
                only += np.int64((delta[i] > 0) & (active[i] == 1))
            counts[2 * model] += shared
            counts[2 * model + 1] += only


@kernel("u16**", "u32**", "u64**", "i64*", "i64", "f32", "i64", "u32*", "u8*", "f32**", "f32*")
def _variances(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    models: int,
    share: float,
    count: int,
    bits: Pointer,
    broken: Pointer,
    lines: Pointer,
    mean: Pointer,
) -> None:
    """Σ (δᵢ − m)² in float32, m = Σ δᵢ · share, as the bits of a number without a sign."""
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        _deltas(halves, words, longs, dtypes, models, first, size, lines, broken)
        for model in range(models):
            delta = lines[model]
            for i in range(size):
                mean[i] = delta[i] if model == 0 else mean[i] + delta[i]
        for i in range(size):
            mean[i] = mean[i] * share
        total = lines[models]  # the base is not needed any more
        for model in range(models):
            delta = lines[model]
            for i in range(size):
                off = delta[i] - mean[i]
                total[i] = off * off if model == 0 else total[i] + off * off
        for i in range(size):
            bits[first + i] = np.uint32(np.float32(total[i]).view(np.uint32) & np.uint32(0x7FFFFFFF))


_TENSORS = ("u16**", "u32**", "u64**")
_SHORT = {"float32": "f32", "float64": "f64"}
_SELECTED = {
    name: kernel(
        *(*_TENSORS, "i64*", "i64", "i64", f"{short}*", short, "u16*", "u16*", "i64", *_TENSORS, "i64"),
        *("u8*", "u8*", f"{short}**", f"{short}*", f"{short}*", f"{short}*", f"{short}*", f"{short}*"),
    )(_selected)
    for name, short in _SHORT.items()
}
_OVERLAPPING = {
    name: kernel(
        *(*_TENSORS, "i64*", "i64", f"{short}*", "i64", short, "i64", *_TENSORS, "i64", "u8*", "u8*"),
        *(f"{short}**", f"{short}*", f"{short}*", f"{short}*"),
    )(_overlapping)
    for name, short in _SHORT.items()
}
_TALL = {
    name: kernel(
        *(*_TENSORS, "i64*", "i64", f"{short}*", f"{short}*", short, short, "i64", *_TENSORS, "i64", "u8*", "u8*"),
        *(f"{short}**", f"{short}*", f"{short}*"),
    )(_tall)
    for name, short in _SHORT.items()
}
_OVERLAPS = {
    name: kernel(*_TENSORS, "i64*", "i64", short, "i64", "i64*", "u8*", f"{short}**", f"{short}*")(_overlaps)
    for name, short in _SHORT.items()
}


class _Memory:
    """The parents (models, then the base), flags and scratch lines of one call."""

    def __init__(self, parents: Sequence[Array], arithmetic: str, scratch: int) -> None:
        dtype = np.dtype(arithmetic)
        self.elements, self.models = parents[0].size, len(parents) - 1
        assert all(each.size == self.elements and each.flags.c_contiguous for each in parents)
        self._kept, self._raw = parents, addresses(parents)
        self._dtypes = np.array([CODES[each.dtype] for each in parents], np.int64)
        self._lines, self._memory = aligned_lines(len(parents) + scratch, BLOCK * dtype.itemsize)
        self.broken = np.zeros(len(parents), np.bool_)
        self.parents = (*3 * (address(self._raw),), address(self._dtypes), self.models)
        self.lines = (address(self._lines), *map(int, self._lines[len(parents) :]))

    def run(self, kernel: Kernel, outputs: Sequence[Array], *arguments: float) -> Flags:
        """Writes points, or the one of a kernel that takes no more, by a kernel with these arguments of its own."""
        out, broken = addresses(outputs), np.zeros(len(outputs), np.bool_)
        kernel(
            *(*self.parents, *arguments, self.elements, *3 * (address(out),), CODES[outputs[0].dtype]),
            *(address(self.broken), address(broken), *self.lines),
        )
        return self.broken, broken


def run_selected(
    parents: Sequence[Array],
    weights: Sequence[Sequence[float]],
    least: float,
    words: Words,
    outputs: Sequence[Array],
    arithmetic: str,
) -> Flags:
    """Writes points of `passes.SelectedConsensus`: parents are the models, then the base; `least` is 10⁻⁶.

    There are at most 16 points. Bit p of a word says whether point p selects the element.
    """
    assert words.dtype == np.uint16 and words.size == parents[0].size and len(outputs) <= MOST_MASKS
    memory, numbers = _Memory(parents, arithmetic, 5), np.array(weights, arithmetic)
    bits = np.uint16(1) << np.arange(len(outputs), dtype=np.uint16)
    chosen = address(numbers), least, address(words), address(bits)
    return memory.run(_SELECTED[arithmetic], outputs, len(outputs), *chosen)


def run_overlap(
    parents: Sequence[Array], factors: Sequence[float] | None, epsilon: float, output: Array, arithmetic: str
) -> Flags:
    """Writes one point of `passes.Overlap`: parents are the models, then the base."""
    memory = _Memory(parents, arithmetic, 3)
    numbers = np.array([1.0] * memory.models if factors is None else factors, arithmetic)
    return memory.run(_OVERLAPPING[arithmetic], [output], address(numbers), factors is not None, epsilon)


def run_tall(
    parents: Sequence[Array],
    weights: Sequence[float],
    ratios: Sequence[float],
    k: float,
    scale: float,
    output: Array,
    arithmetic: str,
) -> Flags:
    """Writes one point of `passes.TallConsensus`: parents are the models, then the base."""
    memory = _Memory(parents, arithmetic, 2)
    numbers = np.array([weights, ratios], arithmetic)
    return memory.run(_TALL[arithmetic], [output], address(numbers[0]), address(numbers[1]), k, scale)


def overlap_counts(parents: Sequence[Array], epsilon: float, arithmetic: str) -> list[tuple[int, int]]:
    """For each model (the base is the last parent): active elements shared with another model, and its own alone."""
    memory = _Memory(parents, arithmetic, 1)
    counts = np.zeros((memory.models, 2), np.int64)
    _OVERLAPS[arithmetic](
        *(*memory.parents, epsilon, memory.elements, address(counts)),
        *(address(memory.broken), *memory.lines),
    )
    return [(int(shared), int(alone)) for shared, alone in counts]


def variance_bits(parents: Sequence[Array]) -> NDArray[np.int32]:
    """`ranking.Variance` of the models (the base is the last parent), as integers of the same order."""
    memory = _Memory([np.ascontiguousarray(each) for each in parents], "float32", 1)
    bits = np.empty(memory.elements, np.int32)
    _variances(
        *(*memory.parents, 1 / memory.models, memory.elements, address(bits)),
        *(address(memory.broken), *memory.lines),
    )
    return bits
