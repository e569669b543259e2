"""base + a consensus of trimmed task vectors, for all points at once: each task vector is trimmed once for them all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from workers.methods.kernels.compiling import Pointer, kernel
from workers.methods.kernels.dtypes import CODES, any_nonfinite, rounded, widened
from workers.methods.kernels.masks import Mask
from workers.methods.kernels.memory import BLOCK, Array, address, addresses, aligned_lines, are_pairs
from workers.methods.kernels.ranks import EVERY, NONE, Limit, RowFactors, multiplied
from workers.methods.kernels.relaxation import RELAXES, REPEATS, Relaxation, Relaxations, relaxed
from workers.methods.kernels.short_consensus import elected, elected_mean, short_consensus

_ELECTS, _NORMALIZES = 1, 2
_FIELDS = 8  # of a trimmed task vector, see `_consensus`


def _consensus(
    halves: Pointer,
    words: Pointer,
    longs: Pointer,
    dtypes: Pointer,
    parents: int,
    vectors: Pointer,
    trimmed: int,
    factors: Pointer,
    masks: Pointer,
    row_factors: Pointer,
    row: int,
    column: int,
    points: int,
    bases: Pointer,
    ends: Pointer,
    terms: Pointer,
    weights: Pointer,
    modes: Pointer,
    relaxations: Pointer,
    width: int,
    stride: int,
    block: int,
    scales: Pointer,
    start: int,
    count: int,
    out_halves: Pointer,
    out_words: Pointer,
    out_longs: Pointer,
    out_dtype: int,
    broken_parents: Pointer,
    broken_points: Pointer,
    lines: Pointer,
    relaxed_total: Pointer,
    total: Pointer,
    mass: Pointer,
) -> None:
    """For each block: every parent as a line of numbers, then every trimmed task vector, then every point.

    `vectors` holds of each task vector (line of the model, line of the base, keep above, equals to keep, drop above,
    equals to drop, the bit of its mask or 0, has row factors). "Equals" counts those left of the elements that are
    exactly as large as the limit; −1 means that nothing has to be counted. Point p has the terms up to `ends[p]`, which
    index `vectors`. A point that `REPEATS` has the consensus of the one before; one that `RELAXES` has factors in
    `relaxations`.
    """
    for first in range(0, count, BLOCK):
        size = min(BLOCK, count - first)
        for parent in range(parents):
            code, half, word, long = dtypes[parent], halves[parent], words[parent], longs[parent]
            widened(code, half, word, long, first, size, lines[parent])
        for vector in range(trimmed):
            at = _FIELDS * vector
            model, base, into = lines[vectors[at]], lines[vectors[at + 1]], lines[parents + vector]
            above, beyond, factor = np.int32(vectors[at + 2]), np.int32(vectors[at + 4]), factors[vector]
            if vectors[at + 6] and above == EVERY and beyond == NONE:
                _masked(model, base, masks[vector], np.uint16(vectors[at + 6]), first, factor, into, size)
                continue
            if vectors[at + 7]:
                _trim_by_rows(model, base, above, row_factors[vector], row, column + first, into, size)
            elif vectors[at + 3] >= 0 or vectors[at + 5] >= 0:
                _trim_counting(model, base, vectors, at, into, size)
            else:
                _trim(model, base, above, beyond, into, size)
            if vectors[at + 6]:
                _mask(masks[vector], np.uint16(vectors[at + 6]), first, into, size)
            if factor != 1:
                for i in range(size):
                    into[i] = into[i] * factor
        begin = 0
        broken = False
        for point in range(points):
            end = ends[point]
            base, scale, mode = lines[bases[point]], scales[point], modes[point]
            if mode & REPEATS:
                pass
            elif end - begin == 2:
                a, b = lines[parents + terms[begin]], lines[parents + terms[begin + 1]]
                _mix_two(mode, a, b, weights[begin], weights[begin + 1], scale, base, total, size)
            else:
                _sum(lines, parents, terms, weights, begin, end, total, size)
                if mode & _ELECTS:
                    _elect(lines, parents, terms, weights, begin, end, total, mass, size, mode & _NORMALIZES)
                for i in range(size):
                    total[i] = base[i] + total[i] * scale
            half, word, long = out_halves[point], out_words[point], out_longs[point]
            if mode & RELAXES:
                own = relaxations[point]
                relaxed(base, total, own, width, stride, block, start + first, size, relaxed_total)
                found = rounded(out_dtype, relaxed_total, size, half, word, long, first)
            else:
                found = rounded(out_dtype, total, size, half, word, long, first)
            if found:
                broken_points[point] = 1
                broken = True
            begin = end
        if broken:  # an element of a parent that is NaN or infinite makes the results so in which it takes part
            for parent in range(parents):
                if any_nonfinite(dtypes[parent], halves[parent], words[parent], longs[parent], first, size):
                    broken_parents[parent] = 1


def magnitude_bits(model: float, base: float) -> np.int32:
    """|model − base| in float32, as an integer of the same order."""
    delta = np.float32(np.float32(model) - np.float32(base))
    return np.int32(np.uint32(delta.view(np.uint32) & np.uint32(0x7FFFFFFF)))


def _trim(model: Pointer, base: Pointer, above: np.int32, beyond: np.int32, delta: Pointer, count: int) -> None:
    """The task vector, times 1 where it is kept and 0 elsewhere."""
    for i in range(count):
        bits = magnitude_bits(model[i], base[i])
        delta[i] = (model[i] - base[i]) * np.float32((bits > above) & (bits <= beyond))


def _trim_by_rows(
    model: Pointer, base: Pointer, above: np.int32, factors: Pointer, row: int, place: int, delta: Pointer, count: int
) -> None:
    """The same by magnitudes times the factors of their rows; `place` counts from the start of the first row."""
    done = 0
    while done < count:
        of_row = (place + done) // row
        end = min(count, row * (of_row + 1) - place)
        factor = factors[of_row]
        for i in range(done, end):
            magnitude = np.uint32(magnitude_bits(model[i], base[i])).view(np.float32)
            bits = np.int32(multiplied(magnitude, factor))
            delta[i] = (model[i] - base[i]) * np.float32(bits > above)
        done = end


def _trim_counting(model: Pointer, base: Pointer, vectors: Pointer, at: int, delta: Pointer, count: int) -> None:
    """The same where only the first of the elements that equal a limit are kept, or dropped.

    A block where that holds for all of its equals, or for none, is trimmed at once.
    """
    above, to_keep = vectors[at + 2], vectors[at + 3]
    beyond, to_drop = vectors[at + 4], vectors[at + 5]
    at_above = _equals(model, base, np.int32(above), count) if to_keep > 0 else 0
    at_beyond = _equals(model, base, np.int32(beyond), count) if to_drop > 0 else 0
    if at_above <= max(to_keep, 0) and at_beyond <= max(to_drop, 0):
        vectors[at + 3] = to_keep - at_above
        vectors[at + 5] = to_drop - at_beyond
        _trim(model, base, np.int32(above - (to_keep > 0)), np.int32(beyond - (to_drop > 0)), delta, count)
        return
    for i in range(count):
        bits = np.int64(magnitude_bits(model[i], base[i]))
        kept = bits > above
        if bits == above and vectors[at + 3] > 0:
            vectors[at + 3] -= 1
            kept = True
        if bits > beyond:
            kept = False
        elif bits == beyond and vectors[at + 5] > 0:
            vectors[at + 5] -= 1
            kept = False
        delta[i] = (model[i] - base[i]) * np.float32(kept)


def _equals(model: Pointer, base: Pointer, limit: np.int32, count: int) -> int:
    found = 0
    for i in range(count):
        found += magnitude_bits(model[i], base[i]) == limit
    return found


def _masked(
    model: Pointer,
    base: Pointer,
    words: Pointer,
    bit: np.uint16,
    start: int,
    factor: float,
    delta: Pointer,
    count: int,
) -> None:
    """The task vector times its mask and its factor."""
    for i in range(count):
        delta[i] = (model[i] - base[i]) * np.float32((words[start + i] & bit) != 0) * factor


def _mask(words: Pointer, bit: np.uint16, start: int, delta: Pointer, count: int) -> None:
    for i in range(count):
        delta[i] = delta[i] * np.float32((words[start + i] & bit) != 0)


def _mix_two(
    mode: int, a: Pointer, b: Pointer, x: float, y: float, scale: float, base: Pointer, total: Pointer, count: int
) -> None:
    """base + scale · the consensus of two task vectors of weights x and y: what `_sum` and `_elect` do, in one go."""
    total[0] = 1
    plus = total[0]  # of the dtype of the arithmetic, which literals are not
    if not mode & _ELECTS:
        for i in range(count):
            total[i] = base[i] + (a[i] * x + b[i] * y) * scale
    elif not mode & _NORMALIZES:
        for i in range(count):
            total[i] = base[i] + elected(a[i] * x, b[i] * y, plus) * scale
    else:
        for i in range(count):
            total[i] = base[i] + elected_mean(a[i] * x, b[i] * y, x, y, plus) * scale


def _sum(
    lines: Pointer, parents: int, terms: Pointer, weights: Pointer, begin: int, end: int, total: Pointer, count: int
) -> None:
    for term in range(begin, end):
        delta, weight = lines[parents + terms[term]], weights[term]
        if term == begin:
            for i in range(count):
                total[i] = delta[i] * weight
        else:
            for i in range(count):
                total[i] = total[i] + delta[i] * weight


def _elect(
    lines: Pointer,
    parents: int,
    terms: Pointer,
    weights: Pointer,
    begin: int,
    end: int,
    total: Pointer,
    mass: Pointer,
    count: int,
    normalizes: int,
) -> None:
    """In place of the sum: the sum of those terms that have its sign, divided by their weights if `normalizes`.

    `mass` is scratch for two lines: the signs and the divisors.
    """
    for i in range(count):
        mass[i] = 1 if total[i] >= 0 else -1
    for term in range(begin, end):
        delta, weight = lines[parents + terms[term]], weights[term]
        nothing = weight - weight  # a zero of the right dtype
        if term == begin:
            for i in range(count):
                turned = delta[i] * weight * mass[i]
                total[i] = nothing if turned < 0 else turned
                mass[BLOCK + i] = weight if turned > 0 else nothing
        else:
            for i in range(count):
                turned = delta[i] * weight * mass[i]
                total[i] += nothing if turned < 0 else turned
                mass[BLOCK + i] += weight if turned > 0 else nothing
    if normalizes:
        for i in range(count):
            divisor, one = mass[BLOCK + i], mass[i] * mass[i]
            total[i] = total[i] * mass[i] / (one if divisor == 0 else divisor)
    else:
        for i in range(count):
            total[i] = total[i] * mass[i]


_TENSORS = ("u16**", "u32**", "u64**")
_KERNELS = {
    name: kernel(
        *(*_TENSORS, "i64*", "i64"),
        *("i64*", "i64", f"{short}*", "u16**", "f64**", "i64", "i64"),
        *("i64", "i64*", "i64*", "i64*", f"{short}*"),
        *("i64*", f"{short}**", "i64", "i64", "i64", f"{short}*", "i64", "i64"),
        *(*_TENSORS, "i64", "u8*", "u8*", f"{short}**", f"{short}*", f"{short}*", f"{short}*"),
    )(_consensus)
    for name, short in (("float32", "f32"), ("float64", "f64"))
}


@dataclass(frozen=True, slots=True, eq=False)
class Trimmed:
    """model − base, kept where it is above one limit and not above the other and its mask is 1; then times `factor`.

    Parents are places in a list. A limit of None keeps all, or drops none. With `scaled`, magnitudes times the factors
    of their rows are held against `among`, which then keeps no equals, alone.
    """

    model: int
    base: int
    among: Limit | None = None
    beyond: Limit | None = None
    mask: Mask | None = None
    factor: float | None = None
    scaled: RowFactors | None = None


@dataclass(frozen=True, slots=True)
class Mixture:
    """One point: base + scale · Σ weight · trimmed, over (place of the trimmed task vector, weight).

    With `elects`, the sum is that of the terms with its own sign; with `normalizes` it is divided by their weights.
    With `repeats`, all before its relaxation is that of the point before.
    """

    base: int
    terms: tuple[tuple[int, float], ...]
    elects: bool
    normalizes: bool
    scale: float
    relaxation: Relaxation | None = None
    repeats: bool = False


def _done_short(parents: Sequence[Array], trimmed: Sequence[Trimmed], each: Mixture, output: Array) -> bool:
    """Whether `short_consensus` has a loop for this point, and found nothing that is not finite."""
    if not each.elects or each.relaxation is not None or len(each.terms) != 2:
        return False
    if any(vector.base != each.base for vector in trimmed):
        return False
    limits = [vector.among or Limit(EVERY) for vector in trimmed]
    others = [each for vector in trimmed for each in (vector.beyond, vector.mask, vector.factor, vector.scaled)]
    if any(other is not None for other in (*others, *(limit.equals for limit in limits))):
        return False
    (one, x), (two, y) = each.terms
    broken = np.zeros(1, np.bool_)
    places = each.base, trimmed[one].model, trimmed[two].model
    short_consensus(
        *(*(address(parents[place]) for place in places), limits[one].bits, limits[two].bits, x, y, each.scale),
        *(each.normalizes, output.size // 2, address(output), address(broken)),
    )
    return not broken[0]


def run_mixtures(
    parents: Sequence[Array],
    trimmed: Sequence[Trimmed],
    mixtures: Sequence[Mixture],
    outputs: Sequence[Array],
    arithmetic: str,
    start: int = 0,
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Writes every point's elements, each rounded once: `outputs` are of one dtype and as long as each parent.

    No output overlaps a parent. The elements begin at `start` of the tensor. Returns for each parent, and for each
    output, whether any element is NaN or infinite.
    """
    elements, dtype = len(parents[0]), np.dtype(arithmetic)
    assert all(each.size == elements and each.flags.c_contiguous for each in (*parents, *outputs))
    masks = [each.mask.words for each in trimmed if each.mask is not None]
    assert all(each.dtype == np.uint16 and each.size == elements and each.flags.c_contiguous for each in masks)
    arrays = *parents, *outputs
    places = addresses(arrays)
    short = arithmetic == "float32" and len(mixtures) == 1 and are_pairs(arrays, places)
    if short and _done_short(parents, trimmed, mixtures[0], outputs[0]):
        return np.zeros(len(parents), np.bool_), np.zeros(1, np.bool_)
    vectors = np.array([_fields(each) for each in trimmed], np.int64)
    factors = np.array([1.0 if each.factor is None else each.factor for each in trimmed], dtype)
    of_masks = addresses([np.zeros(1, np.uint16) if each.mask is None else each.mask.words for each in trimmed])
    scaled = [each.scaled for each in trimmed if each.scaled is not None]
    row, column = (scaled[0].row, scaled[0].column) if scaled else (1, 0)
    of_rows = addresses([np.zeros(1) if each.scaled is None else each.scaled.factors for each in trimmed])
    ends = np.cumsum([len(each.terms) for each in mixtures])
    terms = np.array([place for each in mixtures for place, _ in each.terms], np.int64)
    weights = np.array([weight for each in mixtures for _, weight in each.terms], dtype)
    relaxations = Relaxations([(each.relaxation, each.repeats) for each in mixtures], dtype)
    relaxations.modes += [_ELECTS * each.elects + _NORMALIZES * each.normalizes for each in mixtures]
    bases = np.array([each.base for each in mixtures], np.int64)
    scales = np.array([each.scale for each in mixtures], dtype)
    broken = np.zeros(len(parents), np.bool_), np.zeros(len(outputs), np.bool_)
    lines, _memory = aligned_lines(len(parents) + len(trimmed) + 4, BLOCK * dtype.itemsize)
    dtypes = np.array([CODES[each.dtype] for each in parents], np.int64)
    raw_at = address(places)
    out_at = raw_at + len(parents) * places.itemsize
    _KERNELS[arithmetic](
        *(raw_at, raw_at, raw_at, address(dtypes), len(parents)),
        *(address(vectors), len(trimmed), address(factors), address(of_masks), address(of_rows), row, column),
        *(len(mixtures), address(bases), address(ends), address(terms), address(weights)),
        *(*relaxations.arguments, address(scales), start, elements),
        *(out_at, out_at, out_at, CODES[outputs[0].dtype]),
        *(address(broken[0]), address(broken[1]), address(lines)),
        *(int(lines[-4]), int(lines[-3]), int(lines[-2])),
    )
    return broken


def _fields(each: Trimmed) -> tuple[int, ...]:
    among, beyond = each.among or Limit(EVERY), each.beyond or Limit(NONE)
    equals = tuple(-1 if limit.equals is None else limit.equals for limit in (among, beyond))
    bit = 0 if each.mask is None else 1 << each.mask.bit
    return each.model, each.base, among.bits, equals[0], beyond.bits, equals[1], bit, each.scaled is not None
