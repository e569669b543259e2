"""The common part of the methods that end in a weighted sum whose coefficients follow from products of whole tensors.

Every quantity of such a method lies in the span of the models or of their task vectors: it is a list of coefficients,
and its products are those of the Gram matrix, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from workers.methods.passes import Along, WeightedSum
from workers.methods.reductions import Gram, GramOfLines
from workers.methods.tile import Array, Inputs, Tile, torch_named

if TYPE_CHECKING:
    from torch import Tensor


def gram(inputs: Inputs, along: Along) -> NDArray[np.float64]:
    """Products of all pairs of models, or of task vectors where there is a base: models × models × lines.

    The whole tensor is one line, and so is a vector along each of its axes.
    """
    models, base = inputs.models, inputs.base_name
    lines = lines_along(inputs.tile, along)
    if lines == "tensor":
        return inputs.tile.known(Gram(models, base, "float64"))[..., np.newaxis]
    return inputs.tile.known(GramOfLines(models, base, lines))


def lines_along(tile: Tile, along: Along) -> Along:
    """ "tensor" for a tensor that is one line anyway."""
    return along if len(tile.shape) > 1 else "tensor"


def snapped(cosines: NDArray[np.float64]) -> NDArray[np.float64]:
    """Cosines between −1 and 1, exactly ±1 where they differ from it by no more than the noise of the products."""
    bounded = cosines.clip(-1, 1)
    return np.where(1 - np.abs(bounded) < _NOISE, np.sign(bounded), bounded)


_NOISE = 1e-15


def length(products: Sequence[Sequence[float]], coefficients: Sequence[float]) -> float:
    """‖Σ cᵢxᵢ‖ from the products of the x."""
    square = sum(
        a * b * product
        for a, row in zip(coefficients, products, strict=True)
        for b, product in zip(coefficients, row, strict=True)
    )
    return 0.0 if square < 0 else math.sqrt(square)


def weighted_sum(inputs: Inputs, each: WeightedSum) -> Tensor:
    """The definition of the pass, in the arithmetic dtype."""
    terms = [
        (inputs.model(index) if each.base is None else inputs.delta(index)) * spread(inputs, coefficient, each.along)
        for index, coefficient in enumerate(each.coefficients)
    ]
    return inputs.sum(terms) if each.base is None else inputs.base + inputs.sum(terms)


def spread(inputs: Inputs, numbers: float | Array, along: Along) -> Tensor:
    """A number, or the number of each element's line, in the arithmetic dtype."""
    import torch

    tile, device = inputs.tile, inputs.model(0).device
    values = torch.as_tensor(numbers, dtype=torch.float64, device=device).to(torch_named(inputs.dtype))
    if values.numel() == 1:
        return values.reshape(())
    places = torch.arange(tile.start, tile.start + tile.elements, device=device)
    return values[places // tile.row if along == "rows" else places % len(values)]
