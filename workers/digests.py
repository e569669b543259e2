"""Digests of tensors and of weights: blake3, `blake3:<hex>`, which takes a third of the time of sha256.

A digest without a name is sha256, as older versions wrote it. Digests of two algorithms cannot be compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

from blake3 import blake3
from typing_extensions import Buffer

from jobs.errors import CorruptData
from jobs.merge_tasks import canonical_json

ALGORITHMS: Mapping[str, Any] = {"blake3": blake3, "sha256": hashlib.sha256}


class TensorHash:
    """The digest of bytes that come piece by piece, by blake3 or by the algorithm of the digest `like`.

    `CorruptData` if `like` names an unknown algorithm.
    """

    def __init__(self, like: str = "blake3:") -> None:
        self._algorithm = algorithm_of(like)
        if self._algorithm not in ALGORITHMS:
            raise CorruptData(f"the digest {like[:80]!a} has an unknown algorithm; use a newer mergeyard")
        self._hash = ALGORITHMS[self._algorithm]()

    def update(self, data: Buffer) -> None:
        """The next bytes."""
        self._hash.update(data)

    def digest(self) -> str:
        """The digest of the bytes so far, with the name of its algorithm."""
        name = "" if self._algorithm == "sha256" else f"{self._algorithm}:"
        return f"{name}{self._hash.hexdigest()}"


def digest_of(data: Buffer, *, like: str = "blake3:") -> str:
    """The digest of these bytes, as `TensorHash` makes it."""
    found = TensorHash(like)
    found.update(data)
    return found.digest()


def algorithm_of(digest: str) -> str:
    """The name of a digest's algorithm."""
    name, named, _ = digest.partition(":")
    return name if named else "sha256"


def contradict(one: str, other: str) -> bool:
    """Whether two digests show different bytes: they differ, and one algorithm made both."""
    return one != other and algorithm_of(one) == algorithm_of(other) in ALGORITHMS


def short(digest: str) -> str:
    """A digest as people read it: twelve digits."""
    return digest.rpartition(":")[2][:12]


def weights_digest(tensors: Mapping[str, str]) -> str:
    """The digest over every tensor's name and digest: equal for equal weights, however they are cut into files.

    Its algorithm is that of the tensors. Digests over tensors of two algorithms have the names of both, and contradict
    nothing.
    """
    names = "+".join(sorted({algorithm_of(digest) for digest in tensors.values()})) or "blake3"
    listed = canonical_json(sorted(tensors.items())).encode()
    return hashlib.sha256(listed).hexdigest() if names == "sha256" else f"{names}:{blake3(listed).hexdigest()}"
