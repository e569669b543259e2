"""The records of a run and the lease to drive it, on real stores and between real processes."""

from __future__ import annotations

import itertools
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from jobs.errors import BadInput, CorruptData, ObjectMissing, RunBusy, StorageRefused, StorageUnavailable
from jobs.merge_tasks import Receipt
from jobs.sealing import sealed, unsealed
from orchestrator.records import lease as leases
from orchestrator.records.lease import Lease, driver_of
from orchestrator.records.ledger import Ledger
from orchestrator.records.places import Places
from workers.digests import digest_of
from workers.storage import Store, open_store
from workers.storage.memory import MemoryStore
from workers.storage.records import read_receipt

KEY = "lease.json"
ROOT = Path(__file__).parents[3]
numbers = itertools.count()


@pytest.fixture(params=["memory", "folder"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return open_store(f"memory://ledger-{next(numbers)}" if request.param == "memory" else tmp_path / "run")


def lease_of(store: Store, **changed: Any) -> dict[str, Any]:
    """What lies in the lease, after changing some of it as another driver would."""
    info = store.locate(KEY)
    lease = unsealed(bytes(store.read(KEY)))
    if changed:
        store.swap(KEY, sealed({**lease, **changed}), etag=info.etag)
    return {**lease, **changed}


def wait_until(condition: Any, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.02)


# ---- the lease


def test_drivers_follow_one_another_with_rising_epochs(store: Store):
    for epoch in (1, 2, 3):
        with Lease(store, KEY) as lease:
            assert lease.epoch == epoch
            assert lease_of(store)["released"] is False
            lease.check()
        assert lease_of(store)["released"] is True


def test_a_second_driver_on_this_machine_is_refused_at_once(store: Store):
    with Lease(store, KEY, heartbeat=600) as first:  # which renews nothing during this test
        started = time.monotonic()
        with pytest.raises(RunBusy) as refused, Lease(store, KEY):
            pass
        assert time.monotonic() - started < 15, "the lease runs for thirty seconds"
        assert refused.value.exit_code == 75
        line = str(refused.value)
        assert line.startswith(f"{store.url}: already driven by process ")
        assert line.endswith("follow it with `mergeyard status`, or stop it first")
        first.check()


def test_a_driver_that_slept_through_a_takeover_hears_of_it_when_it_asks(store: Store):
    with Lease(store, KEY, heartbeat=600) as lease:
        lease.confirm()
        lease_of(store, nonce="another driver's", epoch=2)
        lease.check()  # nobody has told it yet
        with pytest.raises(RunBusy, match="another driver took this run over; this one stops"):
            lease.confirm()
    assert lease_of(store)["nonce"] == "another driver's"


def test_a_driver_that_ended_is_followed_at_once(store: Store):
    with Lease(store, KEY):
        pass
    started = time.monotonic()
    with Lease(store, KEY):
        assert time.monotonic() - started < 15, "the lease runs for thirty seconds"


def test_every_version_of_the_lease_has_other_bytes(store: Store):
    seen: list[bytes] = []
    with Lease(store, KEY, seconds=5, heartbeat=0.02):
        wait_until(lambda: seen.append(bytes(store.read(KEY))) or len(set(seen)) >= 4)


@pytest.fixture
def killed_driver(tmp_path: Path) -> Iterator[Store]:
    """A store whose lease was held by a process of this machine that was killed."""
    script = (
        "import sys, time; from orchestrator.records.lease import Lease; from workers.storage import open_store\n"
        "lease = Lease(open_store(sys.argv[1]), 'lease.json'); lease.__enter__(); print('held', flush=True)\n"
        "time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
    yield open_store(tmp_path / "run")


def test_a_dead_drivers_lease_on_this_machine_is_taken_over_at_once(killed_driver: Store):
    assert lease_of(killed_driver)["released"] is False
    started = time.monotonic()
    with Lease(killed_driver, KEY) as lease:
        assert time.monotonic() - started < 15, "the lease runs for thirty seconds"
        assert lease.epoch == 2


def test_a_process_that_got_the_dead_drivers_number_is_not_taken_for_it(killed_driver: Store):
    lease_of(killed_driver, process=os.getpid())  # alive, but started at another time
    with Lease(killed_driver, KEY) as lease:
        assert lease.epoch == 2


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process of this machine that sleeps."""
    with subprocess.Popen(["sleep", "600"]) as process:
        yield process
        process.kill()


def held_by(store: Store, process: int, **changed: Any) -> None:
    """Writes the lease of a driver that is this process and renewed it just now."""
    with Lease(store, KEY):
        pass
    _, started = leases._process(process)
    held = {"released": False, "epoch": 1, "process": process, "process_started": started, "renewed": time.time()}
    lease_of(store, **held | changed)


def seconds_to_take_over(store: Store) -> float:
    started = time.monotonic()
    with Lease(store, KEY) as taken:
        assert taken.epoch == 2
        return time.monotonic() - started


@pytest.mark.parametrize(
    "changed",
    [
        {"renewed": 0},  # it lives, but something keeps it from renewing
        {"machine": None},  # of a system that does not show which boot this is
        {"machine": "the same boot, other namespace"},
        {"process_started": None},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_living_process_that_may_not_hold_the_lease_any_more_is_waited_for(
    store: Store, sleeper: subprocess.Popen[bytes], changed: dict[str, Any]
):
    held_by(store, sleeper.pid, seconds=0.4, **changed)
    assert 0.4 <= seconds_to_take_over(store) < 15


def test_a_paused_process_is_waited_for_and_one_that_was_killed_is_not(store: Store, sleeper: subprocess.Popen[bytes]):
    sleeper.send_signal(signal.SIGSTOP)
    wait_until(lambda: leases._process(sleeper.pid).state == "T")
    held_by(store, sleeper.pid, seconds=0.4)
    assert seconds_to_take_over(store) >= 0.4
    sleeper.kill()
    wait_until(lambda: leases._process(sleeper.pid).state == "Z")  # until its parent has asked for its exit code
    held_by(store, sleeper.pid, seconds=30)
    assert seconds_to_take_over(store) < 15


@pytest.mark.parametrize(("exists", "least", "most"), [(True, 0.4, 15), (False, 0, 15)])
def test_a_process_hidden_by_the_system_is_waited_for_if_its_number_is_in_use(
    store: Store, monkeypatch: pytest.MonkeyPatch, exists: bool, least: float, most: float
):
    held_by(store, 1, seconds=0.4 if exists else 30)
    monkeypatch.setattr(leases, "_process", lambda number: leases._Process(None, None))

    def kill(number: int, signal: int) -> None:
        raise PermissionError if exists else ProcessLookupError

    monkeypatch.setattr(os, "kill", kill)
    assert least <= seconds_to_take_over(store) < most


def test_a_silent_driver_elsewhere_is_waited_for_then_replaced(store: Store):
    with Lease(store, KEY):
        pass
    lease_of(store, released=False, machine="elsewhere", seconds=0.6)
    started = time.monotonic()
    with Lease(store, KEY) as lease:
        assert 0.6 <= time.monotonic() - started < 15
        assert lease.epoch == 2


def test_a_living_driver_elsewhere_is_left_alone(store: Store):
    with Lease(store, KEY):
        pass
    lease_of(store, released=False, machine="elsewhere", host="other", process=4, seconds=5.0)
    heart = threading.Timer(0.3, lambda: lease_of(store, nonce="another"))
    heart.start()
    with pytest.raises(RunBusy, match="already driven by process 4 on other"), Lease(store, KEY):
        pass
    heart.join()


def test_a_driver_that_was_replaced_learns_it_and_gives_nothing_back(store: Store):
    with Lease(store, KEY, seconds=5, heartbeat=0.05) as lease:
        info = store.locate(KEY)
        other = {**unsealed(bytes(store.read(KEY))), "epoch": 2, "nonce": "another"}
        while True:
            try:
                store.swap(KEY, sealed(other), etag=info.etag)
                break
            except Exception:
                info = store.locate(KEY)
        wait_until(lambda: _is_lost(lease))
        with pytest.raises(RunBusy, match="another driver took this run over; this one stops"):
            lease.check()
    assert lease_of(store) == other


def _is_lost(lease: Lease) -> bool:
    try:
        lease.check()
    except RunBusy:
        return True
    return False


def test_a_driver_elsewhere_that_no_longer_renews_is_silent_and_one_that_does_is_running(
    store: Store, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("orchestrator.records.lease.WATCH_SECONDS", 0.6)
    assert driver_of(store, KEY) is None
    with Lease(store, KEY, lambda: {"stage": "merging"}):
        assert (driver_of(store, KEY) or {})["state"] == "running"
        assert (driver_of(store, KEY) or {})["progress"] == {"stage": "merging"}
    assert driver_of(store, KEY) is None
    lease_of(store, released=False, machine="elsewhere", host="other", process=4)
    assert (driver_of(store, KEY) or {})["state"] == "running", "renewed a moment ago"
    lease_of(store, renewed=time.time() - 300, nonce="2")
    found = driver_of(store, KEY) or {}
    assert (found["state"], found["host"], round(found["heard"])) == ("silent", "other", 300)
    monkeypatch.setattr("orchestrator.records.lease.WATCH_SECONDS", 30)
    heart = threading.Timer(0.1, lambda: lease_of(store, nonce="3"))
    heart.start()
    assert (driver_of(store, KEY) or {})["state"] == "running", "its clock is behind, but it renews"
    heart.join()


def test_a_killed_driver_of_this_machine_is_dead(killed_driver: Store):
    assert (driver_of(killed_driver, KEY) or {})["state"] == "dead"


# ---- the records


def plan(digest: str = "d", points: tuple[str, ...] = ("p",), **parents: str) -> dict[str, Any]:
    return {
        "digest": digest,
        "parents": {name: {"url": url} for name, url in parents.items()},
        "points": [{"name": name, "digest": f"{digest} {name}"} for name in points],
    }


REVISED = {"revisions": {"arcee_fusion": 1}}


def test_a_run_is_claimed_by_its_first_job_and_again_by_the_same(store: Store):
    ledger = Ledger(store.url, Places())
    ledger.claim("text", plan())
    ledger.claim("text", plan())
    assert unsealed(bytes(store.read("plan.json"))) == plan()
    assert bytes(store.read("job.yaml")).endswith(b"\ntext")


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (plan("e", ("p", "q")), "with 1 points, 1 of yours not among them;"),
        (plan("e", ("p",), a="s3://moved"), "or its parent a has changed since;"),
        (plan("e", ("p",), a="s3://here"), "whose points of the same names are other merges;"),
        (plan("e", ("p",)) | REVISED, "or a version began it whose arcee_fusion has other last bits;"),
        (plan("e", ()) | REVISED, "or a version began it whose arcee_fusion has other last bits;"),
        (plan("e", ()), "with another search, recipe or evaluation;"),
    ],
)
def test_a_run_of_another_job_is_refused_with_the_difference(store: Store, other: dict[str, Any], difference: str):
    ledger = Ledger(store.url, Places())
    ledger.claim("text", plan(a="s3://here"))
    before = {info.key: info.etag for info in store.list()}
    with pytest.raises(BadInput) as refused:
        ledger.claim("other text", other)
    assert str(refused.value) == (
        f"{store.url}: this run belongs to another job, {difference} give the job another name, or remove that run"
    )
    assert {info.key: info.etag for info in store.list()} == before


def shard(store: Store, unit: str, value: float = 1.0, *, told: float | None = None, like: str = "blake3:") -> str:
    """Writes a shard of one tensor and a receipt that tells of it, or of a tensor of another value; the shard's key."""
    key = f"points/p/{unit}.safetensors"
    info = store.write(key, save({"x": torch.full((2,), value)}))
    digest = digest_of(struct.pack("<2f", *[value if told is None else told] * 2), like=like)
    receipt = Receipt(unit, "p", key, info.size, info.etag, {"x": digest}, (), 1, 0.1, "host:1")
    store.write(Places().receipt(unit), receipt.to_json())
    return key


def test_receipts_are_trusted_when_their_shard_lies_there_whole(store: Store):
    units = {unit: shard(store, unit) for unit in ("aa", "ab", "ba", "zz")}
    store.write(units["ab"], bytes(store.read(units["ab"]))[:-1])
    store.delete(units["ba"])
    del units["zz"]
    units["cc"] = "points/p/cc.safetensors"
    before = {info.key for info in store.list()}
    assert Ledger(store.url, Places()).trusted(units).keys() == {"aa"}
    assert {info.key for info in store.list()} == before, "looking changes nothing"


@pytest.mark.parametrize("like", ["", "blake3:"], ids=["of an older version", "of this version"])
def test_another_version_of_a_shard_is_trusted_only_if_it_has_the_receipts_bytes(store: Store, like: str):
    units = {unit: shard(store, unit, like=like) for unit in ("aa", "ab", "ac")}
    store.write(units["aa"], bytes(store.read(units["aa"])))  # a copy, say
    store.write(units["ab"], save({"x": torch.full((2,), 5.0)}))  # a worker of bad memory came late
    store.write(units["ac"], bytes(info_size := store.locate(units["ac"]).size))
    assert info_size == store.locate(units["ac"]).size
    assert Ledger(store.url, Places()).trusted(units).keys() == {"aa"}


class Flipping:
    """A store of which the first read of each object comes with one bit flipped; the rest is the real one."""

    def __init__(self, store: Store, *, always: bool = False) -> None:
        self._store, self._always, self._struck = store, always, set[str]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def read(self, key: str, **how: Any) -> bytes:
        data = bytearray(self._store.read(key, **how))
        if self._always or key not in self._struck:
            self._struck.add(key)
            data[len(data) // 2] ^= 1
        return bytes(data)


def test_a_record_that_comes_damaged_is_read_again(store: Store):
    ledger, units = Ledger(store.url, Places()), {"aa": shard(store, "aa")}
    ledger.claim("text", plan())
    ledger.store = Flipping(store)  # type: ignore[assignment]
    ledger.claim("text", plan())
    assert ledger.trusted(units).keys() == {"aa"}


@pytest.mark.parametrize("bit", range(8))
def test_a_damaged_receipt_is_removed_and_counts_for_nothing(store: Store, bit: int):
    key = Places().receipt("aa")
    shard(store, "aa")
    whole = bytes(store.read(key))
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bit
        store.write(key, damaged)
        with pytest.raises(CorruptData, match=r"receipts/aa/aa\.json: damaged.*; remove it and run again"):
            read_receipt(store, key)
        assert Ledger(store.url, Places()).trusted({"aa": "points/p/aa.safetensors"}) == {}
        with pytest.raises(ObjectMissing):
            store.locate(key)


# ---- stores that break their promises


class Careless(MemoryStore):
    """A store that reads no conditions."""

    def write(self, key: str, data: Any, *, mode: str = "overwrite") -> Any:
        return super().write(key, data)


def test_a_store_without_conditional_writes_is_refused_and_left_empty():
    store = Careless("memory://careless")
    with pytest.raises(StorageRefused, match="this store ignores If-None-Match") as refusal, Lease(store, KEY):
        pass
    assert refusal.value.exit_code == 2
    assert list(store.list()) == []


def test_a_driver_that_is_refused_leaves_the_lease_of_the_other_as_it_is(store: Store):
    with Lease(store, KEY, seconds=1.0, heartbeat=0.05):
        held = lease_of(store)
        with pytest.raises(RunBusy), Lease(store, KEY):
            pass
        assert lease_of(store)["nonce"].partition("-")[0] == held["nonce"].partition("-")[0]


def test_a_listing_without_the_plan_is_not_believed(store: Store, monkeypatch: pytest.MonkeyPatch):
    ledger = Ledger(store.url, Places())
    ledger.claim("job", {"digest": "d", "parents": {}, "points": []})
    unit = "ab" * 32
    store.write(Places().receipt(unit), b"{}")
    listed = [info for info in store.list() if info.key != "plan.json"]
    monkeypatch.setattr(ledger, "store", store)
    monkeypatch.setattr(type(store), "list", lambda self, prefix="": iter(listed))
    with pytest.raises(StorageUnavailable, match="leaves out plan"):
        ledger.trusted({unit: "points/a/model.safetensors"})
