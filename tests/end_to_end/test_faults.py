"""Whatever is killed, and whenever: the same bytes, nothing done twice, nothing half done that looks done.

The proxy holds every run here in its middle: eight shards of each point can be written, the fifth cannot.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.end_to_end.command import ROOT, Command, Ended
from tests.end_to_end.conftest import POINTS, UNITS, Run
from tests.fault_proxy import FaultProxy
from tests.seaweedfs import SeaweedFS

WRITABLE = UNITS - POINTS
WAITING_FOR_THEIR_HEAD = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
"""Ray's agents try to tell their dead head of its death for a minute."""


def in_the_middle(command: Command, run: Run) -> dict[str, str]:
    """Waits until all that can be done is done; the receipts."""
    command.until(lambda: len(run.receipts()) == WRITABLE)
    return run.receipts()


def assert_nothing_counts_as_done(run: Run, here: Callable[..., Ended]) -> None:
    """No point has all its shards yet, and none passes for one that has."""
    facts = here("status", run.url, "--json").facts
    assert (facts["points_done"], len(facts["waiting"]), facts["shards_done"]) == (0, POINTS, WRITABLE)


def assert_complete(run: Run, expected: Run, server: SeaweedFS) -> None:
    """The run is the expected one, byte by byte, and no upload is open."""
    assert run.manifests() == expected.manifests()
    assert run.shards() == expected.shards()
    assert "Uploads" not in server.client().list_multipart_uploads(Bucket="tests")


@pytest.mark.parametrize(
    "how", ["kill", "interrupt the process group", pytest.param("terminate", marks=pytest.mark.heavy)]
)
def test_a_stopped_driver_leaves_no_process_and_running_again_does_nothing_twice(
    start: Callable[..., Command],
    here: Callable[..., Ended],
    new_run: Callable[..., Run],
    expected: Run,
    s3_url: str,
    s3_server: SeaweedFS,
    held: FaultProxy,
    how: str,
) -> None:
    run = new_run(s3_url)
    command = start("run", run.job)
    before = in_the_middle(command, run)
    assert run.manifests() == {}

    if how == "kill":
        assert_nothing_counts_as_done(run, here)
        command.process.kill()
        assert command.ended().code == -signal.SIGKILL
        assert set(command.survivors(10, but=WAITING_FOR_THEIR_HEAD)) <= WAITING_FOR_THEIR_HEAD
    else:
        if how == "terminate":
            command.process.terminate()
        else:
            os.killpg(command.process.pid, signal.SIGINT)
        assert "run the same command to continue" in command.ended(seconds=30).refused_with(75)
        assert command.survivors(seconds=20) == []

    held.heal()
    facts = here("run", run.job, "--in-process", "--json").facts
    assert (facts["units_found"], facts["units_merged"]) == (WRITABLE, POINTS)
    assert before.items() <= run.receipts().items()
    assert_complete(run, expected, s3_server)


def test_a_driver_that_is_stopped_while_ray_starts_leaves_no_process(
    start: Callable[..., Command], new_run: Callable[..., Run], tmp_path: Path
) -> None:
    command = start("run", new_run(str(tmp_path / "out")).job)
    settings = command.until(
        lambda: [here for process in command.look() if process.name() == "gcs_server" and (here := process.environ())]
    )
    command.process.terminate()
    assert {"RAY_health_check_period_ms", "RAY_grpc_client_keepalive_time_ms"} <= settings[0].keys()
    assert "run the same command to continue" in command.ended(seconds=30).refused_with(75)
    assert command.survivors(seconds=20) == []


def test_of_two_drivers_of_one_run_one_works_and_the_other_says_so(
    start: Callable[..., Command],
    here: Callable[..., Ended],
    new_run: Callable[..., Run],
    expected: Run,
    s3_url: str,
    s3_server: SeaweedFS,
    held: FaultProxy,
) -> None:
    run = new_run(s3_url)
    first = start("run", run.job, "--in-process", "--json")
    first.until(lambda: run.receipts())
    refusal = here("run", run.job, "--in-process").refused_with(75)
    assert f"already driven by process {first.process.pid}" in refusal
    held.heal()
    assert first.ended().facts["units_merged"] == UNITS
    assert_complete(run, expected, s3_server)


