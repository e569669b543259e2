"""A Ray cluster: started here or joined, its nodes and their health, and why a task failed."""

from __future__ import annotations

import logging
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, chdir, redirect_stdout
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util import metrics

from jobs import stopping
from jobs.errors import BadInput, MergeyardError, Unavailable, WorkerLost
from jobs.job import WorkerSpec
from jobs.specs import SHARES_OF_ONE
from orchestrator.cluster.again import LOSSES, TRIES, Failure
from orchestrator.cluster.reaching import check_address, check_reachable, reach
from workers.fingerprint import fingerprint, package_folders

log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""How often we look whether the head is there, and which nodes came or went, at most."""

HEAD_TIMEOUT = "RAY_gcs_rpc_server_reconnect_timeout_s"
"""When its head has been away for this long, 60 s if unset, Ray ends our process; we end it in good order before."""

ORDERLY_SECONDS = 10.0  # without its head, ray.shutdown() takes 7

KNOCK_SECONDS = 2.0
"""How long the head may take to answer a look; the machines of a cluster are near each other."""

JOIN_SECONDS = 60.0
"""How long to wait for nodes where none is large enough: they may be on their way."""
LOCAL_OBJECT_STORE_BYTES = 80 << 20  # receipts are all that passes through it

NOTICE_A_CUT = {
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
    "RAY_grpc_client_keepalive_time_ms": "10000",
    "RAY_grpc_client_keepalive_timeout_ms": "5000",
}
"""On every node and here, they have the work of a node that is cut off given out again in 20 s; it would be 420."""


class RayCluster:
    """A Ray cluster that merging and evaluating share: the one at `address`, or one started here, stopped at the end.

    `workers` is the number of workers of `spec` that its nodes hold when it is joined, `device` is "cuda" or "cpu",
    `gpus` are those of one worker and `resources` its Ray options. Raises `Unavailable` if the cluster or its nodes are
    not there now, `BadInput` if no node is large enough for a worker.
    """

    def __init__(self, spec: WorkerSpec, *, address: str | None = None) -> None:
        with ExitStack() as opened:
            opened.enter_context(redirect_stdout(sys.stderr))  # Ray prints node events there; stdout is for results
            if address is None:
                opened.callback(shutil.rmtree, _start(), ignore_errors=True)
            else:
                _connect(address)
            opened.callback(ray.shutdown)
            self.meters = Meters()
            self.spec, self.gpus = spec, spec.gpus
            self._patience = 0.0 if address is None else JOIN_SECONDS  # no node ever joins a Ray started here
            self._nodes = _Nodes()
            self.workers = self.awaited(
                self._first_room, "a worker", spec.memory_bytes, "ask for less under `workers:`"
            )
            self.device = "cuda" if self.gpus else "cpu"
            self.resources: dict[str, float] = {
                "num_cpus": spec.cpus,
                "num_gpus": self.gpus,
                "memory": spec.memory_bytes,
            }
            self._opened = opened.pop_all()

    def room(self, memory_bytes: int = 0) -> int:
        """How many workers, of `memory_bytes` at least, the cluster's nodes hold now; they come and go.

        `Unavailable` when the cluster's head is gone.
        """
        spec = replace(self.spec, memory_bytes=max(self.spec.memory_bytes, memory_bytes))
        slots = sum(_worker_slots(has, spec, self.gpus) for has in self._nodes.living())
        return min(slots, self.spec.count) if self.spec.count else slots

    def _first_room(self) -> int:
        """The room there is where, without any GPU, the CPUs do the work."""
        self.gpus = self.spec.gpus if any(has.get("GPU") for has in self._nodes.living()) else 0.0
        return self.room()

    def awaited(self, room: Callable[[], int], worker: str, memory_bytes: int, remedy: str) -> int:
        """The room, as soon as there is any: nodes may be on their way.

        Where there is none in the end, `BadInput` if nodes are there and each is too small, else `Unavailable`.
        """
        began = time.monotonic()
        told = False
        while not (found := room()):
            needs = f"{worker} of {self.spec.cpus:g} CPUs, {self.gpus:g} GPUs and {memory_bytes / 1e9:.1f} GB"
            if time.monotonic() - began >= self._patience:
                if any(_is_worker(has) for has in self._nodes.living()):
                    raise BadInput(f"no node has room for {needs}; {remedy}")
                raise Unavailable(f"the cluster has no node now that could hold {needs}; run again when it has")
            if not told:
                log.warning("no node has room for %s: waiting %.0f s for one to join", needs, self._patience)
                told = True
            time.sleep(LOOK_SECONDS)
        return found

    def close(self) -> None:
        """Leaves the cluster; one that was started here is stopped."""
        self._opened.close()


class _Nodes:
    """The cluster's nodes, looked at no more often than every LOOK_SECONDS."""

    def __init__(self) -> None:
        self._head = _Head()
        self._living: list[Mapping[str, float]] = []
        self._looked: float | None = None

    def living(self) -> list[Mapping[str, float]]:
        """The resources of each living node; none while the head is away, `Unavailable` if that lasts too long."""
        if self._looked is None or time.monotonic() - self._looked > LOOK_SECONDS:
            away = self._head.is_away()
            self._living = [] if away else [node["Resources"] for node in ray.nodes() if node["Alive"]]
            self._looked = time.monotonic()
        return self._living


