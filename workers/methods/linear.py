"""linear: the weighted mean of the models (model soups, Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.passes import WeightedSum
from workers.methods.tile import Inputs, PerModel, torch_named

if TYPE_CHECKING:
    from torch import Tensor


def linear(inputs: Inputs, *, weight: PerModel, normalize: bool = True) -> Tensor:
    """Σ wᵢ·xᵢ, divided by Σ wᵢ with `normalize`. A model of weight 0 is not looked at."""

    if inputs.as_mergekit:
        return _in_mergekits_order(inputs, weight, normalize)
    total_weight = sum(weight) if normalize else 1.0
    shares = [(index, inputs.number(value / total_weight)) for index, value in enumerate(weight) if value != 0]
    if not shares:
        return inputs.model(0).new_zeros(inputs.tile.elements)
    return inputs.sum([inputs.model(index) * share if share != 1 else inputs.model(index) for index, share in shares])


def _in_mergekits_order(inputs: Inputs, weight: PerModel, normalize: bool) -> Tensor:
    """mergekit 0.1.5 adds up in float32 whatever the document's dtype, divides last, and rounds once."""
    import torch

    total = torch.zeros_like(inputs.model(0), dtype=torch.float32)
    weights = torch.tensor(weight, dtype=torch.float32, device=total.device)
    for index, value in enumerate(weights):
        if total.device.type == "cpu":
            total.addcmul_(inputs.model(index).float(), value)
        else:  # a CPU does not round the product, and CUDA does; the second rounding differs in some 1 of 10⁹ numbers
            total = torch.addcmul(total.double(), inputs.model(index).double(), value.double()).float()
    if normalize:
        total.div_(weights.sum())
    return total.to(torch_named(inputs.dtype))


def linear_pass(inputs: Inputs, *, weight: PerModel, normalize: bool) -> WeightedSum:
    """The same as a pass, from a simplified setting: no weight is zero, and the weights are divided by their sum."""
    assert not normalize, "simplified settings have nothing to divide by"
    return WeightedSum(inputs.models, tuple(inputs.number(value) for value in weight))
