"""What a run remembers, all of it in object storage: whose it is, what is done, and who drives it now.

A unit is done when its receipt is there and its shard is the receipt's; a point is done when its manifest is
there. Both are written once and never changed. Only the lease changes: it is moved by compare-and-swap, carries a
nonce (so that no two versions have the same bytes) and an epoch that only rises.
"""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from jobs.errors import BadInput, CorruptData, ObjectChanged, ObjectExists, ObjectMissing, RunBusy, StorageError
from jobs.records import sealed
from jobs.tasks import Receipt
from orchestrator.planning import Places
from workers.hashing import shard_sha256s
from workers.records import read_receipt, read_record
from workers.storage import ObjectInfo, Store, open_store

LEASE_SECONDS = 30.0
HEARTBEAT_SECONDS = 10.0
RELEASE_SECONDS = 5.0
"""How long an ending driver tries to give its lease back; if the store is away, the next one waits for it to expire."""

READS_AT_ONCE = 32


class Ledger:
    """The records of one run under its prefix."""

    def __init__(self, run_url: str, places: Places) -> None:
        self.store: Store = open_store(run_url)
        self._places = places

    def claim(self, job_text: str, plan: Mapping[str, Any]) -> None:
        """Writes job.yaml and plan.json, or finds that they were written by this very job; else `BadInput`.

        A run whose parents have changed since is refused too: its points would not be comparable.
        """
        try:
            self.store.write(self._places.record("plan.json"), sealed(plan, lines=True), mode="create")
        except ObjectExists:
            earlier = read_record(self.store, self._places.record("plan.json"))
            if earlier.get("digest") != plan["digest"]:
                raise BadInput(
                    f"{self.store.url}: this run belongs to another job, {_difference(earlier, plan)};"
                    " give the job another name, or remove that run"
                ) from None
        self.store.write(self._places.record("job.yaml"), job_text.encode())

    def trusted(self, units: Mapping[str, str]) -> dict[str, Receipt]:
        """The receipts of those of these units (unit to shard key) whose shard lies there whole, by unit.

        A receipt without its shard counts for nothing: the unit will be merged again, to the same bytes.
        """
        prefix = self._places.record("receipts/")
        listed = {info.key.rsplit("/", 1)[1].removesuffix(".json") for info in self.store.list(prefix)}
        shards = {info.key: info for info in self.store.list()} if listed else {}
        with ThreadPoolExecutor(READS_AT_ONCE, "receipts") as pool:
            receipts = list(pool.map(self._receipt, [unit for unit in units if unit in listed]))
        return {receipt.unit: receipt for receipt in receipts if self._is_whole(shards.get(receipt.key), receipt)}

    def _is_whole(self, shard: ObjectInfo | None, receipt: Receipt) -> bool:
        """Whether a shard is the one of this receipt; another version of it, a copy say, is hashed to know."""
        if shard is None or shard.size != receipt.size:
            return False
        if shard.etag == receipt.etag:
            return True
        with suppress(CorruptData):
            return shard_sha256s(self.store, shard) == receipt.tensors
        return False

    def _receipt(self, unit: str) -> Receipt:
        return read_receipt(self.store, self._places.receipt(unit))

    def forget(self) -> None:
        """Removes the records of a finished run whose output stands by itself."""
        for info in list(self.store.list(self._places.records)):
            self.store.delete(info.key)


