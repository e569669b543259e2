"""Merges of task vectors in bfloat16, step by step in mergekit's order, for a given mask: what its bits must be.

mergekit leaves the mask to an unstable sort or to one generator of random numbers. Both merges are explained here by
masks that the method allows, each element bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
import torch

from tests.conformance.exact import Array
from tests.conformance.measures import fate
from tests.conformance.reference import TaskVectors

SCALED = 1000  # the fewest elements that show the scale of a random mask in bfloat16


@dataclass(frozen=True)
class Replay:
    """Which masks explain a tensor: where any does, where one alone is allowed, and what it keeps of each vector."""

    fits: Array
    certain: Array
    sure: tuple[Array, ...]
    possible: tuple[Array, ...]


def narrowed(vectors: TaskVectors) -> TaskVectors:
    """The same task vectors as bfloat16 holds them."""
    return replace(vectors, deltas=tuple(_bf16(delta).double().numpy() for delta in vectors.deltas))


def replayed(actual: torch.Tensor, vectors: TaskVectors) -> Replay:
    """The masks that explain a merge in bfloat16. `vectors` are those of `narrowed`.

    The scale of a random mask is looked for among the bfloat16 numbers near that of the largest step that was kept."""
    if not (vectors.dice and vectors.rescale and vectors.densities[0] < 1):
        return _replayed(actual, vectors, [_scale(vectors, i) for i in range(len(vectors.deltas))])
    assert len(vectors.deltas) == 1, "of two rescaled task vectors, bfloat16 does not show the scales"
    step = vectors.combined([np.ones(vectors.base.shape, bool)]).value - vectors.base
    change = actual.double().numpy() - vectors.base
    place = np.argmax(abs(step) * (change != 0))
    scale, size = change.flat[place] / step.flat[place], abs(vectors.base.flat[place]) + abs(change.flat[place])
    slack = 0.04 * scale + size / abs(step.flat[place]) / 256
    near = torch.linspace(scale - slack, scale + slack, 500, dtype=torch.float64)
    found = (_replayed(actual, vectors, [float(scale)]) for scale in near.bfloat16().unique())
    return max(found, key=lambda replay: int(replay.fits.sum()))


def _scale(vectors: TaskVectors, i: int) -> float:
    if not vectors.rescale or vectors.dice or vectors.densities[i] >= 1:
        return 1.0
    delta, kept = _bf16(vectors.deltas[i]), torch.from_numpy(vectors.trimmed(i))
    before, after = delta.abs().sum(), (delta * kept).abs().sum()
    return float(before / after) if min(before, after) >= 1e-7 else 1.0


def _replayed(actual: torch.Tensor, vectors: TaskVectors, scales: Sequence[float]) -> Replay:
    shape = vectors.base.shape
    fates = [fate(vectors, i) for i in range(len(vectors.deltas))]
    fits, sure = np.zeros(shape, bool), [np.ones(shape, bool) for _ in fates]
    possible, allowed = [np.zeros(shape, bool) for _ in fates], np.zeros(shape, int)
    for choice in product((False, True), repeat=len(fates)):
        legal = np.logical_and.reduce([may if keep else ~must for keep, (must, may) in zip(choice, fates, strict=True)])
        same = legal & torch.eq(_merged(vectors, choice, scales), actual).numpy()
        fits, allowed = fits | same, allowed + legal
        for i, keep in enumerate(choice):
            sure[i] &= ~same | keep
            possible[i] |= same & keep
    return Replay(fits, allowed == 1, tuple(mask & fits for mask in sure), tuple(possible))


def _merged(vectors: TaskVectors, kept: Sequence[bool], scales: Sequence[float]) -> torch.Tensor:
    """mergekit's order: scale, weigh, elect, add, divide, strengthen, and each step rounded to bfloat16."""
    base = _bf16(vectors.base)
    thinned = [_bf16(delta) * keep for delta, keep in zip(vectors.deltas, kept, strict=True)]
    scaled = [delta if scale == 1 else delta * scale for delta, scale in zip(thinned, scales, strict=True)]
    weights = torch.tensor(vectors.weights, dtype=torch.bfloat16)
    terms = torch.stack([delta * weight for delta, weight in zip(scaled, weights, strict=True)])
    agree = torch.ones_like(terms)
    if vectors.consensus:
        elected = torch.where(terms.sum(dim=0) >= 0, 1, -1)
        agree = (terms.sign() == elected).bfloat16()
    total = (terms * agree).sum(dim=0)
    if vectors.normalize:
        shares = weights.reshape(-1, *(1 for _ in base.shape))
        divisor = (shares * agree).sum(dim=0) if vectors.consensus else weights.sum().expand_as(base).clone()
        divisor[divisor == 0 if vectors.consensus else divisor.abs() < 1e-8] = 1
        total = total / divisor
    return base + (total if vectors.strength == 1 else total * vectors.strength)


def _bf16(values: Array) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16()
