"""ties: trim by magnitude, elect a sign, merge the values that agree (Yadav et al. 2023, arXiv 2306.01708)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.passes import Consensus
from workers.methods.ranking import share_of
from workers.methods.selections import Selection
from workers.methods.task_vectors import merged, merged_pass
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
    kept = _kept(inputs, density)
    return merged(inputs, weight, kept, rescale=rescale, elect=True, normalize=normalize, lambda_=lambda_)


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
    kept = _kept(inputs, density)
    return merged_pass(inputs, weight, kept, rescale=rescale, elect=True, normalize=normalize, lambda_=lambda_)


def _kept(inputs: Inputs, density: PerModel) -> list[Selection | None]:
    return [Selection(most=share_of(inputs.tile, share)) if share < 1 else None for share in density]
