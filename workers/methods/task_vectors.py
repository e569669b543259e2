"""The common part of the task-vector methods: base + a combination of task vectors δᵢ = xᵢ − base.

The order of operations is mergekit's: trim δ, weight it, combine, divide (`normalize`), scale (`lambda`), add the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from workers.methods.passes import Coin, Kept
from workers.methods.reductions import L1, L1Kept, drawn, largest, threshold_of
from workers.methods.tile import Inputs, PerModel, ones_where

if TYPE_CHECKING:
    from torch import Tensor

_NO_MASS = 1e-7
"""Below this L1 norm a task vector is not rescaled."""

_NO_WEIGHT = 1e-8
"""Below this |Σ weights| the sum of task vectors is not divided."""


def trimmed(inputs: Inputs, index: int, density: float, *, rescale: bool, method: str | None = None) -> Tensor:
    """δ with all but a `density` share of its elements set to zero; keeps the largest, or by `method`'s coin.

    `rescale` multiplies by ‖δ‖₁ / ‖kept δ‖₁ over the whole tensor, so that its L1 norm is as before.
    """
    delta = inputs.delta(index)
    if density >= 1:
        return delta
    model, base = inputs.models[index], inputs.base_name
    assert base is not None, "planned without the base_model that task vectors require"

    def compute() -> Tensor:
        kept = (
            largest(inputs.tile, model, base, density) if method is None else drawn(inputs.tile, method, model, density)
        )
        result = delta * kept
        if rescale and (factor := _rescaling(inputs, model, density, method)) is not None:
            result = result * factor
        return result

    return inputs.tile.remember(("trimmed", method, model, base, density, rescale, inputs.dtype), compute)


def _rescaling(inputs: Inputs, model: str, density: float, method: str | None) -> float | None:
    """‖δ‖₁ / ‖kept δ‖₁ as the arithmetic dtype holds it; None where one of them is nearly zero."""
    assert inputs.base_name is not None, "planned without the base_model that task vectors require"
    before = inputs.tile.known(L1(model, inputs.base_name, inputs.dtype))
    after = inputs.tile.known(L1Kept(model, inputs.base_name, density, inputs.dtype, method))
    return inputs.number(before / after) if before >= _NO_MASS and after >= _NO_MASS else None


def kept(
    inputs: Inputs, weight: PerModel, density: PerModel, *, rescale: bool, method: str | None = None
) -> tuple[Kept, ...]:
    """The task vectors as `trimmed` trims them, for a pass."""
    assert inputs.base_name is not None, "planned without the base_model that task vectors require"
    found: list[Kept] = []
    for model, value, share in zip(inputs.models, weight, density, strict=True):
        among = coin = factor = None
        if share < 1:
            if method is None:
                among = threshold_of(inputs.tile, model, inputs.base_name, share)
            else:
                coin = Coin(method, share)
            factor = _rescaling(inputs, model, share, method) if rescale else None
        found.append(Kept(model, inputs.number(value), among=among, coin=coin, factor=factor))
    return tuple(found)


def add_sum(inputs: Inputs, deltas: Sequence[Tensor], weight: PerModel, *, normalize: bool, lambda_: float) -> Tensor:
    """base + λ · Σ wᵢδᵢ, divided by Σ wᵢ with `normalize` unless that is nearly zero."""
    weights = [inputs.number(value) for value in weight]
    mixed = inputs.sum([delta * value for delta, value in zip(deltas, weights, strict=True)])
    total = inputs.number(sum(weights))
    if normalize and abs(total) >= _NO_WEIGHT:
        mixed = mixed / total
    return inputs.base + _scaled(inputs, mixed, lambda_)


def add_consensus(
    inputs: Inputs, deltas: Sequence[Tensor], weight: PerModel, *, normalize: bool, lambda_: float
) -> Tensor:
    """base + λ · the sum of those wᵢδᵢ whose sign is the elected one, divided by the sum of their weights.

    TIES (Yadav et al. 2023, arXiv 2306.01708): the sign of Σ wᵢδᵢ is elected element by element, zero counts as
    positive, and a zero δᵢ agrees with no sign.
    """
    weights = [inputs.number(value) for value in weight]
    votes = [delta * value for delta, value in zip(deltas, weights, strict=True)]
    elected = ones_where("ge", inputs.sum(votes)).mul_(2).sub_(1)  # +1 or −1: the products below are sign flips, exact
    turned = [vote.mul_(elected) for vote in votes]
    mixed = inputs.sum([vote.relu() for vote in turned]).mul(elected)
    if normalize:
        divisor = inputs.sum([ones_where("gt", vote) * value for vote, value in zip(turned, weights, strict=True)])
        mixed = mixed / (divisor + ones_where("eq", divisor))
    return inputs.base + _scaled(inputs, mixed, lambda_)


def _scaled(inputs: Inputs, mixed: Tensor, lambda_: float) -> Tensor:
    return mixed if lambda_ == 1 else mixed * lambda_  # a plain number: mergekit does not round it to the dtype
