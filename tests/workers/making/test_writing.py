"""Files of made tensors: written side by side, and given up together."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest

from workers.checkpoints.safetensors import read_header
from workers.digests import digest_of
from workers.making.writing import Made, write_files
from workers.storage import open_store


def test_files_hold_their_tensors_and_entries_their_digests():
    store, progress = open_store("memory://made"), list[int]()
    arrays = {f"t{n}": np.arange(3 * n, dtype=np.float32) for n in range(7)}

    def pieces(array: np.ndarray) -> Iterator[memoryview]:
        place = np.empty(2, np.float32)  # each piece overwrites the one before
        for start in range(0, len(array), 2):
            place[: len(array) - start] = array[start : start + 2]
            yield place[: len(array) - start].view("u1").data

    made = [Made(name, "F32", array.shape, lambda array=array: pieces(array)) for name, array in arrays.items()]
    files = {f"{n}.safetensors": made[n::3] for n in range(3)}
    shards, entries = write_files(store, files, progress.append)
    assert list(shards) == list(files) and sum(progress) == sum(array.nbytes for array in arrays.values())
    for key, part in files.items():
        info = store.locate(key)
        assert shards[key].size == info.size
        for tensor in read_header(store, info):
            data = store.read(key, start=tensor.start, length=tensor.end - tensor.start)
            assert bytes(data) == arrays[tensor.name].tobytes()
            assert (entries[tensor.name].file, entries[tensor.name].digest) == (key, digest_of(data))
        assert {tensor.name for tensor in part} == {tensor.name for tensor in read_header(store, info)}


def test_an_error_ends_the_other_files_too():
    store, begun = open_store("memory://failed"), threading.Event()

    def long() -> Iterator[bytes]:
        begun.set()
        for _ in range(1000):
            time.sleep(0.01)
            yield bytes(4)

    def fails() -> Iterator[bytes]:
        begun.wait(10)
        raise ValueError("this one")

    files = {
        "long": [Made("a", "F32", (1000,), long)],
        "fails": [Made("b", "F32", (1,), fails)],
        "later": [Made("c", "F32", (1000,), long)],
    }
    started = time.monotonic()
    with pytest.raises(ValueError, match="this one"):
        write_files(store, files, lambda amount: None)
    assert time.monotonic() - started < 5 and not list(store.list())
