"""sce: select, calculate, erase (Wan et al. 2024, *FuseChat*, arXiv 2408.07990).

Selects the elements in which the task vectors differ most, calculates a weight for each model from the size of its task
vector, and erases what does not agree with the elected sign.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from workers.methods.passes import SelectedConsensus
from workers.methods.ranking import Nonzero, Sample, Variance, largest, threshold_of
from workers.methods.selections import SquaresSelected
from workers.methods.tile import Inputs, ones_where, together

if TYPE_CHECKING:
    from torch import Tensor

_NO_SIZE = 1e-6
"""Below this Σ mean(δᵢ²), the models weigh the same. It always is for models trained by reinforcement learning."""

LEAST_DIVISOR = 1e-6
"""The sum of agreeing weights is not divided by a smaller number than this."""


def sce(inputs: Inputs, *, select_topk: float = 1.0, int8_mask: bool = False) -> Tensor:
    """base + Σ wᵢδᵢ / Σ wᵢ over the models whose δᵢ has the sign of Σ δᵢ; wᵢ is mean(δᵢ²) over the tensor.

    Of the elements whose variance over the models is not zero, the ⌊`select_topk` · their number⌋ of the largest
    variance take part; of equals, the first. `int8_mask` changes no number and is accepted for old documents.
    """
    count = _count(inputs, select_topk)
    weights = _weights(inputs, count)
    deltas = [inputs.delta(index) for index in range(len(inputs.models))]
    if count is not None:
        mask = largest(inputs.tile, _variance(inputs), count).to(deltas[0].dtype)
        deltas = [delta * mask for delta in deltas]
    elected = ones_where("ge", inputs.sum(deltas)).mul_(2).sub_(1)
    agreeing = [ones_where("gt", delta * elected) * weight for delta, weight in zip(deltas, weights, strict=True)]
    mixed = inputs.sum([delta * share for delta, share in zip(deltas, agreeing, strict=True)])
    return inputs.base + mixed / inputs.sum(agreeing).clamp(min=LEAST_DIVISOR)


def sce_pass(inputs: Inputs, *, select_topk: float) -> SelectedConsensus:
    """The same as a pass."""
    count = _count(inputs, select_topk)
    weights = _weights(inputs, count)
    among = None if count is None else threshold_of(inputs.tile, _variance(inputs), count)
    return SelectedConsensus(inputs.base_model, inputs.models, tuple(weights), among)


def _variance(inputs: Inputs) -> Variance:
    return Variance(inputs.models, inputs.base_model, inputs.dtype if inputs.as_mergekit else None)


def sce_collapse(inputs: Inputs, *, select_topk: float) -> str | None:
    """That the sizes of the task vectors do not decide the weights, in words."""
    weights = _weights(inputs, _count(inputs, select_topk))
    equal = len(weights) > 1 and len(set(weights)) == 1
    return "sce gave all models the same weight, since task vectors are short" if equal else None


def _count(inputs: Inputs, select_topk: float) -> int | None:
    """How many elements take part; None: all. The sample that finds them is asked for in the same pass."""
    if select_topk >= 1:
        return None
    variance = _variance(inputs)
    nonzero, _ = together(partial(inputs.tile.known, fact) for fact in (Nonzero(variance), Sample(variance)))
    return int(nonzero * select_topk)


def _weights(inputs: Inputs, count: int | None) -> Sequence[float]:
    variance = _variance(inputs)
    facts = [SquaresSelected(model, inputs.base_model, variance, count, inputs.dtype) for model in inputs.models]
    squares: list[float] = together(partial(inputs.tile.known, fact) for fact in facts)
    held = inputs.number if inputs.as_mergekit else float
    means = [held(square / math.prod(inputs.tile.shape)) for square in squares]
    total = held(sum(means))
    if total < _NO_SIZE:
        return [inputs.number(1 / len(means))] * len(means)
    return [inputs.number(mean / total) for mean in means]
