"""The file of a model's diagonal Fisher information: a float32 tensor for each weight, with its name and shape.

The metadata has the digest and the mean of each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from jobs.errors import BadInput
from jobs.merge_tasks import Parent, ParentFile, ParentTensor
from workers.checkpoints.safetensors import read_header, read_metadata
from workers.checkpoints.statistics import (
    DIGESTS,
    Numbers,
    Written,
    digest_of_all,
    read_mapping,
    split_url,
    write_statistics,
)
from workers.storage import Store, open_store

MEANS = "means"
"""The key of the metadata that holds the means, as JSON."""


@dataclass(frozen=True, slots=True)
class FisherTensor:
    """The place of a weight's Fisher information, its shape, and the mean of its elements."""

    at: ParentTensor
    shape: tuple[int, ...]
    mean: float


@dataclass(frozen=True, eq=False)
class FisherFile:
    """A pinned file, its tensors by the names of the weights, and the digest of all of them."""

    parent: Parent
    digest: str
    tensors: Mapping[str, FisherTensor]

    @property
    def bytes(self) -> int:
        """The bytes of all tensors."""
        return sum(each.at.end - each.at.start for each in self.tensors.values())


def write_fisher(store: Store, key: str, squares: Mapping[str, Numbers], metadata: Mapping[str, str]) -> Written:
    """Writes the Fisher information of each weight in ascending order of the names, as `write_statistics` does."""
    means = {name: float(np.mean(values, dtype=np.float64)) for name, values in sorted(squares.items())}
    listed = {**metadata, MEANS: json.dumps(means, separators=(",", ":"))}
    return write_statistics(store, key, sorted(squares.items()), listed)


def open_fisher(url: str) -> FisherFile:
    """The file at a URL, of which the header alone is read. `BadInput` if it is another, `CorruptData` if damaged."""
    folder, name = split_url(url)
    store = open_store(folder)
    info = store.locate(name)
    where = f"{store.pinned_url}/{name}"
    entries, metadata = read_header(store, info), read_metadata(store, info)
    digests, means = (read_mapping(metadata, key, where) for key in (DIGESTS, MEANS))
    tensors: dict[str, FisherTensor] = {}
    for entry in entries:
        digest, mean = digests.get(entry.name), means.get(entry.name)
        if entry.dtype != "F32" or not isinstance(digest, str) or not isinstance(mean, float) or not mean >= 0:
            raise BadInput(
                f"{where}: {entry.name} is not Fisher information with its digest and its mean; give a file of"
                " `mergeyard measure --what fisher`"
            )
        at = ParentTensor(0, "F32", entry.start, entry.end, digest)
        tensors[entry.name] = FisherTensor(at, entry.shape, mean)
    content = digest_of_all({each: digests[each] for each in tensors})
    return FisherFile(Parent(store.pinned_url, (ParentFile(info.key, info.size, info.etag),)), content, tensors)
