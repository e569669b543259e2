"""The file of statistics for AIM: mean |x| of the input channels of each weight, as small float32 tensors.

A tensor of statistics has the axes of its weight, of length 1 where the mean does not depend on them: [1, in] for a
linear layer, [in, 1] for one that is stored transposed, [n] for a norm, [experts, 1, in] for experts in one tensor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput, CorruptData
from jobs.merge_tasks import Parent, ParentFile
from workers.checkpoints.safetensors import header_bytes, read_header
from workers.checkpoints.statistics import split_url
from workers.digests import digest_of
from workers.storage import open_store

Means = Mapping[str, NDArray[np.float32]]

LARGEST_FILE = 512 << 20
"""Four times the bytes that 128 experts in each of 48 layers need, stored one by one."""


@dataclass(frozen=True, eq=False)
class Activations:
    """A pinned file of statistics, its content, and the digest of that."""

    parent: Parent
    digest: str
    means: Means


def activations_bytes(means: Means, metadata: Mapping[str, str]) -> bytes:
    """The file: equal statistics and metadata give equal bytes."""
    header = header_bytes([(name, "F32", values.shape) for name, values in sorted(means.items())], metadata)
    return b"".join((header, *(np.ascontiguousarray(values, "<f4").tobytes() for _, values in sorted(means.items()))))


def digest_of_means(means: Means) -> str:
    """The digest of the statistics, without the metadata."""
    return digest_of(activations_bytes(means, {}))


def open_activations(url: str) -> Activations:
    """The statistics at a URL. `BadInput` if it is another file, `CorruptData` if it is damaged."""
    folder, name = split_url(url)
    store = open_store(folder)
    info = store.locate(name)
    return read_activations(Parent(store.pinned_url, (ParentFile(info.key, info.size, info.etag),)))


def read_activations(parent: Parent) -> Activations:
    """The statistics of a pinned file, read whole; errors as of `open_activations`, `ObjectChanged` if it changed."""
    store, (file,) = open_store(parent.url), parent.files
    where = f"{parent.url}/{file.key}"
    if file.size > LARGEST_FILE:
        raise BadInput(f"{where}: has {file.size} bytes, a file of activations has a few million; is it a model?")
    entries = read_header(store, store.locate(file.key))
    data = bytes(store.read(file.key, etag=file.etag))
    means: dict[str, NDArray[np.float32]] = {}
    for entry in entries:
        if entry.dtype != "F32":
            raise BadInput(
                f"{where}: tensor {entry.name} is {entry.dtype}, activations are F32; give a file of"
                " `mergeyard measure --what means`"
            )
        means[entry.name] = np.frombuffer(data[entry.start : entry.end], "<f4").reshape(entry.shape)
        if not np.isfinite(means[entry.name]).all() or (means[entry.name] < 0).any():
            raise CorruptData(f"{where}: tensor {entry.name} holds numbers that are no means of |x|; make it again")
    return Activations(parent, digest_of_means(means), means)
