"""What happens to a run: each function strikes once, makes sure that it hit, and says what is to happen later."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tests.chaos.cluster import DESK, MERGE_TASK
from tests.chaos.faulty_cluster import (
    EVALUATION,
    MERGE,
    MERGE_IN_PARTS,
    MERGE_TO_DISK,
    TRY_AGAIN,
    Later,
    Trial,
    Work,
    Wrong,
)

HELD = "model-00005-of"
EVALUATOR = "ray::_RemoteEva"
PARENTS = r"/parents/.*/model\.safetensors"
SHARDS = r"/points/.*\.safetensors"
COMPLETE = r"\?uploadId="
HIT_SECONDS = 20
LEASE_KEY = "lease.json"


@dataclass(frozen=True)
class Fault:
    """A fault, how often `make chaos` tries it, when, and on what work.

    It strikes at random, at once, amid the work (some is done, and half is left), or when only the fifth shard of every
    point is left, which is held up meanwhile. One that `loses` a node waits until its work was given out again.
    `served` is how many requests the proxy has to have failed in the end. `driver` is where `mergeyard run` is called
    first.
    """

    name: str
    strike: Callable[[Trial], Later | None]
    times: int = 1
    when: Literal["at random", "at once", "amid", "held"] = "at random"
    work: Work = MERGE
    loses: bool = False
    served: int = 0
    driver: str = "head"


def kill_worker(trial: Trial) -> None:
    """Kills a worker that is at work; where it ended by itself first, another."""
    while True:
        _, pid = _some_worker(trial)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
            return


def kill_raylet(trial: Trial) -> None:
    node, _ = _some_worker(trial)
    _kill_all(trial, node, "raylet")


def kill_node(trial: Trial) -> None:
    node, pid = _some_worker(trial)
    trial.cluster.kill(node)
    if Path(f"/proc/{pid}/exe").exists():
        raise Wrong(f"the worker on {node} was not killed")


def kill_driver(trial: Trial) -> None:
    process = trial.commands[-1].process
    process.kill()
    if process.wait(HIT_SECONDS) != -signal.SIGKILL:
        raise Wrong(f"the driver was not killed, it had ended with {process.returncode}")


def kill_gcs(trial: Trial) -> None:
    _some_worker(trial)
    _kill_all(trial, "head", "gcs_server")


def kill_head(trial: Trial) -> None:
    _some_worker(trial)
    trial.cluster.kill("head")
    if trial.commands[-1].process.wait(HIT_SECONDS) != -signal.SIGKILL:
        raise Wrong("the driver was not killed with the head")


def cut(trial: Trial) -> None:
    trial.cluster.network.cut(_some_worker(trial)[0])


def cut_for_a_minute(trial: Trial) -> Later:
    node, _ = _some_worker(trial)
    trial.cluster.network.cut(node)
    return Later(60, lambda: trial.cluster.network.mend(node))


def part_from_the_head(trial: Trial) -> None:
    """The node goes on reading and writing; nobody can tell it that another does its work."""
    trial.cluster.network.part(_some_worker(trial)[0], "head")


def part_driver_from_the_head(trial: Trial) -> None:
    """The driver still reaches the store and the nodes; when it has ended, its user calls `run` on the head."""
    _some_worker(trial)
    trial.cluster.network.part(DESK, "head")


def cut_driver_off(trial: Trial) -> None:
    _some_worker(trial)
    trial.cluster.network.cut(DESK)


def freeze(trial: Trial) -> Later:
    """The node stands still until others have done its work; then its worker goes on and writes what it was at."""
    node, worker = _some_worker(trial)
    network, proxy = trial.cluster.network, trial.cluster.proxy
    network.kill(node, signal.SIGSTOP)

    def thaw() -> None:
        _wait(lambda: len(trial.receipts()) == trial.work.units, "others did not do the frozen node's work")
        before = proxy.writes[network.address(node)]
        os.kill(worker, signal.SIGCONT)
        _wait(lambda: proxy.writes[network.address(node)] > before, "the thawed worker wrote nothing")
        network.kill(node, signal.SIGCONT)
        time.sleep(5)

    return Later(25, thaw)


def take_spot_node(trial: Trial) -> Later:
    """The node is told to go, and 25 s later it is gone."""
    node, _ = _some_worker(trial)
    trial.cluster.terminate(node)
    return Later(25, lambda: trial.cluster.kill(node))


def restart_store(trial: Trial) -> Later:
    trial.cluster.server.kill()
    return Later(8, trial.cluster.server.restart)


def second_driver(trial: Trial) -> None:
    """Another `run` of the same job, begun while the first is at it."""
    _some_worker(trial)
    second = trial.cluster.command("run", trial.job, "--in-process", "--json").ended()
    trial.cluster.proxy.heal()
    if second.code != TRY_AGAIN or "already driven by process" not in second.err:
        raise Wrong(f"two drivers: the second ended with {second.code}: {second.err}")


def replace_paused_driver(trial: Trial) -> None:
    """The driver is paused for longer than its lease, another takes over, and the first goes on beside it."""
    first = trial.commands[-1]
    lease = f"{trial.name}/grid/{LEASE_KEY}"
    first.process.send_signal(signal.SIGSTOP)
    paused = trial.yard.objects(lease)
    second = trial.start()
    second.until(lambda: trial.yard.objects(lease) != paused)
    first.process.send_signal(signal.SIGCONT)
    trial.cluster.proxy.heal()
    ended = first.ended()
    if ended.code != TRY_AGAIN or "another driver took this run over" not in ended.err:
        raise Wrong(f"the driver that was replaced ended with {ended.code}: {ended.err}")


def fill_disk(trial: Trial) -> None:
    """The disk of the output fills up, which ends the run; it is run again when there is room."""
    disk = trial.cluster.folder / "disk"
    with (disk / "filler").open("wb") as filler, suppress(OSError):
        while True:
            filler.write(bytes(1 << 20))
            filler.flush()
    ended = trial.commands[-1].ended()
    if ended.code != 1 or len(ended.err.splitlines()) != 1 or "no room left on this disk; free some" not in ended.err:
        raise Wrong(f"a full disk: exit code {ended.code}: {ended.err}")
    (disk / "filler").unlink()
    trial.strikes()  # until there is room, nothing could recover
    trial.start()


def damage_receipts(trial: Trial) -> None:
    """The driver is killed; the next one, which goes on from the receipts, gets three of them with a bit flipped."""
    kill_driver(trial)
    _wait(lambda: not trial.cluster.busy(), "the workers of a dead driver go on")
    trial.cluster.proxy.fail("GET", "flip", times=3, key="/receipts/.*json")
    trial.start()


def kill_evaluator(trial: Trial) -> None:
    _, pid = _some_evaluator(trial)
    os.kill(pid, signal.SIGKILL)


def cut_evaluator_off(trial: Trial) -> None:
    trial.cluster.network.cut(_some_evaluator(trial)[0])


def requests(method: str, what: str, times: int, key: str) -> Callable[[Trial], None]:
    """The next requests for such a key fail in this way, whoever makes them."""

    def strike(trial: Trial) -> None:
        trial.cluster.proxy.fail(method, what, times=times, key=key)

    return strike


def forget_upload(trial: Trial) -> None:
    """An answer is lost, and the upload that it told the end of is not known any more, as it is on Amazon."""
    shard = r"fmt1/model-00001-of[^?]*\?uploadId="
    trial.cluster.proxy.fail("POST", "lost_answer", key=shard)
    trial.cluster.proxy.fail("POST", "no_such_upload", key=shard)


def _some_worker(trial: Trial) -> tuple[str, int]:
    """A node that is at a merge task, and its process; the first one if it takes time to find any."""
    return _some(trial, MERGE_TASK)


def _some_evaluator(trial: Trial) -> tuple[str, int]:
    return _some(trial, EVALUATOR)


def _some(trial: Trial, process: str) -> tuple[str, int]:
    def busy() -> list[tuple[str, int]]:
        return [(node, pid) for node in trial.cluster.nodes for pid in trial.cluster.pids(node, process)]

    return trial.random.choice(trial.until(busy))


def _kill_all(trial: Trial, machine: str, process: str) -> None:
    pids = trial.cluster.pids(machine, process)
    if not pids:
        raise Wrong(f"there was no {process} on {machine} to kill")
    for pid in pids:
        os.kill(pid, signal.SIGKILL)


def _wait(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + HIT_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise Wrong(otherwise)
        time.sleep(0.05)


def _of_requests(name: str, method: str, what: str, times: int, key: str) -> Fault:
    return Fault(name, requests(method, what, times, key), when="amid", served=times)


def _of_completes(name: str, what: str) -> Fault:
    strike = requests("POST", what, 4, COMPLETE)
    return Fault(name, strike, when="at once", work=MERGE_IN_PARTS, served=4)


FAULTS = [
    Fault("worker killed", kill_worker, 7),
    Fault("raylet killed", kill_raylet, 5),
    Fault("node killed", kill_node, 3),
    Fault("driver killed", kill_driver, 7),
    Fault("GCS killed", kill_gcs, 3),
    Fault("head and driver killed", kill_head, 3),
    Fault("link cut for good", cut, 2, "held", loses=True),
    Fault("link cut for a minute", cut_for_a_minute, 2, "held", loses=True),
    Fault("parted from the head, not from the store", part_from_the_head, 2, "held", loses=True),
    Fault("driver parted from the head, not from the store", part_driver_from_the_head, driver=DESK),
    Fault("driver cut off", cut_driver_off, driver=DESK),
    Fault("node frozen; thawed, it writes what others did", freeze, 1, "held", loses=True),
    Fault("spot node taken, 25 s of notice", take_spot_node, 2),
    Fault("two drivers at once", second_driver, 1, "held"),
    Fault("driver paused beyond its lease, thawed beside the next", replace_paused_driver, 1, "held"),
    Fault("S3 server killed, back after 8 s", restart_store, 2),
    Fault("disk of the output full, then with room again", fill_disk, 1, "amid", MERGE_TO_DISK),
    _of_requests("503 to 30 reads of parents", "GET", "busy", 30, PARENTS),
    _of_requests("503 to 30 writes of shards", "PUT", "busy", 30, SHARDS),
    _of_requests("8 reads of parents reset", "GET", "reset", 8, PARENTS),
    _of_requests("20 writes of shards reset", "PUT", "reset", 20, SHARDS),
    _of_requests("8 reads of parents truncated", "GET", "truncate", 8, PARENTS),
    _of_requests("4 reads of parents stalled", "GET", "stall", 4, PARENTS),
    _of_requests("10 ranges of parents ignored", "GET", "ignore_range", 10, PARENTS),
    _of_requests("ETag of a parent changed in mid-read", "GET", "other_etag", 1, PARENTS),
    _of_requests("a bit flipped in a read of a parent", "GET", "flip", 1, PARENTS),
    _of_requests("a bit flipped in 4 writes of shards", "PUT", "flip", 4, SHARDS),
    Fault("a bit flipped in 3 reads of receipts", damage_receipts, 1, "amid", served=3),
    _of_requests("answers to 20 writes of shards lost", "PUT", "lost_answer", 20, SHARDS),
    _of_completes("200 with an error to 4 completes of uploads", "error_in_200"),
    _of_completes("answers to 4 completes of uploads lost", "lost_answer"),
    Fault("answer to a complete lost, upload forgotten", forget_upload, 1, "at once", MERGE_IN_PARTS, served=2),
    Fault("evaluation: worker killed", kill_evaluator, 2, "amid", EVALUATION),
    Fault("evaluation: link cut for good", cut_evaluator_off, 1, "amid", EVALUATION),
]


def moment(trial: Trial, fault: Fault) -> None:
    """Waits for when the fault is to strike."""
    work = trial.work
    if fault.when == "at once":
        return
    if work is EVALUATION:
        trial.until(lambda: all(trial.cluster.pids(node, EVALUATOR) for node in trial.cluster.nodes))
        trial.until(lambda: len(trial.keys("scores/")) >= 2)
        return
    if fault.when == "held":
        trial.until(lambda: len(trial.receipts()) == work.units - work.points and len(trial.cluster.busy()) == 1)
        return
    amid = range(work.points, work.units // 2)
    done = trial.random.choice(amid if fault.when == "amid" else range(-work.points, work.units - 2 * work.points))
    if done < 0:  # before the first task is given out
        time.sleep(trial.random.uniform(0, 3))
        return
    trial.until(lambda: len(trial.receipts()) >= done)
    time.sleep(trial.random.uniform(0, 0.5))
