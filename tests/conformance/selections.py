"""nearswap, arcee_fusion, sce, ram and ramplus_tl in float64: element by element, by what each task vector is there.

Sources: nearswap, https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001; SCE (arXiv 2408.07990); RAM (arXiv
2601.13572); arcee_fusion has no paper. Clamps and edges are those of mergekit 0.1.5's behaviour.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import torch

from tests.conformance.exact import FLOAT32_STEP, Array, Choice, Exact


def nearswap(base: Array, other: Array, t: float) -> Exact:
    """The base moved towards the other by t at the most, element by element."""
    share = np.clip(t / np.maximum(abs(base - other), 1e-6), 0, 1)
    return Exact(share * other + (1 - share) * base, abs(share * other) + abs(base) + abs(share * base), 16)


def arcee_fusion(base: Array, other: Array) -> Choice:
    """The other where |δ| times its row's Kullback-Leibler divergence reaches the median plus 1.5 interquartile ranges.

    float32 adds up a divergence from logarithms of quotients near 1, so that it errs by some 2⁻²⁰ whatever its size:
    of siblings it is noise. Where that leaves an element's importance on either side of the cutoff, both are right."""
    delta = other - base
    p, q = _softmax(other) + 1e-8, _softmax(base) + 1e-8
    divergence = (p * np.log(p / q)).sum(axis=-1, keepdims=True)
    noise = 16 * FLOAT32_STEP * (1 + divergence)
    importance, low, high = (
        size * (divergence + side * noise)
        for side, size in ((0, abs(delta)), (-1, _blurred(base, other, -1)), (1, _blurred(base, other, 1)))
    )
    kept = importance >= _cutoff(importance, importance, importance)
    must, may = low >= _cutoff(high, high, low), high >= _cutoff(low, low, high)
    options = ((~must, Exact(base, abs(base), 2)), (may, Exact(other, abs(base) + abs(other), 4)))
    return Choice(np.where(kept, other, base), options, (False, True))


def _blurred(base: Array, other: Array, side: int) -> Array:
    """|δ|, as small or as great as float32 may see it."""
    return np.maximum(abs(other - base) + side * FLOAT32_STEP * abs(other - base), 0)


def _softmax(x: Array) -> Array:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def _cutoff(middle: Array, upper: Array, lower: Array) -> float:
    """median + 1.5 · (upper quartile − lower quartile); a quantile is the element at ⌊q · (n − 1)⌋ of the order."""

    def quantile(values: Array, q: float) -> float:
        return float(np.sort(values.ravel())[int(q * (values.size - 1))])

    return quantile(middle, 0.5) + 1.5 * (quantile(upper, 0.75) - quantile(lower, 0.25))


def sce(base: Array, others: Sequence[Array], select_topk: float) -> Choice:
    """Select the elements of the greatest variance, weight each model by the mean square of what is left, and erase the
    minority's sign."""
    deltas = [other - base for other in others]
    variance = np.var(deltas, axis=0)
    count = base.size
    must = may = np.ones(base.shape, bool)
    chosen = must
    if select_topk < 1:
        count = int(np.count_nonzero(variance) * select_topk) if select_topk > 0 else 0
        must = may = chosen = np.zeros(base.shape, bool)
        if count:
            cutoff = np.sort(variance.ravel())[-count]
            blur = 8 * FLOAT32_STEP * (variance + 2 * np.sqrt(variance) * abs(np.mean(deltas, axis=0)))
            must, may = variance > cutoff + blur, (variance >= cutoff - blur) & (variance > 0)
            order = np.argsort(-variance.ravel(), kind="stable")
            chosen = np.zeros(base.size, bool)
            chosen[order[:count]] = True
            chosen = chosen.reshape(base.shape)
    squares = [float(np.where(chosen, delta**2, 0).mean()) for delta in deltas]
    total = sum(squares)
    weights, unsure = [1 / len(deltas)] * len(deltas), [0.0] * len(deltas)
    if abs(total) >= 1e-6:  # the weights depend on which of equal variances are selected
        weights = [square / total for square in squares]
        open_ = [float(np.where(may & ~must, delta**2, 0).mean()) for delta in deltas]
        unsure = [(each + weight * sum(open_)) / total for each, weight in zip(open_, weights, strict=True)]
    votes, slack = sum(deltas), 8 * FLOAT32_STEP * sum(map(abs, deltas))
    options = [(~must, Exact(base, abs(base), 2))]
    merges = {sign: _of_sign(base, deltas, weights, unsure, sign) for sign in (1.0, -1.0)}
    options += [(may & (votes * sign >= -slack), exact) for sign, exact in merges.items()]
    value = np.where(chosen, np.where(votes >= 0, merges[1.0].value, merges[-1.0].value), base)
    tied = _tied_in_bf16(deltas, select_topk) if select_topk < 1 else None
    return Choice(value, tuple(options), (False, True, True), count if select_topk < 1 else None, tied)


