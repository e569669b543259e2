"""linear: the weighted mean of the models (model soups, Wortsman et al. 2022, arXiv 2203.05482)."""

from __future__ import annotations

import torch
from torch import Tensor

from workers.methods.tile import Inputs, PerModel


def linear(inputs: Inputs, *, weight: PerModel, normalize: bool = True) -> Tensor:
    """Σ wᵢ·xᵢ, divided by Σ wᵢ with `normalize`. A model of weight 0 is not looked at."""
    if inputs.as_mergekit:
        return _in_the_documents_dtype(inputs, weight, normalize)
    total_weight = sum(weight) if normalize else 1.0
    shares = [(index, inputs.number(value / total_weight)) for index, value in enumerate(weight) if value != 0]
    if not shares:
        return torch.zeros_like(inputs.model(0))
    return inputs.sum([inputs.model(index) * share if share != 1 else inputs.model(index) for index, share in shares])


def _in_the_documents_dtype(inputs: Inputs, weight: PerModel, normalize: bool) -> Tensor:
    weights = [inputs.number(value) for value in weight]
    total = inputs.sum([inputs.model(index) * value for index, value in enumerate(weights)])
    if normalize:
        total = total / torch.tensor(weights, dtype=inputs.dtype).sum()
    return total
