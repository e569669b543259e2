"""Merging small tensors whole, tile by tile, the way a worker does it but without files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from jobs.merge_tasks import Setting
from tests.workers.methods.whole import answered, change_tiles, tiles_of
from workers.merging.tiles import merge_tile
from workers.methods import METHODS
from workers.methods.tile import Reduction

Merge = Callable[..., Tensor]
SMALL = 16


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> int:
    """Tiles of so few elements that a tensor of a hundred has several; how many."""
    change_tiles(monkeypatch, SMALL)
    return SMALL


@pytest.fixture
def merge() -> Merge:
    """merge(method, models, base=…, arithmetic="F32", seed=0, tensor="x", units=1, shape=…, numerics=…, **parameters).

    Returns the merged elements. `models` and `base` map names to tensors (lists become float32), whose shape holds if
    no other is given; parameters are as a method's keywords, those per model as tuples.
    """

    def run(
        method: str,
        models: Mapping[str, Any],
        *,
        base: Mapping[str, Any] | None = None,
        arithmetic: str = "F32",
        seed: int = 0,
        tensor: str = "x",
        units: int = 1,
        shape: tuple[int, ...] | None = None,
        numerics: str = "float32",
        **parameters: Any,
    ) -> Tensor:
        parents = {
            name: values if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float32)
            for name, values in {**models, **(base or {})}.items()
        }
        for parameter in METHODS[method].parameters.values():
            if parameter.per_model and parameter.default is not None:
                parameters.setdefault(parameter.name, (parameter.default,) * len(models))
        setting = Setting(method, tuple(models), next(iter(base), None) if base else None, tuple(parameters.items()))
        facts: dict[Reduction, Any] = {}
        shape = shape or tuple(next(iter(parents.values())).shape)
        flat = {name: values.flatten() for name, values in parents.items()}
        tiles = tiles_of(flat, facts, units=units, seed=seed, name=tensor, shape=shape)
        return torch.cat(answered(tiles, facts, lambda tile: merge_tile(tile, setting, arithmetic, numerics)))

    return run
