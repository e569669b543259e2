"""multislerp: interpolation of several models, or task vectors, by their weighted directions and lengths.

mergekit's method of this name, https://goddard.blog/posts/multislerp-wow-what-a-cool-idea.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from jobs.errors import BadInput
from workers.methods.passes import WeightedSum
from workers.methods.tile import Inputs, PerModel
from workers.methods.weighted_sums import gram, length, weighted_sum

if TYPE_CHECKING:
    from torch import Tensor


def multislerp(inputs: Inputs, *, weight: PerModel, normalize_weights: bool = True, eps: float = 1e-8) -> Tensor:
    """The direction of Σ wᵢxᵢ/‖xᵢ‖ at the length Σ wᵢ‖xᵢ‖, of δ in place of x with a base; base + that.

    mergekit goes from that direction m along the sphere by Σ wᵢ(uᵢ − ⟨uᵢ, m⟩m), which is zero: m is the direction of
    Σ wᵢuᵢ. What is left of the step is a factor of cos `eps`. Two models whose directions cancel are summed as they
    are; more are an error (`BadInput`).
    """
    if len(inputs.models) == 1:
        return inputs.model(0)
    if normalize_weights:
        total = sum(weight)
        weight = tuple(value / total if total else math.nan for value in weight)
    return weighted_sum(inputs, multislerp_pass(inputs, weight=weight, normalize_weights=False, eps=eps))


def multislerp_pass(inputs: Inputs, *, weight: PerModel, normalize_weights: bool, eps: float) -> WeightedSum:
    """The same as a pass, from a simplified setting: the weights are divided by their sum."""
    assert not normalize_weights, "simplified settings have nothing to divide by"
    products = gram(inputs, "tensor")[..., 0].tolist()
    norms = [math.sqrt(row[index]) for index, row in enumerate(products)]
    directions = [value / (norm + eps) if norm else 0.0 for value, norm in zip(weight, norms, strict=True)]
    mean = length(products, directions)
    if not (mean < eps or mean == 0):
        scale = math.cos(eps) * sum(value * norm for value, norm in zip(weight, norms, strict=True)) / mean
        weight = tuple(scale * value for value in directions)
    elif len(weight) > 2 and any(norms):
        raise BadInput(
            f"tensor {inputs.tile.tensor}: the weighted directions of {', '.join(inputs.models)} cancel, and multislerp"
            " has no mean of them; give other weights"
        )
    return WeightedSum(inputs.models, tuple(inputs.number(value) for value in weight), inputs.base_name)
