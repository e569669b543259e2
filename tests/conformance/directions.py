"""nuslerp, multislerp, karcher and model_stock in float64: weighted sums whose coefficients come from norms and angles.

Sources: slerp, Shoemake 1985; the Karcher mean, Karcher 1977 (arXiv 2603.04972 for models); Model Stock (arXiv
2403.19522); multislerp, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea. Clamps and edges are those of
mergekit 0.1.5's behaviour.

A cosine in float32 is up to `_blur` from the true one. `_swing` moves a coefficient's cosine by that much to either
side: near opposite directions, where the angle is ill-conditioned, the bound becomes wide by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations

import numpy as np

from tests.conformance.exact import FLOAT32_STEP, Array, Exact


def _sums(elements: int) -> float:
    """Roundings of a norm or a product over so many elements: eight running sums in float32 err like random walks."""
    return 32 + (elements / 8) ** 0.5


def _blur(elements: int) -> float:
    return _sums(elements) * FLOAT32_STEP


def nuslerp(
    one: Array, other: Array, weights: tuple[float, float], base: Array | None, row_wise: bool, flatten: bool
) -> Exact:
    """Along the arc from `one` (t = 0) to `other` (t = 1), t = w₂ / (w₁ + w₂), as whole tensors or vector by vector."""
    total = sum(weights)
    t = 0.5 if abs(total) < 1e-6 else weights[1] / total
    origin = np.zeros(one.shape) if base is None else base
    axis = 0 if row_wise else -1

    def vectors(tensor: Array) -> Array:
        return tensor.reshape(1, -1) if flatten else np.swapaxes(tensor, axis, -1)

    a, b = vectors(one - origin), vectors(other - origin)
    units = [x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-7) for x in (a, b)]
    cosine = np.clip((units[0] * units[1]).sum(axis=-1, keepdims=True), -1, 1)
    (from_a, a_astray), (from_b, b_astray) = (_swing(_arc(share), cosine, _blur(a.shape[-1])) for share in (1 - t, t))
    blurred = [from_a * a + from_b * b, abs(from_a * a) + abs(from_b * b), a_astray * abs(a) + b_astray * abs(b)]
    value, magnitude, astray = (part.reshape(one.shape) if flatten else np.swapaxes(part, axis, -1) for part in blurred)
    return Exact(origin + value, abs(origin) + magnitude, 32, astray)


def _arc(share: float) -> Callable[[Array], Array]:
    """The coefficient of one end of an arc, by the cosine of the arc's angle; on a line it is the share itself."""

    def coefficient(cosine: Array) -> Array:
        line = 1 - cosine**2 <= 1e-14  # float32 and mergekit see a line there; 1e-16 is less than float64's own noise
        angle = np.arccos(np.where(line, 0, cosine))
        return np.where(line, share, np.sin(share * angle) / np.sin(angle))

    return coefficient


def _swing(coefficient: Callable[[Array], Array], cosine: Array, blur: float) -> tuple[Array, Array]:
    """The coefficient, and how far it moves when float32 blurs the cosine."""
    seen = [coefficient(np.clip(cosine + side * blur, -1, 1)) for side in (-1, 0, 1)]
    return seen[1], np.maximum(abs(seen[0] - seen[1]), abs(seen[2] - seen[1]))


def multislerp(
    tensors: Sequence[Array], weights: Sequence[float], base: Array | None, normalize: bool, eps: float
) -> Exact:
    """The weighted mean of the directions times the weighted mean of the lengths.

    The method then moves along the mean tangent, which is zero: Σ wᵢ(uᵢ − ⟨uᵢ, m⟩m) = M − ‖M‖m for the mean direction
    m = M/‖M‖. So only cos(eps) is left of this step."""
    if len(tensors) == 1:
        return Exact(tensors[0], abs(tensors[0]), 1)
    origin = np.zeros(tensors[0].shape) if base is None else base
    total = sum(weights)
    shares = [weight / total for weight in weights] if normalize else list(weights)
    amplified = sum(map(abs, weights)) / abs(total) if normalize else 1.0
    vectors = [tensor - origin for tensor in tensors]
    norms = [float(np.linalg.norm(vector)) for vector in vectors]
    units = [vector / (norm + eps) for vector, norm in zip(vectors, norms, strict=True)]
    mean = sum(share * unit for share, unit in zip(shares, units, strict=True))
    length = float(np.linalg.norm(mean))
    if length < eps and len(tensors) == 2:
        terms = [share * vector for share, vector in zip(shares, vectors, strict=True)]
        return Exact(origin + sum(terms), abs(origin) + amplified * sum(map(abs, terms)), 16)
    scale = sum(share * norm for share, norm in zip(shares, norms, strict=True))
    reach = sum(abs(share) * norm for share, norm in zip(shares, norms, strict=True))
    weight = sum(map(abs, shares))
    direction = mean / length
    parts = sum(abs(share) * (abs(unit) + abs(direction)) for share, unit in zip(shares, units, strict=True))
    magnitude = abs(origin) + amplified * reach * parts * (1 + weight / length)
    return Exact(origin + np.cos(eps) * scale * direction, magnitude, 16 + _sums(direction.size))


