"""breadcrumbs and breadcrumbs_ties: drop the smallest and the very largest of every task vector.

Davari and Belilovsky 2023, *Model breadcrumbs*, arXiv 2312.06795; the second elects a sign as ties does.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from workers.methods.passes import Consensus
from workers.methods.selections import Selection
from workers.methods.task_vectors import merged, merged_pass
from workers.methods.tile import Inputs, PerModel

if TYPE_CHECKING:
    from torch import Tensor


def breadcrumbs(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel = (1.0,),
    gamma: PerModel = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Of n elements drops the ⌊gamma·n⌋ with the largest |δ|, and keeps the next ⌊density·n⌋; a density of 1 keeps all.

    Where fewer than ⌊density·n⌋ would be left, fewer of the largest are dropped. Of equal magnitudes the first in the
    tensor count as the larger.
    """
    kept = _kept(inputs, density, gamma)
    return merged(inputs, weight, kept, rescale=rescale, elect=False, normalize=normalize, lambda_=lambda_)


def breadcrumbs_pass(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel,
    gamma: PerModel,
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Consensus:
    """`breadcrumbs` as a pass."""
    kept = _kept(inputs, density, gamma)
    return merged_pass(inputs, weight, kept, rescale=rescale, elect=False, normalize=normalize, lambda_=lambda_)


def breadcrumbs_ties(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel = (1.0,),
    gamma: PerModel = (0.01,),
    normalize: bool = False,
    rescale: bool = False,
    int8_mask: bool = False,
    lambda_: float = 1.0,
) -> Tensor:
    """Task vectors trimmed as by `breadcrumbs`, combined by TIES's elected sign."""
    kept = _kept(inputs, density, gamma)
    return merged(inputs, weight, kept, rescale=rescale, elect=True, normalize=normalize, lambda_=lambda_)


def breadcrumbs_ties_pass(
    inputs: Inputs,
    *,
    weight: PerModel,
    density: PerModel,
    gamma: PerModel,
    normalize: bool,
    rescale: bool,
    lambda_: float,
) -> Consensus:
    """`breadcrumbs_ties` as a pass."""
    kept = _kept(inputs, density, gamma)
    return merged_pass(inputs, weight, kept, rescale=rescale, elect=True, normalize=normalize, lambda_=lambda_)


def _kept(inputs: Inputs, density: PerModel, gamma: PerModel) -> list[Selection | None]:
    elements = math.prod(inputs.tile.shape)

    def selection(density: float, gamma: float) -> Selection:
        target = int(density * elements)
        dropped = min(int(gamma * elements), elements - target)
        return Selection(most=target + dropped, but=dropped)

    return [selection(share, top) if share < 1 else None for share, top in zip(density, gamma, strict=True)]
