"""Layouts with the same tensors from different parents: their points share tasks, and a model in memory.

Windows of one training run are such layouts. A task of all windows reads each checkpoint once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from jobs.merge_tasks import Parent, TensorMerge, fisher_of
from orchestrator.planning.layouts import Layout, Shard
from workers.checkpoints.activations import Activations


@dataclass(frozen=True, eq=False)
class Family:
    """Layouts that are read together; `shards` have the sources of all their parents."""

    layouts: tuple[Layout, ...]
    shards: tuple[Shard, ...]

    @property
    def parents(self) -> frozenset[str]:
        """The parents of all layouts."""
        return frozenset(name for layout in self.layouts for name in layout.parents)

    @property
    def activations(self) -> Activations | None:
        """The statistics for AIM, which all layouts have in common."""
        return self.layouts[0].activations

    @property
    def grams(self) -> dict[str, Parent]:
        """The files of Gram matrices by model, which all layouts have in common."""
        return {model: file.parent for model, file in self.layouts[0].grams.items()}

    @property
    def fishers(self) -> dict[str, Parent]:
        """The files of Fisher information, which all layouts have in common, by the names that tasks give them."""
        return {fisher_of(model): file.parent for model, file in self.layouts[0].fishers.items()}


def families(layouts: Iterable[Layout], most_parents: int) -> Mapping[Layout, Family]:
    """The family of each layout: those with common parents are together, unless they have more than `most_parents`."""
    found: dict[tuple[object, ...], list[Family]] = {}
    for layout in sorted(layouts, key=lambda layout: -len(layout.parents)):
        kin = found.setdefault(_skeleton(layout), [])
        joined = Family((layout,), layout.shards)
        for family in [*kin]:
            if joined.parents & family.parents and len(joined.parents | family.parents) <= most_parents:
                shards = _together(family.shards, joined.shards)
                if shards is not None:
                    kin.remove(family)
                    joined = Family((*family.layouts, *joined.layouts), shards)
        kin.append(joined)
    return {layout: family for kin in found.values() for family in kin for layout in family.layouts}


def _skeleton(layout: Layout) -> tuple[object, ...]:
    """All of a layout but its tensors' sources; of a checkpoint that is not merged, the layout itself."""
    if not layout.shards:
        return (layout,)
    statistics = None if layout.activations is None else layout.activations.digest
    files = [(model, file.digest) for each in (layout.grams, layout.fishers) for model, file in sorted(each.items())]
    return (
        statistics,
        *files,
        *(
            (
                shard.name,
                *(
                    (
                        each.name,
                        each.dtype,
                        each.shape,
                        each.setting,
                        each.arithmetic,
                        each.activations,
                        *each.grams.items(),
                        *each.fishers.items(),
                    )
                    for each in shard.tensors
                ),
            )
            for shard in layout.shards
        ),
    )


def _together(some: Sequence[Shard], others: Sequence[Shard]) -> tuple[Shard, ...] | None:
    """The shards with the sources of both; None where a parent's tensors lie in different places."""
    shards: list[Shard] = []
    for shard, other in zip(some, others, strict=True):
        tensors: list[TensorMerge] = []
        for tensor, twin in zip(shard.tensors, other.tensors, strict=True):
            if any(tensor.sources.get(name, source) != source for name, source in twin.sources.items()):
                return None
            tensors.append(replace(tensor, sources={**tensor.sources, **twin.sources}))
        shards.append(Shard(shard.name, tuple(tensors)))
    return tuple(shards)
