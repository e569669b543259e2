"""A whole point in few launches on a GPU: the tensors of resident parents into the memory that they are given."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, TypeVar

from jobs.merge_tasks import Setting, TensorMerge
from workers.checkpoints.dtypes import FLOATS, TORCH_NAMES, torch_dtype
from workers.merging.tiles import Elements, Facts, copied, has_loop, overflowed, pass_of
from workers.methods.tile import NotYetKnown, Tile

if TYPE_CHECKING:
    from torch import Tensor

    from workers.methods.launching import Work

Name = TypeVar("Name", bound=Hashable)

ELEMENTS_A_LAUNCH = 1 << 28
"""The GPU begins while Python prepares the next launch, and the masks of a launch are in its memory together."""

ALIGNED = 2048
"""Tensors in one buffer begin at multiples of so many elements, as programs of a launch do."""


class PointLaunches:
    """Merges tensors by the loops of `launching`; the places of ties are kept from point to point."""

    def __init__(
        self,
        tensors: Sequence[TensorMerge],
        raw: Mapping[str, Mapping[str, Elements]],
        facts: Mapping[str, Facts],
        *,
        seed: int,
        numerics: str,
        device: str,
    ) -> None:
        self._numerics, self._device = numerics, device
        self._tensors = [each for each in tensors if each.dtype in FLOATS and each.elements]
        self._tiles = {
            each.name: Tile(each.name, 0, raw[each.name], facts[each.name], seed, each.shape, raw[each.name])
            for each in self._tensors
        }

    def begin(
        self,
        settings: Sequence[Setting],
        outputs: Mapping[str, Tensor],
        learn: Callable[[TensorMerge, Setting], None],
        elements: int,
    ) -> dict[str, Callable[[], int]]:
        """Begins to write those tensors of a point that a loop merges; `learn` adds the facts that are missing.

        A launch has about as many `elements`. The result has, for each of those tensors, a function that waits, and
        counts the elements that overflowed.
        """
        overflows: dict[str, Callable[[], int]] = {}
        for chosen in _groups(self._tensors, elements):
            works: dict[str, list[tuple[TensorMerge, Setting, Work]]] = {}
            for tensor in chosen:
                setting = settings[tensor.setting]
                work = self._work(tensor, setting, outputs[tensor.name], learn)
                if work is not None:
                    works.setdefault(TORCH_NAMES[tensor.arithmetic], []).append((tensor, setting, work))
            for arithmetic, alike in works.items():
                overflows.update(_launched(alike, arithmetic))
        return overflows

    def _work(
        self, tensor: TensorMerge, setting: Setting, output: Tensor, learn: Callable[[TensorMerge, Setting], None]
    ) -> Work | None:
        from workers.methods.launching import Work

        if copied(tensor, setting) is not None or not has_loop(tensor, setting, self._device):
            return None
        tile = self._tiles[tensor.name]
        try:
            found = pass_of(tile, setting, tensor.arithmetic, self._numerics)
        except NotYetKnown:
            learn(tensor, setting)
            found = pass_of(tile, setting, tensor.arithmetic, self._numerics)
        return None if found is None else Work(found, tile, output.view(-1))


def _groups(tensors: Sequence[TensorMerge], enough: int) -> Iterator[list[TensorMerge]]:
    """Tensors in their order, cut where the elements of a group are enough for a launch."""
    group: list[TensorMerge] = []
    elements = 0
    for tensor in tensors:
        group.append(tensor)
        elements += tensor.elements
        if elements >= enough:
            yield group
            group, elements = [], 0
    yield group


def _launched(chosen: Sequence[tuple[TensorMerge, Setting, Work]], arithmetic: str) -> dict[str, Callable[[], int]]:
    from workers.methods.launching import run

    flags = cache(run([work for _, _, work in chosen], arithmetic).tolist)  # the first call waits

    def overflow(index: int) -> int:
        _, setting, work = chosen[index]
        return overflowed(work.output, [work.tile.raw[name] for name in setting.parents]) if flags()[index] else 0

    return {tensor.name: partial(overflow, index) for index, (tensor, _, _) in enumerate(chosen)}


def flat(sizes: Mapping[Name, tuple[str, int]], device: str) -> dict[Name, Tensor]:
    """Memory for tensors of these (dtype, elements), one buffer for each dtype; dtypes as safetensors names them."""
    import torch

    ends: dict[str, int] = {}
    begins: dict[Name, int] = {}
    for name, (dtype, elements) in sizes.items():
        begins[name] = ends.get(dtype, 0)
        ends[dtype] = begins[name] + -(-elements // ALIGNED) * ALIGNED
    buffers = {dtype: torch.empty(end, dtype=torch_dtype(dtype), device=device) for dtype, end in ends.items()}
    return {name: buffers[dtype][begins[name] :][:elements] for name, (dtype, elements) in sizes.items()}