def test_a_disk_that_fills_up_ends_the_run_with_one_line_and_with_room_again_it_goes_on(
    here: Callable[..., Ended],
    new_run: Callable[..., Run],
    expected: Run,
    small_disk: Path,
) -> None:
    run = new_run(str(small_disk))
    assert "no room left on this disk; free some" in here("run", run.job, "--in-process").refused_with(1)
    subprocess.run(["mount", "-o", "remount,nr_inodes=10000", small_disk], check=True)
    before = run.receipts()
    facts = here("run", run.job, "--in-process", "--json").facts
    assert facts["units_found"] == len(before) == UNITS - facts["units_merged"] > 0
    assert (run.manifests(), run.shards()) == (expected.manifests(), expected.shards())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own that is full after sixty files, in the middle of a run of 45 shards; it has bytes enough."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40m,nr_inodes=60", "tmpfs", disk]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.heavy
def test_a_killed_worker_costs_its_task_and_nothing_else(
    start: Callable[..., Command],
    mergeyard: Callable[..., Ended],
    new_run: Callable[..., Run],
    expected: Run,
    s3_url: str,
    s3_server: SeaweedFS,
    held: FaultProxy,
) -> None:
    run = new_run(s3_url)
    command = start("run", run.job, "--json")
    before = in_the_middle(command, run)
    [worker] = command.merging()
    worker.kill()
    command.until(lambda: any(process.pid != worker.pid for process in command.merging()))
    held.heal()
    assert command.ended().facts["units_merged"] == UNITS  # and standard output was JSON, whatever Ray had to say
    assert before.items() <= run.receipts().items()
    assert_complete(run, expected, s3_server)
    assert command.survivors(seconds=20) == []


@pytest.mark.heavy
def test_a_worker_that_dies_every_time_ends_the_run_with_one_line_to_try_again(
    start: Callable[..., Command], new_run: Callable[..., Run], s3_url: str, held: FaultProxy
) -> None:
    run = new_run(s3_url)
    command = start("run", run.job)
    in_the_middle(command, run)
    killed: set[int] = set()
    while len(killed) < 4:
        [worker, *_] = command.until(lambda: [found for found in command.merging() if found.pid not in killed])
        killed.add(worker.pid)
        worker.kill()
    ended = command.ended()
    assert ended.code == 75
    points = "long0_fmt1, long0.25_fmt0.75, long0.5_fmt0.5 and 2 more points"
    assert f"mergeyard: model-00005-of-00009.safetensors of {points}: its worker died" in ended.err.splitlines()[-1]
    assert command.survivors(seconds=20) == []


@pytest.mark.heavy
def test_an_s3_server_that_comes_back_within_our_patience_only_delays_the_run(
    start: Callable[..., Command],
    mergeyard: Callable[..., Ended],
    new_run: Callable[..., Run],
    expected: Run,
    s3_url: str,
    s3_server: SeaweedFS,
    held: FaultProxy,
) -> None:
    run = new_run(s3_url)
    command = start("run", run.job, "--json")
    before = in_the_middle(command, run)
    s3_server.kill()
    held.heal()
    s3_server.restart()
    assert command.ended().facts["units_merged"] == UNITS
    assert before.items() <= run.receipts().items()
    assert_complete(run, expected, s3_server)


@pytest.mark.heavy
def test_an_s3_server_that_stays_away_ends_the_run_with_one_line_and_running_again_completes_it(
    start: Callable[..., Command],
    mergeyard: Callable[..., Ended],
    new_run: Callable[..., Run],
    expected: Run,
    s3_url: str,
    s3_server: SeaweedFS,
    held: FaultProxy,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = new_run(s3_url)
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "6")
    command = start("run", run.job)
    command.until(lambda: len(run.receipts()) >= POINTS)
    s3_server.kill()
    assert run.url in command.ended(seconds=300).refused_with(75)
    assert command.survivors(seconds=20) == []
    s3_server.restart()
    held.heal()
    before = run.receipts()
    facts = mergeyard("run", run.job, "--json").facts
    assert (facts["units_found"], facts["units_merged"]) == (len(before), UNITS - len(before))
    assert before.items() <= run.receipts().items()
    assert_complete(run, expected, s3_server)


@pytest.mark.heavy
def test_a_worker_with_other_code_than_the_drivers_is_refused(
    start: Callable[..., Command], new_run: Callable[..., Run], s3_url: str, held: FaultProxy, tmp_path: Path
) -> None:
    for package in ("jobs", "workers", "orchestrator"):
        for file in (ROOT / package).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                copy = tmp_path / "code" / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    run = new_run(s3_url)
    command = start("run", run.job, root=tmp_path / "code")
    in_the_middle(command, run)
    with (tmp_path / "code" / "workers" / "merging.py").open("a") as file:
        file.write("\nEDITED = True\n")
    for worker in command.workers():  # idle ones too: what they have imported, they know to be the driver's
        worker.kill()
    ended = command.ended()
    assert ended.code == 1
    assert "has other mergeyard code than the driver" in ended.err.splitlines()[-1]
