"""nuslerp: spherical interpolation between two models or two task vectors, with a weight for each (Shoemake 1985).

mergekit's method of this name.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from workers.methods.passes import Along, WeightedSum
from workers.methods.tile import Inputs, PerModel
from workers.methods.weighted_sums import gram, lines_along, snapped, spread, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

_NO_WEIGHT = 1e-6
"""Below this |Σ weights| the result is half way."""

_SHORTEST = 1e-7
"""A shorter vector counts as this long where its direction is taken."""

_COLLINEAR = 1e-8
"""Up to this |sin θ| the interpolation is linear. Float64 products cannot tell an |sin θ| of 4e-8 from zero."""


def nuslerp(
    inputs: Inputs, *, weight: PerModel, nuslerp_row_wise: bool = False, nuslerp_flatten: bool = True
) -> Tensor:
    """From the first model to the second along the arc, t = w₂ / (w₁ + w₂) of the way; from and to δ with a base.

    The angle is that of the flattened tensors. Without `nuslerp_flatten` each vector of the last axis has its own, or,
    with `nuslerp_row_wise`, each vector of the first axis: the opposite of what its name says, as in mergekit.
    """
    if inputs.as_mergekit:
        return _in_mergekits_order(inputs, _part(weight), _along(inputs, nuslerp_row_wise, nuslerp_flatten))
    return weighted_sum(
        inputs,
        nuslerp_pass(inputs, weight=weight, nuslerp_row_wise=nuslerp_row_wise, nuslerp_flatten=nuslerp_flatten),
    )


def nuslerp_pass(inputs: Inputs, *, weight: PerModel, nuslerp_row_wise: bool, nuslerp_flatten: bool) -> WeightedSum:
    """The same as a pass."""
    along, part = _along(inputs, nuslerp_row_wise, nuslerp_flatten), _part(weight)
    shares = np.array([_coefficients(part, cosine) for cosine in _cosines(inputs, along).tolist()]).T
    first, second = shares if along != "tensor" else (float(shares[0, 0]), float(shares[1, 0]))
    return WeightedSum(inputs.models, (first, second), inputs.base_name, along)


def _along(inputs: Inputs, row_wise: bool, flatten: bool) -> Along:
    return lines_along(inputs.tile, "tensor" if flatten else "columns" if row_wise else "rows")


def _part(weight: PerModel) -> float:
    total = weight[0] + weight[1]
    return 0.5 if abs(total) < _NO_WEIGHT else weight[1] / total


def _cosines(inputs: Inputs, along: Along) -> NDArray[np.float64]:
    """cos θ of each line."""
    products = gram(inputs, along)
    squares = [np.maximum(products[index, index], _SHORTEST**2) for index in range(2)]
    with np.errstate(all="ignore"):  # parents with NaN or infinities
        return snapped(products[0, 1] / np.sqrt(squares[0] * squares[1]))


def _coefficients(part: float, cosine: float) -> tuple[float, float]:
    """Weights of the two vectors."""
    if 1 - cosine * cosine <= _COLLINEAR**2:
        return 1 - part, part
    angle = math.acos(cosine)
    return math.sin((1 - part) * angle) / math.sin(angle), math.sin(part * angle) / math.sin(angle)


def _in_mergekits_order(inputs: Inputs, part: float, along: Along) -> Tensor:
    """Each step rounds to the document's dtype; the cosine is exact until it is rounded."""
    import torch

    cosine = spread(inputs, _cosines(inputs, along), along)
    collinear = (1 - cosine.square()) <= _COLLINEAR**2
    angle = torch.acos(torch.where(collinear, 0, cosine))
    start, end = (inputs.model(i) if inputs.base_name is None else inputs.delta(i) for i in range(2))
    arc = (torch.sin((1 - part) * angle) * start + torch.sin(part * angle) * end) / torch.sin(angle)
    mixed = torch.where(collinear, (1 - part) * start + part * end, arc)
    return mixed if inputs.base_name is None else inputs.base + mixed
