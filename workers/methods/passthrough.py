"""passthrough: one model, as it is or scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.passes import WeightedSum
from workers.methods.tile import Inputs, PerModel

if TYPE_CHECKING:
    from torch import Tensor


def passthrough(inputs: Inputs, *, scale: PerModel = (1.0,)) -> Tensor:
    """scale · x."""
    return inputs.model(0) if scale[0] == 1 else inputs.model(0) * scale[0]  # mergekit does not round it to the dtype


def passthrough_pass(inputs: Inputs, *, scale: PerModel) -> WeightedSum:
    """The same as a pass."""
    return WeightedSum(inputs.models, (inputs.number(scale[0]),))
