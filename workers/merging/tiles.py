"""One tile, one setting, one result: the door to the methods, and how their questions about whole tensors are found."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from jobs.merge_tasks import Setting, TensorMerge
from workers.checkpoints.dtypes import torch_dtype
from workers.methods import METHODS
from workers.methods.tile import Inputs, NotYetKnown, Reduction, Tile

Facts = dict[Reduction, Any]


def merge_tile(tile: Tile, setting: Setting, arithmetic: str, numerics: str) -> Tensor:
    """The merged elements of one tile in the arithmetic dtype; `NotYetKnown` when a whole-tensor fact is missing."""
    inputs = Inputs(tile, setting.models, setting.base, torch_dtype(arithmetic), numerics == "mergekit")
    keywords = {"lambda_" if name == "lambda" else name: value for name, value in setting.parameters}
    return METHODS[setting.method].merge(inputs, **keywords)


def missing_facts(
    tensor: TensorMerge, settings: Iterable[Setting], facts: Facts, *, seed: int, numerics: str
) -> list[Reduction]:
    """The facts about a tensor that these settings need before they merge it: found by merging one zero per parent."""
    zeros = {name: torch.zeros(1, dtype=torch_dtype(source.dtype)) for name, source in tensor.sources.items()}
    tile = Tile(tensor.name, 0, zeros, facts, seed)
    missing: dict[Reduction, None] = {}
    for setting in settings:
        try:
            merge_tile(tile, setting, tensor.arithmetic, numerics)
        except NotYetKnown as question:
            missing[_first_unknown(question.reduction, tile)] = None
    return [*missing]


def _first_unknown(reduction: Reduction, tile: Tile) -> Reduction:
    """The reduction, or whatever it has to know itself before it can look at its first tile."""
    try:
        reduction.of(tile)
    except NotYetKnown as question:
        return _first_unknown(question.reduction, tile)
    return reduction
