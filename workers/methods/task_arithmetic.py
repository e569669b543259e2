"""task_arithmetic: base + λ · Σ wᵢδᵢ (Ilharco et al. 2022, arXiv 2212.04089)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.passes import WeightedSum
from workers.methods.task_vectors import add_sum
from workers.methods.tile import Inputs, PerModel

if TYPE_CHECKING:
    from torch import Tensor


def task_arithmetic(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel = (1.0,),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Weighted sum of task vectors. `density`, `rescale` and `int8_mask` are accepted, as mergekit does, and unused."""
    deltas = [inputs.delta(index) for index in range(len(inputs.models))]
    return add_sum(inputs, deltas, weight, normalize=normalize, lambda_=lambda_)


def task_arithmetic_pass(inputs: Inputs, *, weight: PerModel, normalize: bool, lambda_: float) -> WeightedSum:
    """The same as a pass, from a simplified setting: the weights hold the divisor and λ."""
    assert not normalize and lambda_ == 1, "simplified settings have nothing to divide by or to scale"
    return WeightedSum(inputs.models, tuple(inputs.number(value) for value in weight), inputs.base_name)
