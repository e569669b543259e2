"""AIM: any merge of task vectors, pulled back to the base in those input channels that the base uses most.

Nobari et al. 2025, *Activation-informed merging of large language models*, arXiv 2502.02421.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from workers.methods.passes import Pass, Relaxed
from workers.methods.tile import Array, Inputs, Reduction, Tile, torch_named

if TYPE_CHECKING:
    from torch import Tensor

ACTIVATIONS = Reduction()
"""The fact that is given and not computed: what `relative` makes of the statistics of a tensor."""


def relative(means: Array) -> Array:
    """mean |x| of the input channels, divided by the largest; float64, 0 for channels that no token has reached.

    `means` has the axes of its tensor, of length 1 where the mean does not depend on them: of experts in one tensor,
    each has a largest of its own.
    """
    largest = means.max(axis=_channel_axis(means.shape), keepdims=True).astype(np.float64)
    return np.divide(means, largest, out=np.zeros(means.shape), where=largest > 0)


def overshadowed(activations: Array) -> bool:
    """Whether one activation is so large that most channels keep their task vectors nearly whole.

    That is so where the median of `relative` is below 1 %, in half of the experts or more.
    """
    return bool(np.median(activations) < _SMALL < activations.max())


_SMALL = 0.01


def relaxed(inputs: Inputs, merged: Tensor, omega: float) -> Tensor:
    """b + (m − b)·(1 − a(1 − ω)), where a is the relative activation of an element's input channel.

    In float32, if the arithmetic is narrower. A tensor without statistics stays as it was merged.
    """
    import torch

    tile = inputs.tile
    if ACTIVATIONS not in tile.facts:
        return merged
    dtype = inputs.dtype if inputs.dtype == "float64" else "float32"
    width, stride, block = places(tile)
    indices = torch.arange(tile.start, tile.start + tile.elements, device=merged.device)
    factors = torch.from_numpy(_factors(tile, omega, dtype)).to(merged.device)
    base = tile.parent(inputs.base_model, dtype)
    step = merged.to(torch_named(dtype)) - base
    return base + step * factors[indices // block * width + indices // stride % width]


def relaxed_pass(inputs: Inputs, merged: Pass, omega: float) -> Pass:
    """The same as a pass."""
    if ACTIVATIONS not in inputs.tile.facts:
        return merged
    return Relaxed(merged, inputs.base_model, _factors(inputs.tile, omega, inputs.dtype), places(inputs.tile))


def places(tile: Tile) -> tuple[int, int, int]:
    """(width, stride, block): element i has the factor (i // block) · width + (i // stride) % width."""
    of_means, shape = tile.facts[ACTIVATIONS].shape, tile.shape
    axis = _channel_axis(of_means)
    own = 1 if axis and of_means[0] > 1 else 0  # experts in one tensor
    return of_means[axis], math.prod(shape[axis + 1 :]), math.prod(shape[own:])


def fits(of_means: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether statistics of that shape are those of a tensor: its input channels and, of experts, the first axis."""
    if len(of_means) != len(shape):
        return False
    axis = _channel_axis(of_means)
    experts = 0 if axis and len(shape) > 2 else None
    return all(
        mean == (length if place in (axis, experts) else 1)
        for place, (mean, length) in enumerate(zip(of_means, shape, strict=True))
    )


def _factors(tile: Tile, omega: float, dtype: str) -> Array:
    return (1 - tile.facts[ACTIVATIONS].reshape(-1) * (1 - omega)).astype(dtype)


def _channel_axis(of_means: Sequence[int]) -> int:
    """The axis of the input channels: the last that is not of length 1, else the last."""
    return max((axis for axis, length in enumerate(of_means) if length > 1), default=len(of_means) - 1)
