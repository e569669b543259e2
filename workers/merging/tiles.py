"""One tile, one setting, one result: the door to the methods, and how their questions about whole tensors are found.

Elsewhere in this room, elements on a CPU are numpy arrays. Torch is imported here, when a formula needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput
from jobs.merge_tasks import Setting, TensorMerge
from workers.checkpoints.dtypes import TORCH_NAMES
from workers.methods import METHODS
from workers.methods.passes import Pass
from workers.methods.tile import Inputs, NotYetKnown, Reduction, Tile, as_tensor

if TYPE_CHECKING:
    from torch import Tensor

Elements = Any
"""Elements of a parent, 1-D, in its own dtype: a numpy array, or a tensor on a GPU."""

Facts = dict[Reduction, Any]


def bytes_of(elements: Elements) -> memoryview:
    """The bytes of elements, on the CPU."""
    if not isinstance(elements, np.ndarray):
        import torch

        elements = elements.cpu().view(torch.uint8).numpy()
    return elements.view(np.uint8).data


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


def copied(tensor: TensorMerge, setting: Setting) -> str | None:
    """The parent whose bytes are the merged ones, if the setting is a plain copy in the parent's dtype."""
    if setting.method == "passthrough" and setting.parameters == (("scale", (1.0,)),):
        (parent,) = setting.models
        return parent if tensor.sources[parent].dtype == tensor.dtype else None
    return None


def common_value(tensor: TensorMerge, setting: Setting, raw: Mapping[str, Elements]) -> Elements:
    """Integers and booleans are not averaged: the value that all of the point's parents share, else `BadInput`."""
    first, *others = setting.parents
    for other in others:
        here, there = raw[first], raw[other]
        if not (np.array_equal(here, there) if isinstance(here, np.ndarray) else here.equal(there)):
            raise BadInput(
                f"tensor {tensor.name} ({tensor.dtype}) differs between {first} and {other};"
                " integers cannot be merged, take it from one parent"
            )
    return raw[first]


def put(row: NDArray[Any], elements: Elements) -> None:
    """Stores elements in a row of output, in its dtype."""
    if isinstance(elements, np.ndarray):
        row[:] = elements
    else:
        as_tensor(row).copy_(elements)


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


def one_torch_thread() -> None:
    """For a thread that merges: others do so beside it, and torch's own threads would only wait for each other."""
    import torch

    torch.set_num_threads(1)
