"""What happens to a run: each function strikes once and says what else is to happen, and when."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tests.chaos.yard import POLL_SECONDS, Later, Trial
from tests.end_to_end.conftest import POINTS, UNITS

HELD = "model-00005-of"
MERGE_TASK = "ray::_merge"


@dataclass(frozen=True)
class Fault:
    """A fault and how often `make chaos` tries it; `reissue` ones strike a node that holds the last of the work."""

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
    Fault("worker killed", kill_worker, 6),
    Fault("raylet killed", kill_raylet, 3),
    Fault("node killed", kill_node, 3),
    Fault("driver killed", kill_driver, 6),
    Fault("GCS killed", kill_gcs, 2),
    Fault("head and driver killed", kill_head, 2),
    Fault("link cut for good", cut, 3, holds=True),
    Fault("link cut for a minute", cut_for_a_minute, 2, holds=True),
    Fault("parted from the head, not from the store", part_from_the_head, 3, holds=True),
    Fault("node frozen, later thawed", freeze, 2, holds=True),
    Fault("spot node taken, 25 s of notice", take_spot_node, 2),
    Fault("S3 server killed, back after 8 s", restart_store, 3),
    Fault("503 to 30 requests", requests("GET", "busy", 30), 1),
    Fault("503 to 30 writes", requests("PUT", "busy", 30), 1),
    Fault("connection reset, 20 reads", requests("GET", "reset", 20), 1),
    Fault("connection reset, 20 writes", requests("PUT", "reset", 20), 1),
    Fault("20 bodies truncated", requests("GET", "truncate", 20), 1),
    Fault("4 bodies stalled", requests("GET", "stall", 4), 1),
    Fault("10 ranges ignored", requests("GET", "ignore_range", 10), 1),
    Fault("ETag changed in mid-read", requests("GET", "other_etag", 1), 1),
    Fault("answers to 20 writes lost", requests("PUT", "lost_answer", 20), 1),
    Fault("answers to 20 deletes lost", requests("DELETE", "lost_answer", 20), 1),
]


def moment(trial: Trial, fault: Fault, undisturbed: float) -> None:
    """Waits for when the fault is to strike: at random, or when only the held shard of every point is left."""
    if not fault.holds:
        until = time.monotonic() + trial.random.uniform(0, 0.8 * undisturbed)
        while time.monotonic() < until and trial.commands[-1].process.poll() is None:
            time.sleep(POLL_SECONDS)
        return
    trial.until(lambda: len(trial.receipts()) == UNITS - POINTS and len(trial.cluster.busy()) == 1)
