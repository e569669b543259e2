"""How far apart two merges are: units in the last place, one rounding of a float64 value, and masks that explain a
tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch

from tests.conformance.exact import FLOAT32_STEP, Array, Choice, Exact
from tests.conformance.reference import TaskVectors, elected_sign, l1_scale

_PRECISION = {torch.float32: (24, -126), torch.float16: (11, -14), torch.bfloat16: (8, -126)}  # bits, smallest exponent
_INTEGER = {2: torch.int16, 4: torch.int32}


def ulp_distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """int64, elementwise: how many representable values lie from a to b, both of one dtype (bfloat16, float16,
    float32). The two zeros are one value; NaN is 0 from NaN and 2⁶² from anything else."""
    if a.dtype != b.dtype or a.shape != b.shape:
        raise ValueError(f"{a.dtype} {tuple(a.shape)} cannot be compared with {b.dtype} {tuple(b.shape)}")

    def rank(x: torch.Tensor) -> torch.Tensor:
        bits = x.contiguous().view(_INTEGER[x.element_size()]).long()
        magnitude = bits & (2 ** (8 * x.element_size() - 1) - 1)
        return torch.where(bits < 0, -magnitude, magnitude)

    distance = (rank(a) - rank(b)).abs()
    one_is_nan = a.isnan() != b.isnan()
    return torch.where(a.isnan() & b.isnan(), 0, torch.where(one_is_nan, 2**62, distance))


def rounded(value: Array, dtype: torch.dtype) -> Array:
    """The float64 value rounded once to `dtype`, ties to even, still in float64. Casting float64 to bfloat16 or float16
    through float32, as torch does, would round twice."""
    bits, smallest = _PRECISION[dtype]
    _, exponent = np.frexp(value)  # value = mantissa · 2^exponent, mantissa in [0.5, 1)
    step = np.ldexp(1.0, np.maximum(exponent - 1, smallest) - (bits - 1))
    result = np.rint(value / step) * step
    return np.where(abs(result) > torch.finfo(dtype).max, np.copysign(np.inf, value), result)


def noise(exact: Exact) -> Array:
    """How far float32 arithmetic in any order may stray: one rounding for each operation, of all that was added up, and
    what blurred coefficients add."""
    return exact.operations * FLOAT32_STEP * exact.magnitude + exact.astray


def explained(actual: torch.Tensor, exact: Exact) -> Array:
    """True where `actual` is what some order of float32 arithmetic may give: between the exact value less the noise and
    the exact value plus the noise, each rounded to actual's dtype (rounding is monotone)."""
    low, high = (rounded(exact.value + side * noise(exact), actual.dtype) for side in (-1, 1))
    seen = actual.double().numpy()
    return (low <= seen) & (seen <= high)


def explained_by_choice(actual: torch.Tensor, choice: Choice) -> tuple[Array, tuple[int, int]]:
    """(where some possible option explains `actual`; at least and at most so many elements that an option kept)."""
    fits = [where & explained(actual, exact) for where, exact in choice.options]
    nothing = np.zeros(choice.value.shape, bool)
    kept = np.logical_or.reduce([fit for fit, keeps in zip(fits, choice.kept, strict=True) if keeps] or [nothing])
    dropped = np.logical_or.reduce(
        [fit for fit, keeps in zip(fits, choice.kept, strict=True) if not keeps] or [nothing]
    )
    return kept | dropped, (int((kept & ~dropped).sum()), int(kept.sum()))


def correctly_rounded(actual: torch.Tensor, value: Array) -> Array:
    """True where no value of actual's dtype is nearer to the float64 `value`. Either neighbour of a point half-way will
    do, to one part in 2²⁰: 0.7 a + 0.3 b lies half-way whenever a and b are five units apart, and which side of it
    float64 sees is an accident of how 0.7 is written in binary."""
    error = abs(actual.double().numpy() - value)
    return error <= abs(rounded(value, actual.dtype) - value) * (1 + 2.0**-20)


@dataclass(frozen=True)
class Masks:
    """The masks that explain a merged tensor: `sure[i]` marks the elements that every explanation keeps of task
    vector i, `possible[i]` those that some explanation keeps; elements whose step is zero count as not kept."""

    sure: tuple[Array, ...]
    possible: tuple[Array, ...]
    scales: tuple[float, ...]
    unexplained: int

    def bounds(self, i: int) -> tuple[int, int]:
        """At least and at most so many elements are kept of task vector i."""
        return int(self.sure[i].sum()), int(self.possible[i].sum())


def find_masks(actual: torch.Tensor, vectors: TaskVectors, signs_exact: bool = False) -> Masks:
    """Tries, at every element, each way of keeping or dropping each task vector's step and of electing the sign
    (either one where float32 may see the sum on either side of zero), and keeps the ways that explain the value.

    Without dice: a step surely within the trim must be kept, one outside dropped; equal ones are free. With dice: every
    step is free; the L1 scale is read off the elements that only one task vector moves, then computed from the mask
    found. `signs_exact`: the weighted sums are exact in float32, so that a sum of zero is no matter of noise."""
    if not (vectors.rescale and vectors.dice):
        return _explanations(actual, vectors, _trimmed_scales(vectors), signs_exact)
    seen = _scales_seen(actual, vectors)
    if seen is None:  # a tensor of a few elements that shows nothing: every mask may be
        moved = tuple(delta != 0 for delta in vectors.deltas)
        return Masks(tuple(np.zeros_like(m) for m in moved), moved, (1.0,) * len(moved), 0)
    masks = _explanations(actual, vectors, seen, signs_exact)
    scales = tuple(
        l1_scale(delta, sure) if density < 1 and np.array_equal(sure, possible) else scale
        for delta, density, sure, possible, scale in zip(
            vectors.deltas, vectors.densities, masks.sure, masks.possible, masks.scales, strict=True
        )
    )
    return _explanations(actual, vectors, scales, signs_exact)


