"""What happens to a run: each function strikes once and says what else is to happen, and when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.chaos.yard import TRY_AGAIN, Later, Trial, Wrong
from tests.end_to_end.conftest import POINTS, UNITS

HELD = "model-00005-of"
MERGE_TASK = "ray::_merge"


@dataclass(frozen=True)
class Fault:
    """A fault and how often `make chaos` tries it; with `holds`, it strikes the node that has the last of the work."""

    name: str
    strike: Callable[[Trial], Later | None]
    times: int
    holds: bool = False


def kill_worker(trial: Trial) -> None:
    _, pid = _some_worker(trial)
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def kill_raylet(trial: Trial) -> None:
    node, _ = _some_worker(trial)
    for pid in trial.cluster.pids(node, "raylet"):
        os.kill(pid, signal.SIGKILL)


def kill_node(trial: Trial) -> None:
    trial.cluster.kill(_some_worker(trial)[0])


def kill_driver(trial: Trial) -> None:
    trial.commands[-1].process.kill()


def kill_gcs(trial: Trial) -> None:
    _some_worker(trial)
    for pid in trial.cluster.pids("head", "gcs_server"):
        os.kill(pid, signal.SIGKILL)


def kill_head(trial: Trial) -> None:
    _some_worker(trial)
    trial.cluster.kill("head")


def cut(trial: Trial) -> None:
    trial.cluster.network.cut(_some_worker(trial)[0])


def cut_for_a_minute(trial: Trial) -> Later:
    node, _ = _some_worker(trial)
    trial.cluster.network.cut(node)
    return Later(60, lambda: trial.cluster.network.mend(node))


def part_from_the_head(trial: Trial) -> None:
    """The node goes on reading and writing; nobody can tell it that another does its work."""
    trial.cluster.network.part(_some_worker(trial)[0], "head")


def freeze(trial: Trial) -> Later:
    """The node stands still until others have done its work, then goes on with what it was at."""
    node, _ = _some_worker(trial)
    trial.cluster.network.kill(node, signal.SIGSTOP)

    def thaw() -> None:
        trial.cluster.network.kill(node, signal.SIGCONT)
        time.sleep(5)

    return Later(45, thaw)


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
    refused = second.code == TRY_AGAIN and "already driven by process" in second.err
    if not refused and not (second.code == 0 and second.facts["units_merged"] == 0):
        raise Wrong(f"two drivers: the second ended with {second.code}: {second.err}")


def requests(method: str, what: str, times: int) -> Callable[[Trial], None]:
    """The next requests of a method fail in this way, whoever makes them."""

    def strike(trial: Trial) -> None:
        trial.cluster.proxy.fail(method, what, times=times)

    return strike


def _some_worker(trial: Trial) -> tuple[str, int]:
    """A node that is at a merge task, and its process; the first one if it takes time to find any."""

    def busy() -> list[tuple[str, int]]:
        return [(node, pid) for node in trial.cluster.nodes for pid in trial.cluster.pids(node, MERGE_TASK)]

    return trial.random.choice(trial.until(busy))


FAULTS = [
    Fault("S3 server killed, back after 8 s", restart_store, 2),
    Fault("503 to 30 reads", requests("GET", "busy", 30), 1),
    Fault("503 to 30 writes", requests("PUT", "busy", 30), 1),
    Fault("8 reads reset", requests("GET", "reset", 8), 1),
    Fault("20 writes reset", requests("PUT", "reset", 20), 1),
    Fault("8 bodies truncated", requests("GET", "truncate", 8), 1),
    Fault("4 bodies stalled", requests("GET", "stall", 4), 1),
    Fault("10 ranges ignored", requests("GET", "ignore_range", 10), 1),
    Fault("ETag changed in mid-read", requests("GET", "other_etag", 1), 1),
    Fault("answers to 20 writes lost", requests("PUT", "lost_answer", 20), 1),
    Fault("two drivers at once", second_driver, 1),
    Fault("worker killed", kill_worker, 6),
    Fault("raylet killed", kill_raylet, 3),
    Fault("node killed", kill_node, 3),
    Fault("driver killed", kill_driver, 5),
    Fault("link cut for good", cut, 2, holds=True),
    Fault("link cut for a minute", cut_for_a_minute, 1, holds=True),
    Fault("parted from the head, not from the store", part_from_the_head, 2, holds=True),
    Fault("node frozen, later thawed", freeze, 1, holds=True),
    Fault("spot node taken, 25 s of notice", take_spot_node, 2),
    Fault("GCS killed", kill_gcs, 2),
    Fault("head and driver killed", kill_head, 2),
]
"""Those of the store strike all requests of the run; the workers' are most of them."""


def moment(trial: Trial, fault: Fault) -> None:
    """Waits for when the fault is to strike: at random, or when only the held shard of every point is left."""
    if fault.holds:
        trial.until(lambda: len(trial.receipts()) == UNITS - POINTS and len(trial.cluster.busy()) == 1)
        return
    done = trial.random.randrange(-POINTS, UNITS - 2 * POINTS)  # below 0: before the first task is given out
    if done < 0:
        time.sleep(trial.random.uniform(0, 3))
        return
    trial.until(lambda: len(trial.receipts()) >= done)
    time.sleep(trial.random.uniform(0, 0.5))
