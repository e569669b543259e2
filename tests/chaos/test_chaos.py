"""A grid on several nodes comes to the same bytes, whatever happens to them. `make chaos` tries and prints far more."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.chaos.__main__ import strike
from tests.chaos.cluster import started
from tests.chaos.faults import FAULTS, Fault, requests
from tests.chaos.faulty_cluster import FaultyCluster, Wrong
from tests.chaos.network import why_not

pytestmark = [pytest.mark.heavy, pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are namespaces")]

REISSUED_SECONDS = 20.0
LOST = (
    "node killed",
    "link cut for good",
    "parted from the head, not from the store",
    "node frozen; thawed, it writes what others did",
)
ALSO = (
    "driver paused beyond its lease, thawed beside the next",
    "disk of the output full, then with room again",
    "ETag of a parent changed in mid-read",
    "a bit flipped in 3 reads of receipts",
    "answer to a complete lost, upload forgotten",
    "evaluation: link cut for good",
)


@pytest.fixture(scope="module")
def yard() -> Iterator[FaultyCluster]:
    with started(2, megabits=10) as cluster:
        yard = FaultyCluster(cluster, seed=0)
        yield yard
        yard.close()


@pytest.fixture(autouse=True)
def repaired(yard: FaultyCluster) -> None:
    yard.cluster.repair()


def named(*names: str) -> list[Fault]:
    """The faults of these names."""
    faults = [fault for fault in FAULTS if fault.name in names]
    assert len(faults) == len(names)
    return faults


@pytest.mark.parametrize("fault", named(*LOST), ids=lambda fault: fault.name)
def test_a_lost_node_costs_twenty_seconds_and_no_byte(yard: FaultyCluster, fault: Fault) -> None:
    assert strike(yard, yard.trial(fault.work), fault).again < REISSUED_SECONDS


@pytest.mark.parametrize("fault", named(*ALSO), ids=lambda fault: fault.name)
def test_a_fault_that_hits_changes_no_result(yard: FaultyCluster, fault: Fault) -> None:
    assert strike(yard, yard.trial(fault.work), fault).recovered > 0


def test_a_fault_that_does_not_hit_is_told_of(yard: FaultyCluster) -> None:
    with pytest.raises(Wrong, match="0 requests were made to fail, not 1"):
        strike(yard, yard.trial(), Fault("nothing", requests("GET", "busy", 1, "no-such-key"), served=1))


def test_a_job_that_asks_for_one_worker_is_given_one(yard: FaultyCluster) -> None:
    trial = yard.trial()
    trial.job.write_text(trial.job.read_text().replace("memory: 2GB", "memory: 2GB, count: 1"))
    command = trial.start()
    seen: set[tuple[str, ...]] = set()
    while command.process.poll() is None:
        seen.add(tuple(yard.cluster.busy()))
        time.sleep(0.1)
    yard.check(trial, command.ended())
    assert seen - {()} and max(len(nodes) for nodes in seen) == 1


def test_more_points_read_no_more_of_a_parent(yard: FaultyCluster) -> None:
    read: list[dict[str, int]] = []
    for step in (0.5, 0.1):
        trial = yard.trial()
        trial.job.write_text(trial.job.read_text().replace("step: 0.1", f"step: {step}"))
        before = yard.cluster.proxy.sent.copy()
        trial.start()
        assert trial.finish().code == 0
        sent = yard.cluster.proxy.sent - before
        read.append({path: size for path, size in sent.items() if path.endswith("/model.safetensors")})
    few, many = read
    assert len(few) == 2
    assert few == many
