"""consensus_ta: task arithmetic over the weights that several models use.

Wang et al. 2024, *Localizing Task Information for Improved Model Merging and Compression*, arXiv 2405.07813: consensus
task arithmetic with TALL masks. mergekit does not have it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.passes import TallConsensus
from workers.methods.tile import Inputs, PerModel

if TYPE_CHECKING:
    from torch import Tensor


def consensus_ta(
    inputs: Inputs,
    *,
    weight: PerModel = (1.0,),
    tall_lambda: PerModel = (0.4,),
    k: float = 2.0,
    lambda_: float = 1.0,
) -> Tensor:
    """base + λ · Σ wᵢδᵢ in those elements that at least `k` models use, and the base elsewhere.

    Model i uses an element where |wᵢδᵢ| > tall_lambdaᵢ · |Σ wⱼδⱼ − wᵢδᵢ|. The paper has weights of 1 and tries
    `tall_lambda` from 0.2 to 0.6.
    """
    votes = [inputs.delta(index) * inputs.number(value) for index, value in enumerate(weight)]
    total = inputs.sum(votes)
    uses = [
        vote.abs() > (total - vote).abs() * inputs.number(ratio) for vote, ratio in zip(votes, tall_lambda, strict=True)
    ]
    users = inputs.sum([each.to(total.dtype) for each in uses])
    mixed = total * (users >= k)
    return inputs.base + (mixed if lambda_ == 1 else mixed * lambda_)


def consensus_ta_pass(
    inputs: Inputs, *, weight: PerModel, tall_lambda: PerModel, k: float, lambda_: float
) -> TallConsensus:
    """The same as a pass."""
    weights, ratios = (tuple(inputs.number(each) for each in values) for values in (weight, tall_lambda))
    return TallConsensus(inputs.base_model, inputs.models, weights, ratios, k, lambda_)
