"""The file of Gram matrices: XᵀX / tokens of the inputs of a model's linear layers, as float32 tensors.

A tensor is named by the weights whose inputs they are, with blanks between: q, k and v share one, and so do gate and
up. It is of (blocks, size, size): the channels, cut into parts of `size`, are correlated within a part alone, and zeros
fill the last. The metadata has the digest of each.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput, CorruptData
from jobs.merge_tasks import GramTensor, Parent, ParentFile
from workers.checkpoints.safetensors import read_header, read_metadata
from workers.checkpoints.statistics import (
    DIGESTS,
    Written,
    digest_of_all,
    read_mapping,
    split_url,
    write_statistics,
)
from workers.digests import digest_of
from workers.storage import Store, open_store

Matrix = NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class GramFile:
    """A pinned file, the place of the Gram matrix of each weight, and the digest of all of them."""

    parent: Parent
    digest: str
    tensors: Mapping[str, GramTensor]

    @property
    def bytes(self) -> int:
        """The bytes of all matrices."""
        return sum(each.end - each.start for each in set(self.tensors.values()))


def write_grams(
    store: Store, key: str, grams: Iterable[tuple[tuple[str, ...], Matrix]], metadata: Mapping[str, str]
) -> Written:
    """Writes the matrix for each group of weights, in ascending order of the groups, as `write_statistics` does."""
    return write_statistics(store, key, ((" ".join(weights), matrix) for weights, matrix in grams), metadata)


def is_for(shape: tuple[int, ...], channels: int) -> bool:
    """Whether a Gram matrix of that shape is that of so many input channels, in the fewest parts of equal size."""
    blocks, size, other = shape
    return size == other and 0 < blocks <= channels and size == math.ceil(channels / blocks)


def open_grams(url: str) -> GramFile:
    """The file at a URL, of which the header alone is read. `BadInput` if it is another, `CorruptData` if damaged."""
    folder, name = split_url(url)
    store = open_store(folder)
    info = store.locate(name)
    where, other = f"{store.pinned_url}/{name}", "give a file of `mergeyard measure`"
    entries = read_header(store, info)
    digests = read_mapping(read_metadata(store, info), DIGESTS, where)
    tensors: dict[str, GramTensor] = {}
    for entry in entries:
        if entry.dtype != "F32" or len(entry.shape) != 3 or not isinstance(digests.get(entry.name), str):
            raise BadInput(f"{where}: {entry.name} is not a Gram matrix with its digest; {other}")
        gram = GramTensor(entry.name, entry.shape, entry.start, entry.end, digests[entry.name])
        tensors |= dict.fromkeys(entry.name.split(" "), gram)
    content = digest_of_all({entry.name: digests[entry.name] for entry in entries})
    return GramFile(Parent(store.pinned_url, (ParentFile(info.key, info.size, info.etag),)), content, tensors)


def read_gram(parent: Parent, gram: GramTensor) -> Matrix:
    """One matrix, blocks × size × size. `CorruptData` if it is damaged or not finite, `ObjectChanged` if it changed."""
    store, (file,) = open_store(parent.url), parent.files
    data = bytes(store.read(file.key, start=gram.start, length=gram.end - gram.start, etag=file.etag))
    if digest_of(data, like=gram.digest) != gram.digest:
        raise CorruptData(f"{parent.url}/{file.key}: {gram.name} is damaged; fetch the file again, or measure again")
    matrix = np.frombuffer(data, "<f4").reshape(gram.shape)
    if not np.isfinite(matrix).all():
        raise CorruptData(f"{parent.url}/{file.key}: {gram.name} has NaN or infinite elements; measure again")
    return matrix