class _Head:
    """The cluster's head, whose end Ray would make the end of our process as well, without a word of ours."""

    def __init__(self) -> None:
        self._address: str = ray.get_runtime_context().gcs_address
        self._patience = float(os.environ.get(HEAD_TIMEOUT, "60")) - ORDERLY_SECONDS
        self._away_since: float | None = None

    def is_away(self) -> bool:
        """Whether nothing answers where it was; `Unavailable` when that has been so for too long."""
        knocked = time.monotonic()  # before: where the network swallows all, no answer comes late
        try:
            reach(self._address, KNOCK_SECONDS)
        except OSError:
            if self._away_since is None:
                self._away_since = knocked
            if time.monotonic() - self._away_since > self._patience:
                raise Unavailable(
                    f"the head of the Ray cluster at {self._address} is gone; start it, then run again"
                ) from None
            return True
        self._away_since = None
        return False


class Meters:
    """Metrics of a run for Prometheus, as `ray_mergeyard_…`: the driver counts the work of all workers."""

    def __init__(self) -> None:
        self._bytes_read = metrics.Counter("mergeyard_bytes_read_total", "Bytes of parents read.")
        self._bytes_written = metrics.Counter("mergeyard_bytes_written_total", "Bytes of points written.")
        self._points = metrics.Counter("mergeyard_points_total", "Points of which every shard is merged.")
        self._items = metrics.Counter("mergeyard_items_total", "Items answered.")
        self._tokens = metrics.Counter("mergeyard_tokens_total", "Tokens of prompts and answers.")
        self._tasks = metrics.Counter("mergeyard_tasks_total", "Tasks done, by work: merge or evaluate.", ("work",))
        self._retries = metrics.Counter("mergeyard_retries_total", "Tasks given out again, by work.", ("work",))

    def moved(self, read: int, written: int) -> None:
        _add(self._bytes_read, read)
        _add(self._bytes_written, written)

    def merged(self, points: int) -> None:
        """A merge task is done, and with it these many points."""
        self._tasks.inc(tags={"work": "merge"})
        _add(self._points, points)

    def evaluated(self, items: int, tokens: int) -> None:
        """A block of items is answered."""
        self._tasks.inc(tags={"work": "evaluate"})
        _add(self._items, items)
        _add(self._tokens, tokens)

    def retried(self, work: str) -> None:
        self._retries.inc(tags={"work": work})


def _add(counter: metrics.Counter, amount: int) -> None:
    if amount:  # Ray refuses to add nothing
        counter.inc(amount)


def _start() -> Path:
    """Starts a Ray of one node; the folder of its sockets and logs."""
    with chdir(Path(package_folders()[0]).parent):  # workers import from here first, whatever the user's folder holds
        try:
            context = _init(address="local", include_dashboard=False, object_store_memory=LOCAL_OBJECT_STORE_BYTES)
        except Exception as error:  # the very class Ray raises when a part of it takes more than 30 seconds
            raise Unavailable(
                f"Ray did not start here: {str(error).splitlines()[0]} Run again, or --in-process"
            ) from error
    return Path(context.address_info["session_dir"])


