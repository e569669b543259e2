"""arcee_fusion: take over the elements of the other model whose change matters most, by a robust cutoff (arcee.ai)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from workers.methods.importance import Importance, cutoff, kept_by_mergekit
from workers.methods.passes import Consensus, Kept
from workers.methods.ranking import among_on_host
from workers.methods.tile import Inputs

if TYPE_CHECKING:
    from torch import Tensor


def arcee_fusion(inputs: Inputs) -> Tensor:
    """x where its importance reaches the median plus 1.5 interquartile ranges of its tensor, else the base.

    The importance is |δ| · KL(softmax(row of x) ‖ softmax(row of the base)).
    """
    import torch

    if inputs.as_mergekit:
        return inputs.base + inputs.delta(0) * kept_by_mergekit(inputs)  # float32 from here on, as the mask is
    score = Importance(inputs.models[0], inputs.base_model)
    kept = torch.from_numpy(among_on_host(inputs.tile, cutoff(inputs.tile, score), score))
    delta = inputs.delta(0)
    return inputs.base + delta * kept.to(delta.device, delta.dtype)


def arcee_fusion_pass(inputs: Inputs) -> Consensus:
    """The same as a pass."""
    score = Importance(inputs.models[0], inputs.base_model)
    kept = Kept(score.model, 1.0, among=cutoff(inputs.tile, score), score=score)
    return Consensus(inputs.base_model, (kept,), elect=False)
