"""The common part of the task-vector methods: base + a combination of task vectors δᵢ = xᵢ − base.

The order of operations is mergekit's: trim δ, weight it, combine, divide (`normalize`), scale (`lambda`), add the base.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from workers.methods.passes import Consensus, Kept
from workers.methods.reductions import L1
from workers.methods.selections import L1Kept, Selection
from workers.methods.tile import Inputs, PerModel, divided, ones_where, positive, together

if TYPE_CHECKING:
    from torch import Tensor

_NO_MASS = 1e-7
"""Below this L1 norm a task vector is not rescaled."""

_NO_WEIGHT = 1e-8
"""Below this |Σ weights| the sum of task vectors is not divided."""


def merged(
    inputs: Inputs,
    weight: PerModel,
    selections: Sequence[Selection | None],
    *,
    rescale: bool,
    elect: bool,
    normalize: bool,
    lambda_: float,
) -> Tensor:
    """Keeps of every δ the elements that its selection keeps, all for None; then `add_consensus`, or else `add_sum`.

    `rescale` multiplies a trimmed δ by ‖δ‖₁ / ‖kept δ‖₁ over the whole tensor, so that its L1 norm is as before.
    """
    deltas = [
        inputs.delta(index) if selection is None else _trimmed(inputs, index, selection, rescale)
        for index, selection in enumerate(selections)
    ]
    add = add_consensus if elect else add_sum
    return add(inputs, deltas, weight, normalize=normalize, lambda_=lambda_)


def merged_pass(
    inputs: Inputs,
    weight: PerModel,
    selections: Sequence[Selection | None],
    *,
    rescale: bool,
    elect: bool,
    normalize: bool,
    lambda_: float,
) -> Consensus:
    """`merged` as a pass, from a simplified setting: without an election the weights hold the divisor and λ."""
    assert elect or (not normalize and lambda_ == 1), "simplified sums have nothing to divide by or to scale"
    kept = together(
        partial(_kept, inputs, model, inputs.number(value), selection, rescale)
        for model, value, selection in zip(inputs.models, weight, selections, strict=True)
    )
    return Consensus(inputs.base_model, tuple(kept), elect=elect, normalize=normalize, scale=lambda_)


def _trimmed(inputs: Inputs, index: int, selection: Selection, rescale: bool) -> Tensor:
    model, base = inputs.models[index], inputs.base_model

    def compute() -> Tensor:
        delta = inputs.delta(index)
        result = delta * selection.mask(inputs.tile, model, base).to(delta.dtype)
        if rescale and (factor := _rescaling(inputs, model, selection)) is not None:
            result = result * factor
        return result

    return inputs.tile.remember(("trimmed", model, base, selection, rescale, inputs.dtype), compute)


def _kept(inputs: Inputs, model: str, weight: float, selection: Selection | None, rescale: bool) -> Kept:
    if selection is None:
        return Kept(model, weight)
    limits = selection.among, selection.beyond
    among, beyond = together(partial(limit, inputs.tile, model, inputs.base_model) for limit in limits)
    factor = _rescaling(inputs, model, selection) if rescale else None
    return Kept(model, weight, among, beyond, selection.coin, factor)


def _rescaling(inputs: Inputs, model: str, selection: Selection) -> float | None:
    """‖δ‖₁ / ‖kept δ‖₁ as the arithmetic dtype holds it; None where one of them is nearly zero."""
    norms = L1(model, inputs.base_model, inputs.dtype), L1Kept(model, inputs.base_model, selection, inputs.dtype)
    before, after = together(partial(inputs.tile.known, norm) for norm in norms)
    if inputs.as_mergekit:  # mergekit rounds both norms before it divides
        before, after = inputs.number(before), inputs.number(after)
    return inputs.number(before / after) if before >= _NO_MASS and after >= _NO_MASS else None


def add_sum(inputs: Inputs, deltas: Sequence[Tensor], weight: PerModel, *, normalize: bool, lambda_: float) -> Tensor:
    """base + λ · Σ wᵢδᵢ, divided by Σ wᵢ with `normalize` unless that is nearly zero."""
    weights = [inputs.number(value) for value in weight]
    mixed = inputs.sum([delta * value for delta, value in zip(deltas, weights, strict=True)])
    total = inputs.number(sum(weights))
    if normalize and abs(total) >= _NO_WEIGHT:
        mixed = divided(mixed, total)
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
    mixed = inputs.sum([positive(vote) for vote in turned]).mul(elected)
    if normalize:
        divisor = inputs.sum([ones_where("gt", vote) * value for vote, value in zip(turned, weights, strict=True)])
        mixed = mixed / (divisor + ones_where("eq", divisor))
    return inputs.base + _scaled(inputs, mixed, lambda_)


def _scaled(inputs: Inputs, mixed: Tensor, lambda_: float) -> Tensor:
    return mixed if lambda_ == 1 else mixed * lambda_  # a plain number: mergekit does not round it to the dtype
