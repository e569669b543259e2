"""Verifying: every byte against the manifest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

from jobs.errors import CorruptData, MergeyardError, ObjectMissing
from jobs.manifest import Manifest, weights_digest
from workers.checkpoints.hashing import tensor_sha256s
from workers.checkpoints.safetensors import header_bytes, read_header
from workers.storage import Store, open_store
from workers.storage.records import read_record


@dataclass(frozen=True, slots=True)
class Check:
    """The check of one point; without problems it agrees with its manifest."""

    point: str
    problems: tuple[str, ...]


def verify_points(url: str) -> list[Check]:
    """Hashes every file of every point under `url` (a run, a point, or a merged folder) again."""
    store = open_store(url)
    keys = sorted(info.key for info in store.list() if info.key.split("/")[-1] == "manifest.json")
    if not keys:
        raise ObjectMissing(f"{url}: no manifest.json there; is the run complete? see `mergeyard status`")
    return [_verify(store, key.removesuffix("manifest.json")) for key in keys]


def _verify(store: Store, prefix: str) -> Check:
    try:
        manifest = read_record(store, f"{prefix}manifest.json", Manifest.from_json)
    except CorruptData as error:
        return Check(prefix.rstrip("/").rsplit("/", 1)[-1] or store.url, (str(error),))
    return Check(manifest.point, tuple(point_problems(store, prefix, manifest)))


def point_problems(store: Store, prefix: str, manifest: Manifest) -> Iterator[str]:
    """The faults of the files under `prefix`, by this manifest; reads all of them."""
    for name in manifest.files:
        try:
            yield from file_problems(store, prefix, name, manifest)
        except MergeyardError as error:
            yield str(error)
    if manifest.same_as is None:
        recorded = weights_digest({name: entry.sha256 for name, entry in manifest.tensors.items()})
        if recorded != manifest.weights:
            yield "manifest.json: its weights digest is not that of its tensors"


def file_problems(store: Store, prefix: str, name: str, manifest: Manifest) -> Iterator[str]:
    """The faults of one file, by the manifest; `ObjectMissing` if it does not exist."""
    info, written = store.locate(prefix + name), manifest.files[name]
    if info.size != written.size:
        yield f"{name}: {info.size} bytes, {written.size} were written"
        return
    if written.sha256 is not None:
        if hashlib.sha256(bytes(store.read(info.key))).hexdigest() != written.sha256:
            yield f"{name}: changed since it was written"
        return
    headers = read_header(store, info)
    header = header_bytes([(tensor.name, tensor.dtype, tensor.shape) for tensor in headers])
    if bytes(store.read(info.key, length=min(len(header), info.size))) != header:
        yield f"{name}: its header changed since it was written"
    found = {tensor.name: tensor for tensor in headers}
    expected = {tensor: entry for tensor, entry in manifest.tensors.items() if entry.file == name}
    same = {
        tensor: found[tensor]
        for tensor, entry in expected.items()
        if tensor in found and (found[tensor].dtype, found[tensor].shape) == (entry.dtype, entry.shape)
    }
    for tensor in expected.keys() - same.keys():
        yield f"{name}: tensor {tensor} is not the one that was written"
    for tensor, sha256 in tensor_sha256s(store, info.key, same.values()).items():
        if sha256 != expected[tensor].sha256:
            yield f"{name}: tensor {tensor} changed since it was written"
