"""A `MemoryStore` as one process sees it over a bad network: slow, cut off, answers lost; and the eye on every change.

An operation takes time before it has its effect and time after it. The process may die in either, and with a lost
answer the caller cannot know whether there was an effect.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

from typing_extensions import Buffer

from jobs.errors import MergeyardError, StorageUnavailable
from tests.simulation.world import Died, Process
from workers.storage import ObjectInfo
from workers.storage.memory import MemoryStore

Result = TypeVar("Result")
Seen = Callable[[Process, str, str], None]
"""Called with the process, the operation and the key as soon as a change is visible to all."""


class FaultyStore:
    """The store that `inner` is to one process."""

    def __init__(self, inner: MemoryStore, process: Process, seen: Seen) -> None:
        self._inner, self._process, self._seen = inner, process, seen
        self.url = inner.url
        self.pinned_url = inner.pinned_url

    def locate(self, key: str) -> ObjectInfo:
        return self._do("locate", key, lambda: self._inner.locate(key))

    def read(self, key: str, *, start: int = 0, length: int | None = None, etag: str | None = None) -> Buffer:
        data = self._do("read", key, lambda: self._inner.read(key, start=start, length=length, etag=etag))
        if key == "lease.json" and self._process.epoch is not None:
            self._process.knows_that_it_was_replaced |= json.loads(bytes(data))["epoch"] != self._process.epoch
        return data

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        return self._do("list", prefix, lambda: self._inner.list(prefix))

    def write(self, key: str, data: Buffer, *, mode: Literal["create", "overwrite"] = "overwrite") -> ObjectInfo:
        return self._do("write", key, lambda: self._inner.write(key, data, mode=mode))

    def swap(self, key: str, data: Buffer, *, etag: str) -> ObjectInfo:
        return self._do("swap", key, lambda: self._inner.swap(key, data, etag=etag))

    def delete(self, key: str) -> None:
        self._do("delete", key, lambda: self._inner.delete(key))

    def sweep(self, prefix: str = "") -> int:
        return self._do("sweep", prefix, lambda: self._inner.sweep(prefix))

    def upload(self, key: str, *, mode: Literal["create", "overwrite"] = "overwrite") -> FaultyUpload:
        return FaultyUpload(self._do, self._inner.upload(key, mode=mode))

    def free_bytes(self) -> int | None:
        return None

    def _do(self, operation: str, key: str, action: Callable[[], Result]) -> Result:
        world, process = self._process.world, self._process
        random = world.random.random
        if not process.alive:
            raise Died
        world.sleep(self._latency())
        process.count_step()
        lost = random() < process.loss_rate
        if process.cut_off[0] <= world.now < process.cut_off[1] or (lost and random() < 0.5):
            world.count("request lost")
            raise StorageUnavailable(f"{self.url}/{key}: no answer; run again later")
        try:
            result, failure = action(), None
        except MergeyardError as error:
            result, failure = None, error
        else:
            self._seen(process, operation, key)
        world.sleep(self._latency())
        process.count_step()
        if lost:
            world.count(f"answer lost: {operation}")
            raise StorageUnavailable(f"{self.url}/{key}: no answer; run again later")
        if failure is not None:
            raise failure
        return result  # pyright: ignore[reportReturnType]

    def _latency(self) -> float:
        """Mostly milliseconds, sometimes seconds; rarely so long that others have given the process up."""
        random = self._process.world.random.random
        kind = random()
        if kind < 0.97:
            return 0.05 * random()
        return 5 * random() if kind < 0.995 else 90 * random()


class FaultyUpload:
    """An upload through a `FaultyStore`."""

    def __init__(self, do: Callable[..., Any], inner: Any) -> None:
        self._do, self._inner = do, inner
        self.write = inner.write

    def commit(self) -> ObjectInfo:
        return self._do("commit", self._inner.key, self._inner.commit)

    def abort(self) -> None:
        """By a living process; what a dead one began stays until it is swept."""
        if self._do.__self__._process.alive:
            self._inner.abort()

    def __enter__(self) -> FaultyUpload:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()
