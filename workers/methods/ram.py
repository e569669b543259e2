"""ram and ramplus_tl: reinforced agent merging (arXiv 2601.13572), for models whose task vectors are sparse.

An element that one model alone has changed keeps its whole change; one that several have changed takes their mean.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from workers.methods.passes import Overlap
from workers.methods.reductions import Overlaps, overlap
from workers.methods.tile import Inputs

if TYPE_CHECKING:
    from torch import Tensor


def ram(inputs: Inputs, *, epsilon: float = 1e-5) -> Tensor:
    """base + the mean of those δᵢ with |δᵢ| > `epsilon`, element by element; the base where there is none."""
    return _merged(inputs, epsilon, None)


def ram_pass(inputs: Inputs, *, epsilon: float) -> Overlap:
    """The same as a pass."""
    return Overlap(inputs.base_model, inputs.models, None, inputs.number(epsilon))


def ramplus_tl(inputs: Inputs, *, r: float = 0.1, alpha: float = 0.2, epsilon: float = 1e-5) -> Tensor:
    """`ram`, but what model i alone has changed is multiplied by λᵢ = 1 + r · min(sᵢ/uᵢ, alpha).

    sᵢ and uᵢ count the elements of the tensor that model i has changed with others, and alone (at least `epsilon`).
    """
    return _merged(inputs, epsilon, _factors(inputs, r, alpha, epsilon))


def ramplus_tl_pass(inputs: Inputs, *, r: float, alpha: float, epsilon: float) -> Overlap:
    """The same as a pass."""
    factors = tuple(inputs.number(factor) for factor in _factors(inputs, r, alpha, epsilon))
    return Overlap(inputs.base_model, inputs.models, factors, inputs.number(epsilon))


def _factors(inputs: Inputs, r: float, alpha: float, epsilon: float) -> Sequence[float]:
    overlaps = Overlaps(inputs.models, inputs.base_model, inputs.number(epsilon), inputs.dtype)
    number = np.float32 if inputs.as_mergekit else float  # mergekit takes every step of a factor in float32

    def factor(shared: int, alone: int) -> float:
        divisor = max(alone, epsilon)
        ratio = shared / divisor if divisor > 0 else math.inf if shared else 0.0
        return float(1 + number(r) * min(number(ratio), number(alpha)))

    return [factor(shared, alone) for shared, alone in inputs.tile.known(overlaps)]


def _merged(inputs: Inputs, epsilon: float, factors: Sequence[float] | None) -> Tensor:
    import torch

    tile, base = inputs.tile, inputs.base_model
    active, count = overlap(tile, inputs.models, base, inputs.number(epsilon), inputs.dtype)
    changes = [inputs.delta(index) * changed for index, changed in enumerate(active)]
    if inputs.as_mergekit:
        return _in_mergekits_order(inputs, changes, count, factors)
    mean = inputs.sum(changes) / count.clamp(min=1)
    if factors is None:
        return inputs.base + mean
    scaled = inputs.sum([change * inputs.number(factor) for change, factor in zip(changes, factors, strict=True)])
    return inputs.base + torch.where(count == 1, scaled, mean)


def _in_mergekits_order(
    inputs: Inputs, changes: Sequence[Tensor], count: Tensor, factors: Sequence[float] | None
) -> Tensor:
    """Every change is divided before they are added; factors are float32 whatever the dtype, and so is what follows."""
    import torch

    alone, shared = count == 1, count > 1
    stacked = torch.stack(list(changes))
    whole = stacked * alone
    if factors is not None:
        whole = whole * torch.tensor(factors, dtype=torch.float32, device=whole.device).unsqueeze(-1)
    return inputs.base + (whole + stacked * shared / count.to(torch.int64).clamp(min=1)).sum(dim=0)
