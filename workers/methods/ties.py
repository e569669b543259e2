"""ties: trim by magnitude, elect a sign, merge the values that agree (Yadav et al. 2023, arXiv 2306.01708)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.passes import Consensus
from workers.methods.task_vectors import add_consensus, kept, trimmed
from workers.methods.tile import Inputs, PerModel

if TYPE_CHECKING:
    from torch import Tensor


def ties(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel = (1.0,),
    normalize: bool = True,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Keeps the ⌊density · elements⌋ largest |δ| of each tensor, at least one; of equal ones those that come first.

    `int8_mask` changes no number and is accepted for old documents.
    """
    deltas = [trimmed(inputs, index, share, rescale=rescale) for index, share in enumerate(density)]
    return add_consensus(inputs, deltas, weight, normalize=normalize, lambda_=lambda_)


def ties_pass(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel,
    normalize: bool,
    rescale: bool = False,
    lambda_: float,
) -> Consensus:
    """The same as a pass."""
    assert inputs.base_name is not None, "planned without the base_model that this method requires"
    found = kept(inputs, weight, density, rescale=rescale)
    return Consensus(inputs.base_name, found, elect=True, normalize=normalize, scale=lambda_)
