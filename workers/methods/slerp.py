"""slerp: spherical interpolation between two whole tensors (Shoemake 1985)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from workers.methods.passes import WeightedSum
from workers.methods.reductions import Gram
from workers.methods.tile import Inputs, torch_named

if TYPE_CHECKING:
    from torch import Tensor

_NEARLY_PARALLEL = 0.9995
"""Beyond this |cosine| mergekit interpolates linearly; fine-tunes of one parent nearly always are."""

_ZERO_NORM = 1e-8


def slerp(inputs: Inputs, *, t: float) -> Tensor:
    """From the base model (t = 0) to the other (t = 1) along the arc; the angle is that of the flattened tensors."""
    if inputs.as_mergekit:  # mergekit works in float32 here, whatever the document's dtype
        return slerp(replace(inputs, dtype="float32", as_mergekit=False), t=t).to(torch_named(inputs.dtype))
    shares = _shares(inputs, t)
    return inputs.sum([inputs.tile.parent(model, inputs.dtype) * share for model, share in shares.items()])


def slerp_pass(inputs: Inputs, *, t: float) -> WeightedSum:
    """The same as a pass."""
    shares = _shares(inputs, t)
    return WeightedSum(tuple(shares), tuple(shares.values()))


def _shares(inputs: Inputs, t: float) -> Mapping[str, float]:
    assert inputs.base_name is not None, "planned without the base_model that slerp requires"
    others = [name for name in inputs.models if name != inputs.base_name]
    if not others:
        return {inputs.base_name: 1.0}
    start, end = inputs.base_name, others[0]
    (of_start, dot), (_, of_end) = inputs.tile.known(Gram((start, end), None, "float64")).tolist()
    shares = _coefficients(t, dot=dot, norm_start=math.sqrt(of_start), norm_end=math.sqrt(of_end))
    return {start: inputs.number(shares[0]), end: inputs.number(shares[1])}


def _coefficients(t: float, *, dot: float, norm_start: float, norm_end: float) -> tuple[float, float]:
    """Weights of the two tensors. A norm of (nearly) zero is left as it is, as if it were one."""
    cosine = dot
    for norm in (norm_start, norm_end):
        cosine = cosine / norm if norm > _ZERO_NORM else cosine
    if abs(cosine) > _NEARLY_PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)
