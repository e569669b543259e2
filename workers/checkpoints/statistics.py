"""Files of statistics with a digest for each tensor: how they are named and written, and how their metadata is read."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput, CorruptData, ObjectExists, writing
from jobs.merge_tasks import digest
from workers.checkpoints.safetensors import header_bytes
from workers.digests import digest_of
from workers.storage import Store

DIGESTS = "digests"
"""The key of the metadata that holds the digests, as JSON."""

PART_BYTES = 16 << 20

Numbers = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Written:
    """A file that was written: the digest of all tensors, the bytes of the file, and the names of the tensors."""

    digest: str
    bytes: int
    names: tuple[str, ...]


def split_url(url: str) -> tuple[str, str]:
    """(folder, name) of a file; `BadInput` for a folder."""
    folder, _, name = url.rpartition("/")
    if not name.endswith(".safetensors"):
        raise BadInput(f"{url}: a file of statistics ends in .safetensors; give its whole path")
    return folder or url.removesuffix(name) or ".", name


def write_statistics(
    store: Store, key: str, tensors: Iterable[tuple[str, Numbers]], metadata: Mapping[str, str]
) -> Written:
    """Writes float32 tensors in the order in which they come; equal inputs give equal bytes.

    One tensor at a time is in memory: the header comes first and has the digests, so that the tensors wait in a
    temporary file. `ObjectExists` where there is such a file, of which nothing is changed.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    digests: dict[str, str] = {}
    with tempfile.TemporaryFile(prefix="mergeyard-statistics-") as waiting:
        for name, values in tensors:
            stored = np.ascontiguousarray(values, "<f4")
            shapes[name], digests[name] = stored.shape, digest_of(stored.data.cast("B"))
            waiting.write(stored.data)
        header = header_bytes(
            [(name, "F32", shape) for name, shape in shapes.items()],
            {**metadata, DIGESTS: json.dumps(digests, separators=(",", ":"))},
        )
        size = len(header) + waiting.tell()
        waiting.seek(0)
        try:
            with writing(), store.upload(key, mode="create") as upload:
                upload.write(header)
                while part := waiting.read(PART_BYTES):
                    upload.write(part)
                upload.commit()
        except ObjectExists:
            raise ObjectExists(f"{store.url}/{key}: there is such a file already; give another name") from None
    return Written(digest_of_all(digests), size, tuple(digests))


def digest_of_all(digests: Mapping[str, str]) -> str:
    """The digest of a file's tensors, from those of each."""
    return digest(sorted([name, each] for name, each in digests.items()))


def read_mapping(metadata: Mapping[str, str], key: str, where: str) -> Mapping[str, Any]:
    """The JSON object under a key of the metadata, empty if there is none; `CorruptData` if it is not one."""
    try:
        found = json.loads(metadata.get(key, "{}"))
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise CorruptData(f"{where}: its {key} are not a JSON object; give a file of `mergeyard measure`")
    return found
