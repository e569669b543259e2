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
from typing import Any, Literal, NamedTuple

from jobs.errors import CorruptData, ObjectChanged, ObjectExists, ObjectMissing, RunBusy, StorageError, StorageRefused
from jobs.sealing import sealed
from workers.storage import Store
from workers.storage.probing import broken_condition
from workers.storage.records import read_record

LEASE_SECONDS = 30.0
HEARTBEAT_SECONDS = 10.0
WATCH_SECONDS = 1.5 * HEARTBEAT_SECONDS
RELEASE_SECONDS = 5.0
"""How long an ending driver tries to give its lease back; one that the user stopped tries once. If the store is away,
the next driver waits for the lease to expire."""

ENDED = ("Z", "X")
PAUSED = ("T", "t")
"""States of a process in proc(5)."""


class Lease:
    """The right to drive a run, held while in the `with` block and renewed by a thread.

    A second driver is refused with `RunBusy`: at once if the first one is a living process of this machine. A dead
    driver's lease is taken over: at once if it ran on this machine, else when its nonce has not changed for the length
    of a lease on our own clock, so clocks need not agree.
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
        life = "dead" if holder["released"] else _life(holder)
        if life == "alive" and _is_fresh(holder):
            raise self._driven_by(holder)
        if life != "dead":
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
                raise self._driven_by(holder)

    def _driven_by(self, holder: Mapping[str, Any]) -> RunBusy:
        return RunBusy(
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
                "process_started": _process(os.getpid()).started,
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
    of an older version. Watches the lease for at most `WATCH_SECONDS`, and only if its last renewal is old and its
    process is paused or not one of this machine.
    """
    try:
        etag = store.locate(key).etag
        holder = read_record(store, key)
    except ObjectMissing:
        return None
    if holder["released"]:
        return None
    heard, life = _heard(holder), _life(holder)
    if life == "dead":
        state = "dead"
    else:
        state = "running" if life == "alive" or _is_fresh(holder) or _renewed(store, key, etag) else "silent"
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


def _heard(holder: Mapping[str, Any]) -> float | None:
    return time.time() - holder["renewed"] if "renewed" in holder else None


def _is_fresh(holder: Mapping[str, Any]) -> bool:
    heard = _heard(holder)
    return heard is not None and abs(heard) < holder["seconds"]


def _life(holder: Mapping[str, Any]) -> Literal["alive", "dead", "unknown"]:
    """Whether the process that holds a lease lives, if this machine can be sure of it.

    A paused process may sleep for ever, so it is "unknown". So is one of another machine, container or boot, and one of
    a system that does not show when a process started.
    """
    machine = _machine()
    if machine is None or holder.get("machine") != machine or holder.get("process_started") is None:
        return "unknown"
    found = _process(holder["process"])
    if found.started is None:
        return "unknown" if _exists(holder["process"]) else "dead"
    if found.started != holder["process_started"] or found.state in ENDED:
        return "dead"
    return "unknown" if found.state in PAUSED else "alive"


def _machine() -> str | None:
    """One boot of one machine and one namespace of processes: within it a number means one process at a time.

    None where the system does not show it, or where /proc is that of another namespace.
    """
    try:
        if str(Path("/proc/self").readlink()) != str(os.getpid()):
            return None
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


class _Process(NamedTuple):
    """A process of this machine: its state, and its start in clock ticks since boot (proc(5)); None if hidden."""

    state: str | None
    started: str | None


def _process(number: int) -> _Process:
    try:
        fields = Path(f"/proc/{number}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return _Process(None, None)
    return _Process(fields[0], fields[19])


def _exists(number: int) -> bool:
    """Whether a process has this number, also where /proc hides the processes of other users."""
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
