"""The lease of a run: one driver at a time, renewed by compare-and-swap."""

from __future__ import annotations

import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from jobs.errors import CorruptData, ObjectChanged, ObjectExists, ObjectMissing, RunBusy, StorageError, StorageRefused
from jobs.sealing import sealed
from workers.storage import Store
from workers.storage.probing import broken_condition
from workers.storage.records import read_record

LEASE_SECONDS = 30.0
HEARTBEAT_SECONDS = 10.0
WATCH_SECONDS = 1.5 * HEARTBEAT_SECONDS
RELEASE_SECONDS = 5.0
"""How long an ending driver tries to give its lease back; if the store is away, the next one waits for it to expire."""


class Lease:
    """The right to drive a run, held while in the `with` block and renewed by a thread.

    A second driver is refused with `RunBusy`. A dead driver's lease is taken over: at once if it ran on this machine,
    else when its nonce has not changed for the length of a lease on our own clock, so clocks need not agree.
    Each renewal carries the driver's `progress`, for `mergeyard status`.
    """

    def __init__(
        self,
        store: Store,
        key: str,
        progress: Callable[[], Mapping[str, Any]] = dict,
        *,
        seconds: float = LEASE_SECONDS,
        heartbeat: float = HEARTBEAT_SECONDS,
    ) -> None:
        self._store = store
        self._key = key
        self._progress = progress
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
        except ObjectExists:
            self._check_conditions()
        else:
            self._check_conditions()
            return
        holder, etag = self._held()
        if not (holder["released"] or _dead_here(holder)):
            self._wait_for_expiry(holder, etag)
        self._epoch = holder["epoch"] + 1
        try:
            self._etag = self._store.swap(self._key, self._body(), etag=etag).etag
        except ObjectChanged:
            raise RunBusy(f"{self._store.url}: another driver was faster; follow it with `mergeyard status`") from None

    def _check_conditions(self) -> None:
        """`StorageRefused` where a lease excludes nobody; asked once by every driver, before any other write."""
        broken = broken_condition(self._store, self._key, self._body)
        if broken is not None:
            self._store.delete(self._key)
            raise StorageRefused(
                f"{self._store.url}: this store ignores {broken}, so two drivers could share the run;"
                " give an `output:` on another, which `mergeyard check` tries"
            )

    def _held(self) -> tuple[Mapping[str, Any], str]:
        """The lease and its version; it may be renewed during the read."""
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
        """Renews the lease. As long as no other driver has changed it, it is ours, however long the store was away."""
        with self._moving:
            try:
                self._etag = self._store.swap(self._key, self._body(released=released), etag=self._etag).etag
            except (ObjectChanged, ObjectMissing):
                self._look_again()
            except StorageError:
                return

    def _look_again(self) -> None:
        """After a conflict: the object may be an earlier write of ours whose answer never came."""
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
                "renewed": time.time(),
                "progress": dict(self._progress()),
            },
            lines=True,
        )


def driver_of(store: Store, key: str) -> dict[str, Any] | None:
    """The driver that holds the lease, with its `progress`; None if the lease was never taken or was given back.

    `state` is "running", "dead" (its process on this machine has ended) or "silent" (it did not renew the lease while
    we watched). `heard` is the number of seconds since the last renewal by the two machines' clocks, None for a driver
    of an older version. Watches the lease for at most `WATCH_SECONDS`, and only if its last renewal is old.
    """
    try:
        etag = store.locate(key).etag
        holder = read_record(store, key)
    except ObjectMissing:
        return None
    if holder["released"]:
        return None
    heard = time.time() - holder["renewed"] if "renewed" in holder else None
    if holder["machine"] == _machine():
        state = "dead" if _dead_here(holder) else "running"
    elif heard is not None and abs(heard) < holder["seconds"]:
        state = "running"
    else:
        state = "running" if _renewed(store, key, etag) else "silent"
    return {
        "host": holder["host"],
        "process": holder["process"],
        "epoch": holder["epoch"],
        "state": state,
        "heard": None if heard is None else round(heard, 1),
        "progress": holder.get("progress", {}),
    }


def _renewed(store: Store, key: str, etag: str) -> bool:
    """Whether the lease changes within `WATCH_SECONDS`."""
    deadline = time.monotonic() + WATCH_SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.5)
        if store.locate(key).etag != etag:
            return True
    return False


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