def _connect(address: str) -> None:
    """Joins a running Ray and sends the code along; `Unavailable` where there is none now."""
    check_address(address)
    if address != "auto":
        check_reachable(address, address, "no Ray", "is its head running?")
    with TemporaryDirectory() as code:
        for folder in package_folders():
            shutil.copytree(
                folder, Path(code, Path(folder).name), ignore=shutil.ignore_patterns("__pycache__", "examples")
            )
        try:
            _init(address=address, runtime_env={"working_dir": code})
        except (RayError, ConnectionError, RuntimeError, ValueError) as error:
            said = str(error).splitlines()[0]
            if said.startswith("Could not find any running Ray instance"):
                raise Unavailable(f"--address {address}: {said}") from error
            named = re.search(r"\bat (\S+:\d+)$", said)  # Ray says where, of `auto` as well
            place = named[1] if named else address
            if place != "auto":
                check_reachable(address, place, "no Ray", "its head has just gone; run again when it is back")
            raise BadInput(
                f"--address {address}: {said}; if it wants a token, set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from error


def _init(**options: Any) -> Any:
    """ray.init, quietly and without its own way of stopping at SIGTERM."""
    for name, value in NOTICE_A_CUT.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray 2.60 warns without it
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_OVERRIDE_JOB_RUNTIME_ENV", "1")  # inside a submitted job, our code before the job's
    stop = signal.getsignal(signal.SIGTERM)
    try:
        return ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    except SystemExit:
        stopping.stopped = True
        raise KeyboardInterrupt from None
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, stop)


def on_node(what: str, address: str) -> str:
    """The place of a failure in an error message."""
    return f"{what} on node {address}"


def this_node() -> str:
    """The address of the node that runs this."""
    return str(ray.util.get_node_ip_address())


def check_code(expected: str) -> None:
    """Refuses to work with a driver whose code is not this node's."""
    if fingerprint() != expected:
        raise BadInput("the node has other mergeyard code than the driver; install the same version there")


def _worker_slots(has: Mapping[str, float], spec: WorkerSpec, gpus: float) -> int:
    """How many workers a node holds at once."""
    fits = [int(has.get("memory", 0) // spec.memory_bytes)]
    if spec.cpus:
        fits.append(_times(has.get("CPU", 0), spec.cpus))
    if gpus >= 1:
        fits.append(_times(has.get("GPU", 0), gpus))
    elif gpus:  # a worker is on one GPU: two workers of 0.6 need two
        fits.append(int(has.get("GPU", 0)) * _times(1, gpus))
    return min(fits)


def _times(has: float, asked: float) -> int:
    """How often a resource holds what is asked, in the parts that Ray counts; `2 // 0.1` is 19."""
    return round(has * SHARES_OF_ONE) // max(1, round(asked * SHARES_OF_ONE))


def _is_worker(has: Mapping[str, float]) -> bool:
    """Whether a node is there for work at all; a head alone is often not."""
    return bool(has.get("CPU") or has.get("GPU"))


def failure(error: RayError | MergeyardError, what: str) -> Failure:
    """The failure of `what`: our own error if a worker raised one; else the fate of the worker."""
    cause = error.cause if isinstance(error, RayTaskError) else error  # its own text is a traceback
    if isinstance(cause, MergeyardError):
        return Failure(cause)
    if isinstance(error, RayTaskError):
        return Failure(_because(error, MergeyardError(f"{what}: {type(cause).__name__}: {cause}")))
    if _node_lost(error):
        lost = WorkerLost(f"{what}: lost with its node {LOSSES} times; look why nodes go, then run again")
        return Failure(_because(error, lost), node_lost=True)
    if isinstance(error, (WorkerCrashedError, OutOfMemoryError, ActorDiedError)):
        died = WorkerLost(f"{what}: its worker died {TRIES} times; look for a lack of memory, then run again")
        return Failure(_because(error, died))
    return Failure(_because(error, WorkerLost(f"{what}: {str(error).splitlines()[0]}")))


def _node_lost(error: BaseException) -> bool:
    """Whether it was the node that went; of an actor, Ray says so in words alone."""
    if isinstance(error, ActorDiedError):
        return error.preempted or "its node has died" in str(error)
    return isinstance(error, (NodeDiedError, ObjectLostError, ActorUnavailableError))


def _because(cause: BaseException, error: MergeyardError) -> MergeyardError:
    """The error with its cause."""
    error.__cause__ = cause
    return error
