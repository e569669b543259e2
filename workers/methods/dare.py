"""dare_linear and dare_ties: drop task-vector elements at random, rescale the rest (Yu et al. 2023, arXiv 2311.03099).

`rescale` restores the L1 norm of each tensor's task vector, as mergekit does; the paper divides by the density, which
has the same expectation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.passes import Consensus
from workers.methods.task_vectors import add_consensus, add_sum, kept, trimmed
from workers.methods.tile import Inputs, PerModel

if TYPE_CHECKING:
    from torch import Tensor


def dare_linear(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Task arithmetic over randomly thinned task vectors."""
    deltas = _thinned(inputs, "dare_linear", density, rescale)
    return add_sum(inputs, deltas, weight, normalize=normalize, lambda_=lambda_)


def dare_ties(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel = (1.0,),
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Randomly thinned task vectors, combined by TIES's elected sign."""
    deltas = _thinned(inputs, "dare_ties", density, rescale)
    return add_consensus(inputs, deltas, weight, normalize=normalize, lambda_=lambda_)


def _thinned(inputs: Inputs, method: str, density: PerModel, rescale: bool) -> list[Tensor]:
    return [trimmed(inputs, index, share, rescale=rescale, method=method) for index, share in enumerate(density)]


def dare_linear_pass(
    inputs: Inputs, *, weight: PerModel, density: PerModel, normalize: bool, rescale: bool, lambda_: float
) -> Consensus:
    """`dare_linear` as a pass."""
    return _pass(inputs, "dare_linear", weight, density, rescale, elect=False, normalize=normalize, lambda_=lambda_)


def dare_ties_pass(
    inputs: Inputs, *, weight: PerModel, density: PerModel, normalize: bool, rescale: bool, lambda_: float
) -> Consensus:
    """`dare_ties` as a pass."""
    return _pass(inputs, "dare_ties", weight, density, rescale, elect=True, normalize=normalize, lambda_=lambda_)


def _pass(
    inputs: Inputs,
    method: str,
    weight: PerModel,
    density: PerModel,
    rescale: bool,
    *,
    elect: bool,
    normalize: bool,
    lambda_: float,
) -> Consensus:
    assert inputs.base_name is not None, "planned without the base_model that this method requires"
    found = kept(inputs, weight, density, rescale=rescale, method=method)
    return Consensus(inputs.base_name, found, elect=elect, normalize=normalize, scale=lambda_)