def _difference(earlier: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What sets two plans apart, in a few words."""
    for name, parent in now["parents"].items():
        before = earlier["parents"].get(name)
        if before is not None and before != parent:
            return f"or its parent {name} has changed since"
    before_points = {entry["name"] for entry in earlier["points"]}
    points = {entry["name"] for entry in now["points"]}
    if before_points != points:
        return f"with {len(before_points)} points, {len(points - before_points)} of yours not among them"
    return "whose points of the same names are other merges"


class Lease:
    """The right to drive a run, held while in the `with` block and renewed by a thread.

    A second driver is refused with `RunBusy`. A dead driver's lease is taken over: at once if it ran on this machine,
    else when its nonce has not changed for the length of a lease on our own clock, so clocks need not agree.
    """

    def __init__(
        self, store: Store, key: str, *, seconds: float = LEASE_SECONDS, heartbeat: float = HEARTBEAT_SECONDS
    ) -> None:
        self._store = store
        self._key = key
        self._seconds = seconds
        self._heartbeat = heartbeat
        self._etag = ""
        self._name = secrets.token_hex(16)
        self._moves = 0
        self._epoch = 0
        self._stop = threading.Event()
        self._lost = threading.Event()
        self._moving = threading.Lock()
        self._thread = threading.Thread(target=self._renew_until_stopped, name="lease", daemon=True)

    def __enter__(self) -> Lease:
        self._acquire()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(RELEASE_SECONDS)

    @property
    def epoch(self) -> int:
        """How many drivers this run has had."""
        return self._epoch

    def check(self) -> None:
        """`RunBusy` when another driver has taken over meanwhile."""
        if self._lost.is_set():
            raise RunBusy(f"{self._store.url}: another driver took this run over; this one stops")

    def confirm(self) -> None:
        """`check`, after asking the store: a driver that slept may not have heard, and would replace newer files."""
        self._renew()
        self.check()

    def _acquire(self) -> None:
        try:
            self._epoch = 1
            self._etag = self._store.write(self._key, self._body(), mode="create").etag
            return
        except ObjectExists:
            pass
        holder, etag = self._held()
        if not (holder["released"] or _dead_here(holder)):
            self._wait_for_expiry(holder, etag)
        self._epoch = holder["epoch"] + 1
        try:
            self._etag = self._store.swap(self._key, self._body(), etag=etag).etag
        except ObjectChanged:
            raise RunBusy(f"{self._store.url}: another driver was faster; follow it with `mergeyard status`") from None

    def _held(self) -> tuple[Mapping[str, Any], str]:
        """What the lease says, and the version that says it; it may be renewed while one looks."""
        while True:
            info = self._store.locate(self._key)
            with suppress(ObjectChanged):
                return read_record(self._store, self._key, etag=info.etag), info.etag

    def _wait_for_expiry(self, holder: Mapping[str, Any], etag: str) -> None:
        deadline = time.monotonic() + holder["seconds"]
        while time.monotonic() < deadline:
            time.sleep(min(1.0, holder["seconds"] / 10))
            info = self._store.locate(self._key)
            if info.etag != etag:
                raise RunBusy(
                    f"{self._store.url}: already driven by process {holder['process']} on {holder['host']};"
                    " follow it with `mergeyard status`, or stop it first"
                )

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(self._heartbeat):
            self._renew()
            if self._lost.is_set():
                return
        self._renew(released=True)

    def _renew(self, *, released: bool = False) -> None:
        """Moves the lease on. While nobody else has moved it, it is ours, however long the store was away."""
        with self._moving:
            try:
                self._etag = self._store.swap(self._key, self._body(released=released), etag=self._etag).etag
            except (ObjectChanged, ObjectMissing):
                self._look_again()
            except StorageError:
                return

    def _look_again(self) -> None:
        """After a conflict: what lies there may be an earlier version of ours, whose answer never came."""
        try:
            info = self._store.locate(self._key)
            if read_record(self._store, self._key, etag=info.etag)["nonce"].startswith(self._name):
                self._etag = info.etag
            else:
                self._lost.set()
        except (ObjectChanged, ObjectMissing):
            self._lost.set()
        except (StorageError, CorruptData):
            return

    def _body(self, *, released: bool = False) -> bytes:
        self._moves += 1
        return sealed(
            {
                "epoch": self._epoch,
                "host": socket.gethostname(),
                "machine": _machine(),
                "process": os.getpid(),
                "process_started": _process_started(os.getpid()),
                "seconds": self._seconds,
                "nonce": f"{self._name}-{self._moves}",
                "released": released,
            },
            lines=True,
        )


def _machine() -> str:
    """Tells one boot of one machine from all others; a container counts as a machine of its own."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return f"{socket.gethostname()}-{os.uname().release}"


def _process_started(process: int) -> str | None:
    """When a process of this machine started, in clock ticks since boot (proc(5)); None when there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except OSError:
        return None


def _dead_here(holder: Mapping[str, Any]) -> bool:
    return holder["machine"] == _machine() and _process_started(holder["process"]) != holder["process_started"]