def karcher(tensors: Sequence[Array], max_iter: int, tol: float) -> Exact:
    """The mean of the directions on the sphere, found step by step, times the mean length."""
    if len(tensors) == 1:
        return Exact(tensors[0], abs(tensors[0]), 1)
    norms = [float(np.linalg.norm(tensor)) for tensor in tensors]
    scale = sum(norms) / len(norms)
    units = [tensor / norm for tensor, norm in zip(tensors, norms, strict=True) if norm > tol]
    if not units:
        return Exact(np.zeros(tensors[0].shape), np.zeros(tensors[0].shape), 1)
    mean = sum(units) / len(units)
    length = float(np.linalg.norm(mean))
    mean = units[0] if length < tol else mean / length
    magnitude = (abs(mean) + sum(map(abs, units)) / len(units)) / max(length, tol)
    astray, blur = np.zeros(mean.shape), _blur(mean.size)
    steps = 0
    for _ in range(max_iter):
        tangent = np.zeros(mean.shape)
        for unit in units:
            cosine = float(np.clip((mean * unit).sum(), -1, 1))
            angle = np.arccos(cosine)
            if 1 - cosine < blur:  # float32 may see no angle at all: then the other models pull the mean to their own
                astray += abs(unit - cosine * mean) / max(len(units) - 1, 1)
            if angle >= tol:
                sine = np.sin(angle)
                swing = blur * (1 + angle / sine) / max(sine, 1e-9) ** 2 if cosine < 0 else 2 * blur
                astray += swing * abs(unit - cosine * mean) / len(units)
                tangent += (angle / sine) * (unit - cosine * mean) / len(units)
        length = float(np.linalg.norm(tangent))
        if abs(length - tol) < blur:  # float32 may stop a step earlier or later
            astray += abs(tangent)
        if length < tol:
            break
        steps += 1
        mean = np.cos(length) * mean + np.sin(length) * tangent / length
        mean = mean / np.linalg.norm(mean)
    return Exact(scale * mean, scale * magnitude, _sums(mean.size) * (1 + steps), scale * astray)


def model_stock(base: Array, others: Sequence[Array], filter_wise: bool) -> Exact:
    """t · the mean of the models + (1 − t) · the base, t = N·c / (1 + (N − 1)·c) of the mean cosine c of all pairs."""
    rows = [x.reshape(-1, x.shape[-1]) if filter_wise else x.reshape(1, -1) for x in (base, *others)]
    offsets = [row - rows[0] for row in rows[1:]]
    cosines = [
        np.clip((a * b).sum(axis=-1) / np.maximum(np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1), 1e-6), -1, 1)
        for a, b in combinations(offsets, 2)
    ]
    count = len(others)

    def share(cosine: Array) -> Array:
        divisor = 1 + (count - 1) * cosine
        singular = abs(divisor) < 1e-6
        return np.where(singular, 0, count * cosine / np.where(singular, 1, divisor))

    t, astray = _swing(share, np.mean(cosines, axis=0)[:, None], _blur(rows[0].shape[-1]))
    mean = sum(rows[1:]) / count
    value, magnitude = t * mean + (1 - t) * rows[0], abs(t * mean) + abs((1 - t) * rows[0])
    astray = astray * abs(mean - rows[0])
    return Exact(value.reshape(base.shape), magnitude.reshape(base.shape), 16 + count, astray.reshape(base.shape))
