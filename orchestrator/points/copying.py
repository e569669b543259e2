"""Copying a verified point to a folder or a bucket, its manifest last."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from jobs.errors import BadInput, CorruptData, writing
from jobs.manifest import Manifest
from orchestrator.points.finding import MANIFEST, FoundPoint, check_files
from orchestrator.points.verifying import file_problems
from orchestrator.words import size
from workers.storage import Store, open_store

CHUNK_BYTES = 16 << 20


# ---- to a folder or a bucket


def copy_point(point: FoundPoint, url: str, say: Callable[[str], None]) -> dict[str, Any]:
    """The same bytes elsewhere; goes on where an earlier copy stopped. `BadInput` where something else lies.

    `say` gets a line for each thing that takes its time.
    """
    check_files(point, say)
    target, files = open_store(url), point.manifest.files
    there = {info.key for info in target.list()}
    manifest = bytes(point.store.read(f"{point.prefix}{MANIFEST}"))
    if MANIFEST in there and bytes(target.read(MANIFEST)) != manifest:
        raise BadInput(f"{target.url}: another point lies there; choose another folder")
    if strangers := sorted(there - files.keys() - {MANIFEST}):
        raise BadInput(f"{target.url}: not empty, it holds {strangers[0]}; choose another folder")
    problems = {name: file_problem(target, "", name, point.manifest) for name in files if name in there}
    foreign = next((problem for problem in problems.values() if problem is not None), None)
    if foreign is not None and MANIFEST not in there:  # files come whole: this one is not ours to replace
        raise BadInput(f"{target.url}: holds something else, {foreign}; choose another folder")
    sent = 0
    target.check_writable()
    with writing():
        for name in files:
            if name in problems and problems[name] is None:
                continue
            say(f"sending {name}, {size(files[name].size)}")
            sent += copy_file(point.store, f"{point.prefix}{name}", target, name)
            if damage := file_problem(target, "", name, point.manifest):
                raise CorruptData(f"{target.url}: arrived damaged: {damage}; publish again")
        if MANIFEST not in there:
            target.write(MANIFEST, manifest)  # last: readers take its presence for the whole
    return publishing_facts(point, target.url, sent)


def file_problem(store: Store, prefix: str, name: str, manifest: Manifest) -> str | None:
    """The fault of a file; None if there is none."""
    try:
        return next(file_problems(store, prefix, name, manifest), None)
    except CorruptData as error:
        return str(error)


def copy_file(store: Store, key: str, target: Store, name: str) -> int:
    """How many bytes were copied, piece by piece."""
    info = store.locate(key)
    with target.upload(name) as upload:
        for piece in read_pieces(store, key):
            upload.write(piece)
        upload.commit()
    return info.size


def read_pieces(store: Store, key: str) -> Iterator[memoryview]:
    """The object in pieces, each good until the next is asked for."""
    info, buffer = store.locate(key), memoryview(bytearray(CHUNK_BYTES))
    for start in range(0, info.size, CHUNK_BYTES):
        piece = buffer[: min(CHUNK_BYTES, info.size - start)]
        store.read_into(key, piece, start=start, etag=info.etag)
        yield piece


def publishing_facts(point: FoundPoint, url: str, sent: int) -> dict[str, Any]:
    return {
        "point": point.name,
        "same_as": None if point.name == point.manifest.point else point.manifest.point,
        "url": url,
        "weights": point.manifest.weights,
        "files": len(point.manifest.files) + 1,
        "bytes_sent": sent,
    }
