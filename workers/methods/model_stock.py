"""model_stock: from the base towards the mean of its fine-tunes, by the angles between them (Jang et al. 2024).

Model Stock: All we need is just a few fine-tuned models, arXiv 2403.19522.
"""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from workers.methods.passes import WeightedSum
from workers.methods.tile import Inputs, divided
from workers.methods.weighted_sums import gram, lines_along, spread, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor

_NO_LENGTH = 1e-6
"""Below this product of two norms mergekit divides by it in place of the product: such a cosine is understated."""

_SINGULAR = 1e-6
"""Below this |1 + (N − 1)·cos θ| there is no optimum, and t is 0."""


def model_stock(inputs: Inputs, *, filter_wise: bool = False) -> Tensor:
    """t · the mean of the models + (1 − t) · base, t = N·cos θ / (1 + (N − 1)·cos θ).

    cos θ is the mean over all pairs of task vectors of their cosine, of whole tensors or of each row (`filter_wise`).
    """
    if not inputs.as_mergekit:
        return weighted_sum(inputs, model_stock_pass(inputs, filter_wise=filter_wise))
    total = 0 + inputs.model(0)  # as mergekit's sum begins: a −0 becomes +0
    for index in range(1, len(inputs.models)):
        total = total + inputs.model(index)
    mean = divided(total, len(inputs.models))
    ratio = spread(inputs, _ratios(inputs, filter_wise), "rows")
    return ratio * mean + (1 - ratio) * inputs.base


def model_stock_pass(inputs: Inputs, *, filter_wise: bool) -> WeightedSum:
    """The same as a pass: base + Σ t/N · δᵢ."""
    along = lines_along(inputs.tile, "rows" if filter_wise else "tensor")
    shares = _ratios(inputs, filter_wise) / len(inputs.models)
    share = shares if along == "rows" else float(shares[0])
    return WeightedSum(inputs.models, (share,) * len(inputs.models), inputs.base_model, along)


def model_stock_collapse(inputs: Inputs, *, filter_wise: bool) -> str | None:
    """That every t is nearly zero, in words."""
    nearly_all_of_base = np.abs(_ratios(inputs, filter_wise)).max() < _NEARLY_NOTHING
    return "model_stock returned the base, since task vectors are nearly orthogonal" if nearly_all_of_base else None


_NEARLY_NOTHING = 0.01


def _ratios(inputs: Inputs, filter_wise: bool) -> NDArray[np.float64]:
    """t of each line."""
    products = gram(inputs, "rows" if filter_wise else "tensor")
    count = len(inputs.models)
    norms = [np.sqrt(products[index, index]) for index in range(count)]
    with np.errstate(all="ignore"):  # parents with NaN or infinities
        cosines = [
            (products[a, b] / np.maximum(norms[a] * norms[b], _NO_LENGTH)).clip(-1, 1)
            for a, b in combinations(range(count), 2)
        ]
        cosine = sum(cosines[1:], cosines[0]) / len(cosines)
        divisor = 1 + (count - 1) * cosine
        singular = np.abs(divisor) < _SINGULAR
        return np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, divisor))
