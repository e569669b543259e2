"""The parts of a finished point. The manifest is written last: if it exists, the point is whole.

It holds nothing that changes from one run to the next (no time, no host), so equal jobs give equal manifests.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from jobs.errors import CorruptData
from jobs.merge_tasks import FORMAT
from jobs.sealing import sealed, unsealed


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a point: size in bytes, and sha256 for all but the shards, whose tensors have their own."""

    size: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a point: its place, dtype and shape, and the digest of its bytes."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    digest: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """`digest` names the merge (parents, recipe, numerics), `weights` the result: the digest over those of all tensors.

    `recipe` is the mergekit document, or a list of documents: the stages by name, and the point's own as the last.
    `same_as` names the point of the same run whose files these are; such a point has none of its own.
    """

    point: str
    digest: str
    weights: str
    recipe: Any
    parents: Mapping[str, str]
    seed: int
    numerics: str
    versions: Mapping[str, str]
    files: Mapping[str, FileEntry]
    tensors: Mapping[str, TensorEntry]
    same_as: str | None = None

    def to_json(self) -> bytes:
        """The manifest's file."""
        document = {entry.name: getattr(self, entry.name) for entry in fields(self)}  # asdict() would copy it all
        return sealed({"format": FORMAT, **document}, lines=True)

    @classmethod
    def from_json(cls, data: bytes) -> Manifest:
        """Reads the text of `to_json`; `CorruptData` for another format, or for anything that is not a manifest."""
        try:
            document = unsealed(data)
            if document.pop("format", None) != FORMAT:
                raise CorruptData("written by another version of mergeyard; use that one, or merge again")
            document["files"] = {name: FileEntry(**entry) for name, entry in document["files"].items()}
            document["tensors"] = {name: _tensor_entry(**entry) for name, entry in document["tensors"].items()}
            return cls(**document)
        except (KeyError, TypeError, AttributeError):
            raise CorruptData("damaged, not a manifest of mergeyard; merge again") from None


def _tensor_entry(*, file: str, dtype: str, shape: list[int], digest: str = "", sha256: str = "") -> TensorEntry:
    """Older manifests have the digest under `sha256`."""
    return TensorEntry(file, dtype, tuple(shape), digest or sha256)
