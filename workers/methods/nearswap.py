"""nearswap: go over to the other model where both are close, stay with the base where they are far apart.

Source: the model card of alchemonaut/QuartetAnemoi-70B-t0.0001; the floor of 10⁻⁶ is mergekit's.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.passes import Swap
from workers.methods.tile import Inputs, torch_named

if TYPE_CHECKING:
    from torch import Tensor

NO_DISTANCE = 1e-6
"""A smaller distance counts as this one, so that equal elements are not divided by."""


def nearswap(inputs: Inputs, *, t: float) -> Tensor:
    """w·x + (1 − w)·b, where w = t/|b − x| between 0 and 1: x wherever the two are at most t apart."""
    import torch

    base, other = inputs.base, inputs.model(0)
    distance = (base - other).abs().clamp_(min=NO_DISTANCE)
    # of a plain number, torch multiplies with the reciprocal, as mergekit does
    share = (t if inputs.as_mergekit else torch.tensor(t, dtype=torch_named(inputs.dtype))) / distance
    share.clamp_(min=0, max=1)
    return share * other + (1 - share) * base


def nearswap_pass(inputs: Inputs, *, t: float) -> Swap:
    """The same as a pass."""
    assert inputs.base_name is not None, "planned without the base_model that nearswap requires"
    return Swap(inputs.base_name, inputs.models[0], inputs.number(t))
