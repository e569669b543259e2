"""dare_linear and dare_ties: drop task-vector elements at random, rescale the rest (Yu et al. 2023, arXiv 2311.03099).

`rescale` restores the L1 norm of each tensor's task vector, as mergekit does; the paper divides by the density, which
has the same expectation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.task_vectors import add_consensus, add_sum, trimmed
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