def _tied_in_bf16(deltas: Sequence[Array], select_topk: float) -> Array:
    """Where the variance in bfloat16 is that of the last selected element, and not all such elements are selected."""
    narrow = torch.stack([torch.from_numpy(np.ascontiguousarray(delta)).bfloat16() for delta in deltas])
    variance = torch.var(narrow, dim=0, unbiased=False).float()
    count = int(torch.count_nonzero(variance) * select_topk)
    if not count:
        return np.zeros(deltas[0].shape, bool)
    cutoff = variance.flatten().sort(descending=True).values[count - 1]
    return ((variance == cutoff) & ((variance >= cutoff).sum() > count)).numpy()


def _of_sign(
    base: Array, deltas: Sequence[Array], weights: Sequence[float], unsure: Sequence[float], sign: float
) -> Exact:
    agree = [np.sign(delta) == sign for delta in deltas]
    parts = [np.where(a, weight * delta, 0) for a, weight, delta in zip(agree, weights, deltas, strict=True)]
    divisor = sum(np.where(a, weight, 0) for a, weight in zip(agree, weights, strict=True))
    divisor = np.maximum(divisor, 1e-6)
    moved = abs(sum(parts)) / divisor
    astray = sum(
        np.where(a, swing * (abs(delta) + moved), 0) / divisor
        for a, swing, delta in zip(agree, unsure, deltas, strict=True)
    )
    return Exact(base + sum(parts) / divisor, abs(base) + sum(map(abs, parts)) / divisor, 64, astray)


def ram(base: Array, others: Sequence[Array], epsilon: float, r: float = 0.0, alpha: float = 0.0) -> Choice:
    """base + the deltas above epsilon: those of one model alone as they are, those that models share averaged.

    ramplus_tl multiplies what is a model's own by 1 + r · min(its shared elements / its own elements, alpha)."""
    deltas = [other - base for other in others]
    blur = [4 * FLOAT32_STEP * abs(delta) + FLOAT32_STEP * epsilon for delta in deltas]
    must = [abs(delta) > epsilon + slack for delta, slack in zip(deltas, blur, strict=True)]
    may = [abs(delta) > epsilon - slack for delta, slack in zip(deltas, blur, strict=True)]
    active = [abs(delta) > epsilon for delta in deltas]
    shared = sum(a.astype(int) for a in active) > 1
    open_ = int(sum((high & ~low).sum() for low, high in zip(must, may, strict=True)))
    strengths = [_strength(int((a & shared).sum()), int((a & ~shared).sum()), open_, epsilon, r, alpha) for a in active]
    options = [
        (
            np.logical_and.reduce([high if on else ~low for on, low, high in zip(choice, must, may, strict=True)]),
            _of_active(base, deltas, [np.full(base.shape, on) for on in choice], strengths),
        )
        for choice in product((False, True), repeat=len(deltas))
    ]
    value = _of_active(base, deltas, active, strengths).value
    return Choice(value, tuple(options), (True,) * len(options))


def _strength(shared: int, own: int, unsure: int, epsilon: float, r: float, alpha: float) -> tuple[float, float]:
    """λ of one model, and how far it moves when `unsure` elements change sides."""

    def of(shared: int, own: int) -> float:
        return 1 + r * float(np.clip(shared / max(own, epsilon), 0, alpha))

    exact = of(shared, own)
    ends = of(max(shared - unsure, 0), own + unsure), of(shared + unsure, max(own - unsure, 0))
    return exact, max(abs(end - exact) for end in ends) if unsure else 0.0


def _of_active(
    base: Array, deltas: Sequence[Array], active: Sequence[Array], strengths: Sequence[tuple[float, float]]
) -> Exact:
    models = sum(a.astype(int) for a in active)
    parts, astray = [], np.zeros(base.shape)
    for delta, on, (strength, swing) in zip(deltas, active, strengths, strict=True):
        parts.append(np.where(on, np.where(models == 1, strength * delta, delta / np.maximum(models, 1)), 0))
        astray = astray + np.where(on & (models == 1), swing * abs(delta), 0)
    return Exact(base + sum(parts), abs(base) + sum(map(abs, parts)), 16, astray)
