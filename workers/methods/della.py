"""della and della_linear: drop task-vector elements at random, the small ones of a row more often.

Deep, Bhardwaj and Poria 2024, *DELLA-Merging*, arXiv 2406.11617. `rescale` restores the L1 norm of each tensor's task
vector, as mergekit does; the paper divides each element by its probability.
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


def della(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel = (1.0,),
    epsilon: PerModel = (0.15,),
    normalize: bool = True,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Task vectors thinned as by `della_linear`, combined by TIES's elected sign."""
    kept = _kept("della", density, epsilon)
    return merged(inputs, weight, kept, rescale=rescale, elect=True, normalize=normalize, lambda_=lambda_)


def della_pass(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel,
    epsilon: PerModel,
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Consensus:
    """`della` as a pass."""
    kept = _kept("della", density, epsilon)
    return merged_pass(inputs, weight, kept, rescale=rescale, elect=True, normalize=normalize, lambda_=lambda_)


def della_linear(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel = (1.0,),
    epsilon: PerModel = (0.15,),
    normalize: bool = False,
    rescale: bool = True,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Keeps an element with a probability that grows with its |δ| in its row, from density − epsilon to + epsilon.

    The probability grows by equal steps, one for each rank; a density of 1 keeps all. A vector is one row.
    """
    kept = _kept("della_linear", density, epsilon)
    return merged(inputs, weight, kept, rescale=rescale, elect=False, normalize=normalize, lambda_=lambda_)


def della_linear_pass(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel,
    epsilon: PerModel,
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Consensus:
    """`della_linear` as a pass."""
    kept = _kept("della_linear", density, epsilon)
    return merged_pass(inputs, weight, kept, rescale=rescale, elect=False, normalize=normalize, lambda_=lambda_)


def _kept(method: str, density: PerModel, epsilon: PerModel) -> list[Selection | None]:
    return [
        Selection(coin=Coin(method, share, spread)) if share < 1 else None
        for share, spread in zip(density, epsilon, strict=True)
    ]
