"""The keys of shards: digests of everything that decides a shard's bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jobs.job import Job
from jobs.merge_tasks import FORMAT, NUMERICS, Merged, ParentTensor, Setting, Source, digest
from orchestrator.planning.layouts import Layout, Shard
from workers.checkpoints.opening import Checkpoint, all_places
from workers.methods import METHODS


class ContentKeys:
    """Keys of the bytes of shards and points: equal keys for equal bytes, in every plan."""

    def __init__(self, job: Job, parents: Mapping[str, Checkpoint]) -> None:
        self._job, self._parents = job, all_places(parents)
        self._layouts: dict[tuple[Layout, frozenset[str]], tuple[tuple[str, ...], str]] = {}

    def of_point(self, layout: Layout, settings: Sequence[Setting]) -> str:
        """The key of a whole point."""
        _, whole = self._of_layout(layout, settings)
        return self._bound(layout, whole, [setting.document() for setting in settings], settings)

    def of_shards(self, layout: Layout, settings: Sequence[Setting]) -> tuple[str, ...]:
        """One key a shard of the layout."""
        shards, _ = self._of_layout(layout, settings)
        return tuple(
            self._bound(layout, key, [settings[index].document() for index in shard.classes], settings)
            for key, shard in zip(shards, layout.shards, strict=True)
        )

    def _bound(self, layout: Layout, key: str, bound: Sequence[Any], settings: Sequence[Setting]) -> str:
        seed = self._job.seed if any(METHODS[setting.method].random for setting in settings) else None
        given: list[Any] = []
        if layout.activations is not None and any(setting.omega is not None for setting in settings):
            given.append(layout.activations.digest)
        for kind, files in (("grams", layout.grams), ("fisher", layout.fishers)):
            used = {model for setting in settings if METHODS[setting.method].given == kind for model in setting.models}
            if used:
                given.append({model: files[model].digest for model in sorted(used)})
        if revised := {setting.method: revision for setting in settings if (revision := revision_of(setting))}:
            given.append(revised)
        return digest([FORMAT, NUMERICS, self._job.numerics, key, bound, seed, *given])

    def _of_layout(self, layout: Layout, settings: Sequence[Setting]) -> tuple[tuple[str, ...], str]:
        """The parts of the parents that the layout and its shards use under these settings."""
        used = frozenset(name for setting in settings for name in setting.parents)
        if (layout, used) not in self._layouts:
            shards = tuple(self._of_shard(shard, used) for shard in layout.shards)
            files = [[file.key, file.size, file.etag] for file in layout.as_it_is]
            self._layouts[layout, used] = shards, digest([*shards, *files])
        return self._layouts[layout, used]

    def _of_shard(self, shard: Shard, used: frozenset[str]) -> str:
        """The inputs of a shard beside the settings: the bytes and versions of its parents, and their places."""
        return digest(
            [
                [
                    [tensor.name, tensor.dtype, list(tensor.shape), tensor.arithmetic, tensor.setting],
                    {name: self._source(name, source) for name, source in tensor.sources.items() if name in used},
                ]
                for tensor in shard.tensors
            ]
        )

    def _source(self, name: str, source: Source) -> list[Any]:
        """All that decides the elements of one source: version and place of what is read, and the rules."""
        if isinstance(source, ParentTensor):
            file = self._parents[name].files[source.file]
            return [file.etag, file.size, source.dtype, source.start]
        rule: list[Any] = [type(source.rule).__name__, dataclasses.asdict(source.rule)]
        if isinstance(source.rule, Merged) and (revision := revision_of(source.rule.setting)):
            rule.append(revision)
        inputs = [[label, self._source(label, part)] for label, part in source.inputs]
        return [source.dtype, list(source.shape), rule, inputs]


def revision_of(setting: Setting) -> int:
    """How often the bits of a merge have changed since `NUMERICS`."""
    return METHODS[setting.method].revision
