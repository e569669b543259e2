"""One tile, one setting, one result: the door to the methods, and how their questions about whole tensors are found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.merge_tasks import Setting, TensorMerge
from workers.checkpoints.dtypes import TORCH_NAMES
from workers.methods import METHODS
from workers.methods.passes import Pass
from workers.methods.tile import Inputs, NotYetKnown, Reduction, Tile

if TYPE_CHECKING:
    from torch import Tensor

Facts = dict[Reduction, Any]


def merge_tile(tile: Tile, setting: Setting, arithmetic: str, numerics: str) -> Tensor:
    """The merged elements of one tile in the arithmetic dtype; `NotYetKnown` when a whole-tensor fact is missing."""
    return METHODS[setting.method].merge(_inputs(tile, setting, arithmetic, numerics), **_keywords(setting))


def pass_of(tile: Tile, setting: Setting, arithmetic: str, numerics: str) -> Pass | None:
    """The setting as one pass over memory, or None where only the formula has it; raises as `merge_tile` does."""
    fused = METHODS[setting.method].fused
    if fused is None or numerics == "mergekit":
        return None
    return fused(_inputs(tile, setting, arithmetic, numerics), **_keywords(setting))


def _inputs(tile: Tile, setting: Setting, arithmetic: str, numerics: str) -> Inputs:
    return Inputs(tile, setting.models, setting.base, TORCH_NAMES[arithmetic], numerics == "mergekit")


def _keywords(setting: Setting) -> dict[str, Any]:
    return {"lambda_" if name == "lambda" else name: value for name, value in setting.parameters}


def missing_facts(
    tensor: TensorMerge, settings: Iterable[Setting], facts: Facts, *, seed: int, numerics: str
) -> list[Reduction]:
    """The facts about a tensor that these settings need before they merge it: found by merging one zero per parent."""
    zeros = {name: np.zeros(1, np.float32) for name in tensor.sources}
    tile = Tile(tensor.name, 0, zeros, facts, seed, tensor.shape, zeros)
    missing: dict[Reduction, None] = {}
    for setting in settings:
        try:
            if pass_of(tile, setting, tensor.arithmetic, numerics) is None:
                merge_tile(tile, setting, tensor.arithmetic, numerics)
        except NotYetKnown as question:
            missing[_first_unknown(question.reduction, tile)] = None
    return [*missing]


def _first_unknown(reduction: Reduction, tile: Tile) -> Reduction:
    """The reduction, or whatever must be known before it."""
    try:
        reduction.ask(tile)
    except NotYetKnown as question:
        return _first_unknown(question.reduction, tile)
    return reduction
