"""The folder of a made checkpoint: free before, whole or without its manifest after."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from jobs.errors import BadInput, CorruptData, writing
from jobs.manifest import FileEntry, Manifest, TensorEntry
from jobs.merge_tasks import digest
from jobs.sealing import sealed
from orchestrator.merging.gathering import versions
from orchestrator.records.places import FLAT
from workers.checkpoints.opening import Checkpoint
from workers.digests import weights_digest
from workers.storage import open_store
from workers.storage.records import read_record

BEGUN = FLAT.record("plan.json")


class Output:
    """One checkpoint on its way into a store. `recipe` is everything that decides its bytes, beside the parents."""

    def __init__(self, url: str, recipe: Mapping[str, Any], parents: Mapping[str, Checkpoint]) -> None:
        self.store = open_store(url)
        self._recipe = recipe
        self._parents = {name: parent.url for name, parent in parents.items()}
        pinned = {name: [parent.url, *map(str, parent.files)] for name, parent in parents.items()}
        self._digest = digest([recipe, pinned])

    def is_whole(self) -> bool:
        """Whether this very checkpoint lies there already.

        `BadInput` if another one does, or begins to; an interrupted attempt of the same command is no obstacle.
        """
        self.store.check_writable()
        keys = {info.key for info in self.store.list()}
        if "manifest.json" in keys and self._record("manifest.json") == self._digest:
            return True
        if BEGUN in keys and self._record(BEGUN) == self._digest:
            return False
        foreign = sorted(
            key for key in keys if "/" not in key and key.endswith((".safetensors", "config.json", ".bin"))
        )
        if foreign or BEGUN in keys:
            raise BadInput(
                f"{self.store.url}: something lies there already ({(foreign or [BEGUN])[0]}); give an empty folder"
            )
        return False

    def _record(self, key: str) -> str | None:
        try:
            return read_record(self.store, key, lambda data: json.loads(data)["digest"])
        except (CorruptData, KeyError, ValueError, TypeError):
            return None

    def begin(self) -> None:
        """Marks the folder, so that the same command may go on after an interruption, and no other."""
        with writing():
            self.store.write(BEGUN, sealed({"digest": self._digest}))
            self.store.sweep()

    def finish(
        self, side: Mapping[str, bytes], shards: Mapping[str, FileEntry], tensors: Mapping[str, TensorEntry]
    ) -> Manifest:
        """Writes the files beside the weights in this order, and the manifest last."""
        with writing():
            for name, data in side.items():
                self.store.write(name, data)
            files = {name: FileEntry(len(data), hashlib.sha256(data).hexdigest()) for name, data in side.items()}
            manifest = Manifest(
                point=self.store.url.rpartition("/")[2],
                digest=self._digest,
                weights=weights_digest({name: entry.digest for name, entry in tensors.items()}),
                recipe=self._recipe,
                parents=self._parents,
                seed=0,
                numerics="float32",
                versions=versions(),
                files={**shards, **files},
                tensors=tensors,
            )
            self.store.write("manifest.json", manifest.to_json())
            self.store.delete(BEGUN)
        return manifest
