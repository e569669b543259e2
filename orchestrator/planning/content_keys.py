"""The keys of shards: digests of everything that decides a shard's bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from jobs.job import Job
from jobs.merge_tasks import FORMAT, NUMERICS, Setting, digest
from orchestrator.planning.layouts import Layout, Shard
from workers.checkpoints.opening import Checkpoint

RANDOM_METHODS = ("dare_linear", "dare_ties")


class ContentKeys:
    """Keys of the bytes of shards and points: equal keys for equal bytes, in every plan."""

    def __init__(self, job: Job, parents: Mapping[str, Checkpoint]) -> None:
        self._job, self._parents = job, parents
        self._layouts: dict[tuple[Layout, frozenset[str]], tuple[tuple[str, ...], str]] = {}

    def of_point(self, layout: Layout, settings: Sequence[Setting]) -> str:
        """The key of a whole point."""
        _, whole = self._of_layout(layout, settings)
        return self._bound(whole, [setting.document() for setting in settings], settings)

    def of_shards(self, layout: Layout, settings: Sequence[Setting]) -> tuple[str, ...]:
        """One key a shard of the layout."""
        shards, _ = self._of_layout(layout, settings)
        return tuple(
            self._bound(key, [settings[index].document() for index in shard.classes], settings)
            for key, shard in zip(shards, layout.shards, strict=True)
        )

    def _bound(self, key: str, bound: Sequence[Any], settings: Sequence[Setting]) -> str:
        seed = self._job.seed if any(setting.method in RANDOM_METHODS for setting in settings) else None
        return digest([FORMAT, NUMERICS, self._job.numerics, key, bound, seed])

    def _of_layout(self, layout: Layout, settings: Sequence[Setting]) -> tuple[tuple[str, ...], str]:
        """The parts of the parents that the layout and its shards use under these settings."""
        used = frozenset(name for setting in settings for name in setting.parents)
        if (layout, used) not in self._layouts:
            shards = tuple(_shard_digest(shard, used, self._parents) for shard in layout.shards)
            files = [[file.key, file.size, file.etag] for file in layout.as_it_is]
            self._layouts[layout, used] = shards, digest([*shards, *files])
        return self._layouts[layout, used]


def _shard_digest(shard: Shard, used: frozenset[str], parents: Mapping[str, Checkpoint]) -> str:
    """The inputs of a shard beside the settings: the bytes and versions of its parents, and their places."""
    return digest(
        [
            [
                [tensor.name, tensor.dtype, list(tensor.shape), tensor.arithmetic, tensor.setting],
                {
                    name: [parents[name].files[at.file].etag, parents[name].files[at.file].size, at.dtype, at.start]
                    for name, at in tensor.sources.items()
                    if name in used
                },
            ]
            for tensor in shard.tensors
        ]
    )
