"""passthrough: one model, as it is or scaled."""

from __future__ import annotations

from torch import Tensor

from workers.methods.tile import Inputs, PerModel


def passthrough(inputs: Inputs, *, scale: PerModel = (1.0,)) -> Tensor:
    """scale · x."""
    factor = inputs.number(scale[0])
    return inputs.model(0) if factor == 1 else inputs.model(0) * factor
