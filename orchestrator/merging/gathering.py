"""From receipts to a checkpoint that the Hugging Face libraries load: index, config, tokenizer, card, manifest last.

No tensor passes here: the shards lie where they belong already.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from importlib.metadata import version
from typing import Any

import yaml

from jobs.errors import CorruptData, ObjectExists, ObjectMissing
from jobs.manifest import FileEntry, Manifest, TensorEntry
from jobs.merge_tasks import Receipt
from orchestrator.merging.card import model_card
from orchestrator.planning.beside import files_beside, read_beside
from orchestrator.planning.plan import Plan, PlannedPoint
from orchestrator.words import Collapses
from workers.digests import contradict, weights_digest
from workers.storage import ObjectInfo, Store
from workers.storage.records import read_record

VERSIONED = ("mergeyard", "torch", "numpy", "safetensors")

WRITES_AT_ONCE = 8
"""Files of a point that are written at once: each waits for a disk or a bucket."""


class Gatherer:
    """Completes points of one plan in the run's store."""

    def __init__(self, plan: Plan, store: Store) -> None:
        self._plan = plan
        self._store = store
        self._hashed: dict[str, str] = {}
        self._side_file = lru_cache(maxsize=64)(partial(read_beside, plan.parents))

    def complete(self, planned: PlannedPoint, receipts: Mapping[str, Receipt]) -> Manifest:
        """Writes the files beside the shards, then the manifest; nothing if the point is complete and undamaged."""
        weights = weights_digest(
            {name: digest for unit in planned.units for name, digest in receipts[unit].tensors.items()}
        )
        earlier = self._published(planned.name, weights)
        if earlier is not None:
            if self._is_whole(earlier):
                return earlier
            self._store.delete(self._key(planned.name))  # first, so that the point is not complete meanwhile
        overflowed = {name: count for unit in planned.units for name, count in receipts[unit].overflowed.items()}
        collapses = Collapses()
        for unit in planned.units:
            collapses.add(receipts[unit])
        files = self._files(planned, overflowed, collapses.lines())
        with ThreadPoolExecutor(WRITES_AT_ONCE, "files") as pool:
            list(pool.map(partial(self._write, planned.name), files.items()))
        return self._publish(self._manifest(planned, receipts, files, weights))

    def complete_twin(self, planned: PlannedPoint, original: Manifest) -> Manifest:
        """The manifest of a point that is the same merge as an earlier one: it refers to that one's files."""
        earlier = self._published(planned.name, original.weights)
        if earlier is not None:
            return earlier
        manifest = Manifest(
            point=planned.name,
            digest=planned.digest,
            weights=original.weights,
            recipe=_recipe(planned),
            parents=original.parents,
            seed=original.seed,
            numerics=original.numerics,
            versions=original.versions,
            files={},
            tensors={},
            same_as=planned.same_as,
        )
        return self._publish(manifest)

    def _publish(self, manifest: Manifest) -> Manifest:
        """Writes the manifest, or finds that a driver that was replaced wrote it a moment ago."""
        try:
            self._store.write(self._key(manifest.point), manifest.to_json(), mode="create")
        except ObjectExists:
            return self._published(manifest.point, manifest.weights) or manifest
        return manifest

    def _write(self, point: str, file: tuple[str, bytes]) -> None:
        name, data = file
        self._store.write(self._plan.places.file(point, name), data)

    def _key(self, point: str) -> str:
        return self._plan.places.file(point, "manifest.json")

    def _published(self, point: str, weights: str) -> Manifest | None:
        """The manifest that the point has already; a damaged one is removed. `CorruptData` if it has other weights."""
        try:
            earlier = read_record(self._store, self._key(point), Manifest.from_json)
        except ObjectMissing:
            return None
        except CorruptData:
            if self._is_sealed(point):  # another version wrote it so
                raise
            self._store.delete(self._key(point))
            return None
        if contradict(earlier.weights, weights):
            raise CorruptData(
                f"{self._store.url}/{self._key(point)}: complete already, with other weights; run `mergeyard verify`"
            )
        return earlier

    def _is_sealed(self, point: str) -> bool:
        """Whether the digest of the manifest is right."""
        try:
            return bool(read_record(self._store, self._key(point)))
        except CorruptData:
            return False

    def _is_whole(self, manifest: Manifest) -> bool:
        """Whether the files beside the shards are those of the manifest; of files with one ETag, one is read."""
        there = {info.key: info for info in self._store.list(self._plan.places.file(manifest.point, ""))}
        return all(
            self._is_file(there.get(self._plan.places.file(manifest.point, name)), entry)
            for name, entry in manifest.files.items()
            if entry.sha256 is not None
        )

    def _is_file(self, info: ObjectInfo | None, entry: FileEntry) -> bool:
        if info is None or info.size != entry.size:
            return False
        if self._hashed.get(info.etag) != entry.sha256:
            self._hashed[info.etag] = hashlib.sha256(self._store.read(info.key, etag=info.etag)).hexdigest()
        return self._hashed[info.etag] == entry.sha256

    def _files(
        self, planned: PlannedPoint, overflowed: Mapping[str, int], collapses: Sequence[str]
    ) -> dict[str, bytes]:
        layout = planned.layout
        files = {"config.json": json_file(layout.config)}
        if layout.index is not None:
            files["model.safetensors.index.json"] = json_file(layout.index)
        files |= files_beside(layout.copied, layout.added_tokens, layout.chat_template, self._side_file)
        text = yaml.safe_dump_all(planned.point.documents(), sort_keys=False)
        files["mergekit_config.yml"] = text.encode()
        files["README.md"] = model_card(self._plan, planned, text, overflowed, collapses).encode()
        return files

    def _manifest(
        self, planned: PlannedPoint, receipts: Mapping[str, Receipt], files: Mapping[str, bytes], weights: str
    ) -> Manifest:
        shards: dict[str, FileEntry] = {}
        tensors: dict[str, TensorEntry] = {}
        for shard, unit in zip(planned.layout.shards, planned.units, strict=True):
            receipt = receipts[unit]
            shards[shard.name] = FileEntry(receipt.size)
            for tensor in shard.tensors:
                tensors[tensor.name] = TensorEntry(shard.name, tensor.dtype, tensor.shape, receipt.tensors[tensor.name])
        side = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()}
        return Manifest(
            point=planned.name,
            digest=planned.digest,
            weights=weights,
            recipe=_recipe(planned),
            parents=self._plan.sources_of(planned.point),
            seed=self._plan.job.seed,
            numerics=self._plan.job.numerics,
            versions=versions(),
            files={**shards, **side},
            tensors=tensors,
        )


def _recipe(planned: PlannedPoint) -> Any:
    """The document of a point, or those of its stages and its own."""
    *stages, own = planned.point.documents()
    return [*stages, own] if stages else own


@lru_cache(maxsize=1)
def versions() -> dict[str, str]:
    """The program's name and version; looked up once, because each look parses a file of the installation."""
    return {"python": platform.python_version(), **{name: version(name) for name in VERSIONED}}


def json_file(value: object) -> bytes:
    """A JSON file as the libraries write it."""
    return (json.dumps(value, indent=2) + "\n").encode()