def decided(vectors: TaskVectors) -> tuple[Array, Exact]:
    """For a method without dice: the elements where neither equal magnitudes nor a sum near zero leave a choice, and
    the value there."""
    fates = [fate(vectors, i) for i in range(len(vectors.deltas))]
    kept = [must for must, _ in fates]
    certain = np.logical_and.reduce([must == may for must, may in fates])
    scales = _trimmed_scales(vectors)
    if vectors.consensus:
        both = _may_elect(vectors, kept, scales, 1.0, False) & _may_elect(vectors, kept, scales, -1.0, False)
        certain &= ~both | np.logical_and.reduce([~mask for mask in kept])
    return certain, vectors.combined(kept, scales)


def fate(vectors: TaskVectors, i: int) -> tuple[Array, Array]:
    """(must be kept, may be kept) for each element of task vector i, zero steps left out."""
    delta, density = vectors.deltas[i], vectors.densities[i]
    moved, nothing = delta != 0, np.zeros(delta.shape, bool)
    if density >= 1:
        return moved, moved
    if vectors.dice:
        return nothing, moved
    kept = abs(delta)[vectors.trimmed(i)]
    dropped = abs(delta)[~vectors.trimmed(i)]
    if not kept.size:
        return nothing, nothing
    slack = 4 * FLOAT32_STEP * abs(delta)  # the rounding of x - base, and its inputs are exact
    lowest, highest = kept.min(), kept.max()
    must, may = moved & (abs(delta) > lowest + slack), moved & (abs(delta) >= lowest - slack)
    if (dropped >= highest).any():
        must, may = must & (abs(delta) < highest - slack), may & (abs(delta) <= highest + slack)
    return must, may


def _trimmed_scales(vectors: TaskVectors) -> tuple[float, ...]:
    if not vectors.rescale:
        return (1.0,) * len(vectors.deltas)
    return tuple(  # whichever of equal magnitudes stays, one norm
        l1_scale(delta, vectors.trimmed(i)) if density < 1 else 1.0
        for i, (delta, density) in enumerate(zip(vectors.deltas, vectors.densities, strict=True))
    )


def _scales_seen(actual: torch.Tensor, vectors: TaskVectors) -> tuple[float, ...] | None:
    """By how much the steps of each task vector were multiplied: read off the largest step that was kept where no other
    task vector moves, because there the base's rounding weighs least. None if one of several shows no such step."""
    everything = [np.ones(vectors.base.shape, bool)] * len(vectors.deltas)
    unscaled = vectors.combined(everything).value - vectors.base
    change = actual.double().numpy() - vectors.base
    scales: list[float] = []
    for i, density in enumerate(vectors.densities):
        others = [delta for j, delta in enumerate(vectors.deltas) if j != i]
        alone = np.logical_and.reduce([vectors.deltas[i] != 0, change != 0, *(delta == 0 for delta in others)])
        if density < 1 and not alone.any() and others:
            return None
        place = np.argmax(abs(unscaled) * alone)
        scales.append(float(change.flat[place] / unscaled.flat[place]) if density < 1 and alone.any() else 1.0)
    return tuple(scales)


def _explanations(actual: torch.Tensor, vectors: TaskVectors, scales: tuple[float, ...], signs_exact: bool) -> Masks:
    shape = vectors.base.shape
    fates = [fate(vectors, i) for i in range(len(vectors.deltas))]
    found = np.zeros(shape, bool)
    sure = [np.ones(shape, bool) for _ in fates]
    possible = [np.zeros(shape, bool) for _ in fates]
    for kept, sign in product(product((False, True), repeat=len(fates)), (1.0, -1.0) if vectors.consensus else (None,)):
        wholes = [np.full(shape, keep) for keep in kept]
        fits = explained(actual, vectors.combined(wholes, scales, None if sign is None else np.full(shape, sign)))
        for keep, (must, may) in zip(kept, fates, strict=True):
            fits &= may if keep else ~must
        if sign is not None:
            fits &= _may_elect(vectors, wholes, scales, sign, signs_exact)
        found |= fits
        for i, keep in enumerate(kept):
            sure[i] &= ~fits | keep
            possible[i] |= fits & keep
    return Masks(tuple(mask & found for mask in sure), tuple(possible), scales, int((~found).sum()))


def _may_elect(
    vectors: TaskVectors, kept: Sequence[Array], scales: Sequence[float], sign: float, signs_exact: bool
) -> Array:
    terms = vectors.terms(kept, scales)
    if signs_exact:
        return elected_sign(terms) == sign
    slack = 8 * FLOAT32_STEP * sum(abs(term) for term in terms)
    return sum(terms) * sign >= -slack
