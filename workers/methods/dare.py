"""dare_linear and dare_ties: drop task-vector elements at random, rescale the rest (Yu et al. 2023, arXiv 2311.03099).

`rescale` restores the L1 norm of each tensor's task vector, as mergekit does; the paper divides by the density, which
has the same expectation.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.coins import Coin
from workers.methods.passes import Consensus
from workers.methods.selections import Selection
from workers.methods.task_vectors import merged, merged_pass
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
    kept = _kept("dare_linear", density)
    return merged(inputs, weight, kept, rescale=rescale, elect=False, normalize=normalize, lambda_=lambda_)


def dare_linear_pass(
    inputs: Inputs, *, weight: PerModel, density: PerModel, normalize: bool, rescale: bool, lambda_: float
) -> Consensus:
    """`dare_linear` as a pass."""
    kept = _kept("dare_linear", density)
    return merged_pass(inputs, weight, kept, rescale=rescale, elect=False, normalize=normalize, lambda_=lambda_)


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
    kept = _kept("dare_ties", density)
    return merged(inputs, weight, kept, rescale=rescale, elect=True, normalize=normalize, lambda_=lambda_)


def dare_ties_pass(
    inputs: Inputs, *, weight: PerModel, density: PerModel, normalize: bool, rescale: bool, lambda_: float
) -> Consensus:
    """`dare_ties` as a pass."""
    kept = _kept("dare_ties", density)
    return merged_pass(inputs, weight, kept, rescale=rescale, elect=True, normalize=normalize, lambda_=lambda_)


def _kept(method: str, density: PerModel) -> list[Selection | None]:
    return [Selection(coin=Coin(method, share)) if share < 1 else None for share in density]
