"""Verifying: every byte of a point against its manifest, every record of a run against its own digest."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from jobs.errors import CorruptData, MergeyardError, ObjectMissing
from jobs.manifest import Manifest
from jobs.sealing import is_sealed, unsealed
from workers.checkpoints.hashing import changed_tensors
from workers.checkpoints.safetensors import header_bytes, read_header
from workers.digests import weights_digest
from workers.storage import Store, open_store
from workers.storage.records import read_record

RECORD = re.compile(
    r"(?!(.*/)?points/)(.*/)?(plan\.json|lease\.json|job\.yaml|blessed\.json|index\.html|(history|blessings)/\d{6}\.json|receipts/../\w+\.json"
    r"|items/\w+/\d{6,}-\d{6,}\.(json|parquet)|scores/[^/]+/[^/]+-\d{6,}-\d{6,}\.parquet|gate/[^/]+\.json"
    r"|report/(results\.parquet|evaluation\.json|index\.html))"
)
"""The files that carry their own digest, in a run or in the folder of a nightly job."""

ALWAYS_SEALED = re.compile(r"(.*/)?(plan\.json|lease\.json|receipts/.+)")
"""Those that have a digest in every version."""

READS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class Check:
    """The check of one point; without problems it agrees with its manifest."""

    point: str
    problems: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RecordCheck:
    """The check of one record of a run; `sealed` is False where an older version wrote it without a digest."""

    record: str
    sealed: bool
    problems: tuple[str, ...] = ()


def verify(url: str) -> tuple[list[Check], list[RecordCheck]]:
    """Hashes every file of every point under `url` (a run, a point, or a merged folder) again, and every record there.

    `ObjectMissing` where there is neither.
    """
    store = open_store(url)
    listed = sorted(info.key for info in store.list())
    prefixes = [key.removesuffix("manifest.json") for key in listed if key.split("/")[-1] == "manifest.json"]
    records = [key for key in listed if RECORD.fullmatch(key) and "" not in prefixes]
    if not prefixes and not records:
        raise ObjectMissing(f"{url}: no manifest.json there; is the run complete? see `mergeyard status`")
    with ThreadPoolExecutor(READS_AT_ONCE, "records") as pool:
        checks = [check for check in pool.map(partial(_verify_record, store), records) if check is not None]
    return [_verify(store, prefix) for prefix in prefixes], checks


def _verify_record(store: Store, key: str) -> RecordCheck | None:
    """The check of a record; None where a running evaluation has removed it meanwhile."""

    def sealed(data: bytes) -> bool:
        if ALWAYS_SEALED.fullmatch(key):
            unsealed(data)
        return is_sealed(data, key)

    try:
        return RecordCheck(key, read_record(store, key, sealed))
    except ObjectMissing:
        return None
    except CorruptData as error:
        return RecordCheck(key, sealed=True, problems=(str(error),))


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
        recorded = weights_digest({name: entry.digest for name, entry in manifest.tensors.items()})
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
    digests = {tensor: entry.digest for tensor, entry in expected.items()}
    for tensor in changed_tensors(store, info.key, same.values(), digests):
        yield f"{name}: tensor {tensor} changed since it was written"
