"""fisher: the mean of the models, each element weighted by the Fisher information of its model (Matena & Raffel 2022).

*Merging models with Fisher-weighted averaging*, arXiv 2111.09832. mergekit does not have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from jobs.merge_tasks import fisher_of
from workers.methods.linear import linear, linear_pass
from workers.methods.passes import FisherMean, WeightedSum
from workers.methods.tile import Inputs, PerModel, Reduction, torch_named

if TYPE_CHECKING:
    from torch import Tensor

FISHERS = Reduction()
"""The fact that is given and not computed: the mean of a tensor's Fisher information, by model."""

LEAST_FLOOR = 1e-12
"""The least `floor`: with it, no sum of weights is zero."""

_NOTHING = 1e-30
"""Means below count as zero: their inverse is not a float32."""


def fisher(inputs: Inputs, *, weight: PerModel = (1.0,), floor: float = 1e-6) -> Tensor:
    """Σ wᵢFᵢxᵢ / Σ wᵢFᵢ, element by element, where F is the diagonal of a model's Fisher information.

    An F below `floor` times the mean F of the tensor in all models counts as that much, so that an element without
    Fisher information in any model is the weighted mean. So is a tensor without it in one of them.
    """
    found = _mean(inputs, weight, floor)
    if found is None:
        return linear(inputs, weight=weight, normalize=inputs.as_mergekit)  # else the weights sum to 1
    tile, dtype = inputs.tile, _precision(inputs)
    base, *others = (tile.parent(name, dtype) for name in found.models)
    shares = [
        (tile.parent(name, dtype) * found.inverse).clamp(min=found.floor) * share
        for name, share in zip(found.fishers, found.weights, strict=True)
    ]
    if not others:
        return base.to(torch_named(inputs.dtype))
    steps = [(other - base) * share for other, share in zip(others, shares[1:], strict=True)]
    merged = base + _sum(steps) / _sum(shares)
    return merged.to(torch_named(inputs.dtype))


def fisher_pass(inputs: Inputs, *, weight: PerModel, floor: float) -> FisherMean | WeightedSum:
    """The same as a pass, from a simplified setting: no weight is zero, and their sum is 1."""
    return _mean(inputs, weight, floor) or linear_pass(inputs, weight=weight, normalize=False)


def _mean(inputs: Inputs, weight: PerModel, floor: float) -> FisherMean | None:
    """None where a model has no Fisher information of the tensor, or all of it is zero."""
    means: Mapping[str, float] = inputs.tile.facts.get(FISHERS, {})
    if not means.keys() >= {*inputs.models}:
        return None
    mean = sum(means[model] for model in inputs.models) / len(inputs.models)
    if mean < _NOTHING:
        return None

    def number(value: float) -> float:
        return value if _precision(inputs) == "float64" else float(np.float32(value))

    return FisherMean(
        models=inputs.models,
        fishers=tuple(map(fisher_of, inputs.models)),
        weights=tuple(map(number, weight)),
        inverse=number(1 / mean),
        floor=number(floor),
    )


def _precision(inputs: Inputs) -> str:
    """A document's bfloat16 or float16 has no room for the squares of gradients."""
    return inputs.dtype if inputs.dtype == "float64" else "float32"


def _sum(terms: list[Tensor]) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total
