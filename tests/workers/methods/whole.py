"""Questions to whole tensors, asked tile by tile: what a worker does, without files and threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from workers.methods import tile
from workers.methods.tile import Array, NotYetKnown, Reduction, Tile

Answer = TypeVar("Answer")


def change_tiles(patch: pytest.MonkeyPatch, elements: int) -> None:
    """Tiles of so many elements, in all modules of workers."""
    for name in ("workers.merging.shard", "workers.methods.launching"):
        import_module(name)  # before the change, since modules take the number from `tile` when they are imported
    for name, module in [*sys.modules.items()]:
        if name.startswith("workers.") and "TILE_ELEMENTS" in vars(module):
            patch.setattr(module, "TILE_ELEMENTS", elements)


def tiles_of(
    parents: Mapping[str, Tensor | Array],
    facts: Mapping[Reduction, Any],
    *,
    units: int = 1,
    seed: int = 0,
    name: str = "x",
    shape: tuple[int, ...] | None = None,
) -> list[Tile]:
    """The tiles of one tensor, `units` of `TILE_ELEMENTS` in each; a vector if `shape` is not given."""
    elements, step = len(next(iter(parents.values()))), units * tile.TILE_ELEMENTS
    shape = (elements,) if shape is None else shape
    cuts = (slice(start, start + step) for start in range(0, elements, step))
    return [
        Tile(name, cut.start, {parent: t[cut] for parent, t in parents.items()}, facts, seed, shape, parents)
        for cut in cuts
    ]


def answered(tiles: Sequence[Tile], facts: dict[Reduction, Any], ask: Callable[[Tile], Answer]) -> list[Answer]:
    """What `ask` says of each tile, once everything it has to know of the whole tensor is in `facts`."""
    while True:
        try:
            return [ask(tile) for tile in tiles]
        except NotYetKnown as question:
            for fact in question.reductions:
                answered(tiles, facts, fact.ask)
                facts[fact] = fact.combine([entry for share in answered(tiles, facts, fact.of) for entry in share])


def tiles_and_facts(deltas: Tensor, units: int = 1) -> tuple[list[Tile], dict[Reduction, Any]]:
    """Tiles of a model whose task vector is `deltas`, `units` of `TILE_ELEMENTS` in each."""
    facts: dict[Reduction, Any] = {}
    return tiles_of({"model": deltas, "base": torch.zeros_like(deltas)}, facts, units=units), facts


def known(deltas: Tensor, fact: Reduction, units: int = 1) -> Any:
    """The value of a fact."""
    tiles, facts = tiles_and_facts(deltas, units)
    return answered(tiles, facts, lambda tile: tile.known(fact))[0]


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))
