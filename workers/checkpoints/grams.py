"""The file of Gram matrices: XᵀX / tokens of the inputs of a model's linear layers, as float32 tensors.

A tensor is named by the weights whose inputs they are, with blanks between: q, k and v share one, and so do gate and
up. It is of (blocks, size, size): the channels, cut into parts of `size`, are correlated within a part alone, and zeros
fill the last. The metadata has the digest of each.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput, CorruptData, ObjectExists, writing
from jobs.merge_tasks import GramTensor, Parent, ParentFile, digest
from workers.checkpoints.activations import split_url
from workers.checkpoints.safetensors import header_bytes, read_header, read_metadata
from workers.digests import digest_of
from workers.storage import Store, open_store

DIGESTS = "digests"
"""The key of the metadata that holds the digests, as JSON."""

PART_BYTES = 16 << 20

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


@dataclass(frozen=True, slots=True)
class Written:
    """A file of Gram matrices that was written; `weights` are the tensors that have one, `count` is of the matrices."""

    digest: str
    bytes: int
    count: int
    weights: frozenset[str]


def write_grams(
    store: Store, key: str, grams: Iterable[tuple[tuple[str, ...], Matrix]], metadata: Mapping[str, str]
) -> Written:
    """Writes the matrix for each group of weights, in ascending order of the groups; equal inputs give equal bytes.

    One matrix at a time is in memory: the header comes first and has the digests, so that the matrices wait in a
    temporary file. `ObjectExists` where there is such a file, of which nothing is changed.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    digests: dict[str, str] = {}
    with tempfile.TemporaryFile(prefix="mergeyard-grams-") as waiting:
        for weights, matrix in grams:
            name, stored = " ".join(weights), np.ascontiguousarray(matrix, "<f4")
            shapes[name], digests[name] = stored.shape, _digest(stored)
            waiting.write(stored.data)
        header = header_bytes(
            [(name, "F32", shape) for name, shape in shapes.items()],
            {**metadata, DIGESTS: json.dumps(digests, separators=(",", ":"))},
        )
        size = len(header) + waiting.tell()
        waiting.seek(0)
        if any(info.key == key for info in store.list(key)):
            raise ObjectExists(f"{store.url}/{key}: there is such a file already; give another name")
        with writing(), store.upload(key) as upload:
            upload.write(header)
            while part := waiting.read(PART_BYTES):
                upload.write(part)
            upload.commit()
    content = digest(sorted([name, each] for name, each in digests.items()))
    return Written(content, size, len(digests), frozenset(weight for name in digests for weight in name.split(" ")))


def _digest(matrix: Matrix) -> str:
    return digest_of(np.ascontiguousarray(matrix, "<f4").data.cast("B"))


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
    try:
        digests = json.loads(read_metadata(store, info).get(DIGESTS, "{}"))
    except ValueError:
        digests = None
    if not isinstance(digests, dict):
        raise CorruptData(f"{where}: its digests are not a JSON object; {other}")
    tensors: dict[str, GramTensor] = {}
    for entry in entries:
        if entry.dtype != "F32" or len(entry.shape) != 3 or not isinstance(digests.get(entry.name), str):
            raise BadInput(f"{where}: {entry.name} is not a Gram matrix with its digest; {other}")
        gram = GramTensor(entry.name, entry.shape, entry.start, entry.end, digests[entry.name])
        tensors |= dict.fromkeys(entry.name.split(" "), gram)
    content = digest(sorted([entry.name, digests[entry.name]] for entry in entries))
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
