"""karcher: the Karcher mean of the models' directions on the sphere, at the mean of their lengths.

Karcher 1977, *Riemannian center of mass and mollifier smoothing*; for merging, arXiv 2603.04972.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from operator import mul
from typing import TYPE_CHECKING

import numpy as np

from workers.methods.passes import WeightedSum
from workers.methods.tile import Inputs
from workers.methods.weighted_sums import gram, length, snapped, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def karcher(inputs: Inputs, *, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """The point on the sphere with the least sum of squared angles to all models, times the mean of their norms.

    At most `max_iter` steps from the mean direction, until one is shorter than `tol`. A model whose norm is not above
    `tol` has no direction, but counts among the lengths.
    """
    if len(inputs.models) == 1:
        return inputs.model(0)
    return weighted_sum(inputs, karcher_pass(inputs, max_iter=max_iter, tol=tol))


def karcher_pass(inputs: Inputs, *, max_iter: int, tol: float) -> WeightedSum:
    """The same as a pass."""
    products = gram(inputs, "tensor")[..., 0]
    norms = np.sqrt(products.diagonal()).tolist()
    directed = [index for index, norm in enumerate(norms) if norm > max(tol, 0)]
    shares = [0.0] * len(norms)
    if directed:
        among = products[np.ix_(directed, directed)]
        with np.errstate(all="ignore"):  # parents with infinities
            cosines = snapped(among / np.sqrt(np.outer(among.diagonal(), among.diagonal()))).tolist()
        scale = sum(norms) / len(norms)
        for index, share in zip(directed, _mean(cosines, int(max_iter), tol), strict=True):
            shares[index] = scale * share / norms[index]
    return WeightedSum(inputs.models, tuple(inputs.number(share) for share in shares))


def _mean(cosines: Sequence[Sequence[float]], max_iter: int, tol: float) -> list[float]:
    """Coefficients of the mean of unit vectors, from the cosines between them."""
    count = len(cosines)
    mean = [1 / count] * count
    norm = length(cosines, mean)
    mean = [1.0] + [0.0] * (count - 1) if norm < tol or norm == 0 else [value / norm for value in mean]
    for _ in range(max_iter):
        tangent = [0.0] * count
        for index, row in enumerate(cosines):
            cosine = float(snapped(np.array(sum(map(mul, row, mean)))))
            angle = math.acos(cosine)
            if angle < tol or cosine == -1:  # to the opposite point no way is the shortest
                continue
            factor = angle / math.sin(angle) / count if angle else 1 / count
            tangent = [value - factor * cosine * of_mean for value, of_mean in zip(tangent, mean, strict=True)]
            tangent[index] += factor
        step = length(cosines, tangent)
        if step < tol or not step < math.inf:
            break
        turn = math.sin(step) / step if step else 1.0
        mean = [math.cos(step) * value + turn * along for value, along in zip(mean, tangent, strict=True)]
        norm = length(cosines, mean)
        if norm > tol:
            mean = [value / norm for value in mean]
    return mean
