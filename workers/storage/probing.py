"""Questions to a store about its promises. A store that breaks one silently lets two drivers share a run."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Generator
from dataclasses import dataclass

from jobs.errors import (
    BucketMissing,
    CorruptData,
    MergeyardError,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
    StorageUnavailable,
)
from workers.storage import Store, open_store

NO_VERSION = f'"{"0" * 32}"'
"""The form of an ETag, and that of no object."""

LARGE = 17 << 20
"""Bytes of an upload in two parts."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One promise and, if the store breaks it, how."""

    promise: str
    trouble: str | None


def settings(url: str) -> dict[str, str]:
    """The settings of a store that has any, in words and without secrets; nothing is asked of the service."""
    if not url.lower().startswith("s3://"):
        return {}
    from workers.storage.s3_settings import S3Settings

    return S3Settings.resolved(url[len("s3://") :].partition("/")[0]).document()


def broken_condition(store: Store, key: str, content: Callable[[], bytes]) -> str | None:
    """The condition that the store does not keep when it writes, None if it keeps both; `key` has to be there.

    Two small requests, both of which a store with conditional writes refuses. `content` gives other bytes at each call.
    """
    try:
        store.write(key, content(), mode="create")
        return "If-None-Match"
    except ObjectExists:
        pass
    try:
        store.swap(key, content(), etag=NO_VERSION)
        return "If-Match"
    except ObjectChanged:
        return None


def probe(url: str) -> list[Finding]:
    """Tries every kind of request that a run sends, under fresh keys, and deletes them again.

    A refusal is a finding, and ends the requests that need what was refused. Raises `StorageUnavailable`.
    """
    store = open_store(url)
    folder = f"mergeyard-check-{secrets.token_hex(8)}"
    findings: list[Finding] = []
    written: list[str] = []
    try:
        for promise, step in _steps(store, folder, written):
            try:
                step()
            except StorageUnavailable:
                raise
            except MergeyardError as error:
                findings.append(Finding(promise, str(error)))
                if promise == WRITES or isinstance(error, BucketMissing):
                    break  # some services make a missing bucket at the first write
            else:
                findings.append(Finding(promise, None))
    finally:
        findings += _removed(store, written)
    return findings


WRITES = "writes a small object and reads it back"


def _steps(store: Store, folder: str, written: list[str]) -> Generator[tuple[str, Callable[[], None]]]:
    small, large = f"{folder}/small", f"{folder}/large"
    numbers = itertools.count()

    def content() -> bytes:
        return b"%d" % next(numbers)

    def writes() -> None:
        store.write(small, b"mergeyard")
        written.append(small)
        _check(bytes(store.read(small)) == b"mergeyard", "other bytes came back")

    def replaces() -> None:
        store.swap(small, b"replaced", etag=store.locate(small).etag)
        _check(bytes(store.read(small)) == b"replaced", "the earlier bytes came back")

    def conditions() -> None:
        broken = broken_condition(store, small, content)
        _check(broken is None, f"it ignores {broken} and writes: two drivers could share a run")

    def uploads() -> None:
        with store.upload(large) as upload:
            upload.write(bytes(LARGE))
            upload.commit()
        written.append(large)
        _check(len(bytes(store.read(large, start=LARGE - 10, length=10))) == 10, "a range came back short")

    def lists() -> None:
        found = sorted(info.key for info in store.list(f"{folder}/"))
        _check(found == sorted(written), f"{len(found)} of {len(written)} objects are listed")

    yield "lists the folder", lambda: _first_of(store)
    yield WRITES, writes
    yield "replaces an object whose version is given", replaces
    yield "refuses to create an object that is there, and to replace another version", conditions
    yield "takes an upload in parts, and reads a range of it", uploads
    yield "lists new objects at once, and all of them", lists
    yield (
        "looks for uploads that were left open",
        lambda: _check(store.sweep(f"{folder}/") == 0, "it finds unknown ones"),
    )


def _first_of(store: Store) -> None:
    next(iter(store.list()), None)


def _removed(store: Store, written: list[str]) -> list[Finding]:
    """Deletes what was written; a finding only where something was."""
    trouble: list[str] = []
    for key in written:
        try:
            store.delete(key)
            store.locate(key)
            trouble.append(f"{key} is still there")
        except ObjectMissing:
            pass
        except MergeyardError as error:
            trouble.append(f"{error}; {key} stays")
    return [Finding("deletes", "; ".join(trouble) or None)] if written else []


def _check(good: bool, trouble: str) -> None:
    if not good:
        raise CorruptData(trouble)
