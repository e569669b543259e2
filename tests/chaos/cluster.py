"""A Ray of several machines and an S3 server, each in a network namespace of its own, and `mergeyard` at the head."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.chaos.network import Network
from tests.end_to_end.command import ROOT, Command
from tests.fault_proxy import FaultProxy
from tests.seaweedfs import SeaweedFS

PORT = 6379
DESK = "desk"
BUCKET = "tests"
START_SECONDS = 300
WORKER_MEMORY = 3_000_000_000
MERGE_TASK = "ray::_merge"


class Cluster:
    """A head without workers, nodes `node1` … of one CPU each, and the store, which all reach through a fault proxy.

    A `desk` is a part of the cluster without a CPU, for a driver apart from the head; it is begun where it is needed.
    Its processes are apart, because a driver joins the Ray that it sees running, the head's before all others.

    `direct` leaves the proxy out. Ray is started with the settings that infra/ray/environment.sh has for every cluster.
    Everything runs a copy of the code as it is now, so that it may be worked on meanwhile.
    """

    def __init__(self, network: Network, nodes: int, *, direct: bool = False) -> None:
        self.network = network
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.folder = network.folder
        self._code = self.folder / "code"
        for package in ("jobs", "workers", "orchestrator"):
            shutil.copytree(ROOT / package, self._code / package, ignore=shutil.ignore_patterns("__pycache__"))
        self.server = SeaweedFS(self.folder / "s3", host=network.address("store"), within=network.within("store"))
        self.server.start()
        self.server.client().create_bucket(Bucket=BUCKET)
        self.proxy = FaultProxy(self.server, host=network.our_address)
        self.proxy.start()
        self.address = f"{network.address('head')}:{PORT}"
        self._direct = direct
        self._token = secrets.token_hex(32)
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._options: dict[str, tuple[str, ...]] = {}
        self._starts = 0

    @property
    def environment(self) -> dict[str, str]:
        """Of every node and of every command."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))}
        return {
            **inherited,
            **documented_settings(),
            "HOME": str(self.folder),
            "PYTHONPATH": str(self._code),
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "RAY_AUTH_TOKEN": self._token,
            "RAY_gcs_rpc_server_reconnect_timeout_s": "15",
            "AWS_ENDPOINT_URL": self.server.endpoint if self._direct else self.proxy.endpoint,
            "AWS_ACCESS_KEY_ID": self.server.access_key,
            "AWS_SECRET_ACCESS_KEY": self.server.secret_key,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def start(self) -> None:
        """Starts the head and every node, waiting until Ray says that each is there."""
        self.start_head()
        for node in self.nodes:
            self.begin(node)
        for node in self.nodes:
            self.wait_for(node)

    def start_head(self) -> None:
        self._ray("head", "--head", f"--port={PORT}", "--include-dashboard=false", "--num-cpus=0", "--memory=1000000")
        self.wait_for("head")

    def begin(self, node: str) -> None:
        """Starts a node; `wait_for` it before relying on it."""
        room = ("--num-cpus=0", "--memory=1000000") if node == DESK else ("--num-cpus=1", f"--memory={WORKER_MEMORY}")
        self._ray(node, f"--address={self.address}", *room)

    def limit(self, megabits: float) -> None:
        """Limits the link of each node to so many megabits a second, each way."""
        for node in self.nodes:
            self.network.limit(node, megabits)

    def wait_for(self, name: str) -> None:
        """Returns when a machine's Ray runs; one that gave up by itself, on a busy computer, is started again."""
        deadline = time.monotonic() + START_SECONDS
        while "Ray runtime started" not in (text := self._log(name).read_text()):
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name} did not start: {text[-2000:]}")
            if self._started[name].poll() is not None:
                self.kill(name)
                self._ray(name, *self._options[name])
            time.sleep(0.1)

    def kill(self, name: str) -> None:
        """Kills all that runs on a machine, as a power cut would."""
        self.network.kill(name)
        if name in self._started:
            self._started.pop(name).wait()

    def lives(self, name: str) -> bool:
        """Whether the Ray that was started on a machine still runs."""
        return name in self._started and self._started[name].poll() is None

    def repair(self, only: Sequence[str] = ()) -> None:
        """Heals every link and starts again what does not run; a new head needs new nodes."""
        self.proxy.heal()
        if not only and DESK in self._started:
            self.kill(DESK)
            self.network.heal(DESK)
        for node in self.nodes if not only else ():
            if self.network.heal(node) or not self.lives(node) or not self.pids(node, "raylet"):
                self.kill(node)  # a node that was cut off leaves Ray when it hears that it was given up
                self.network.heal(node)
        if not self.lives("head") or not self.pids("head", "gcs_server"):
            for name in ("head", *self.nodes):
                self.kill(name)
            self.start_head()
        elif only:
            return
        begun = [node for node in self.nodes if not self.lives(node)]
        for node in begun:
            self.begin(node)
        for node in begun:
            self.wait_for(node)

    def terminate(self, name: str) -> None:
        """Tells a machine's `ray start` to go, as a spot machine is told before it is taken."""
        self._started[name].send_signal(signal.SIGTERM)

    def pids(self, node: str, process: str) -> list[int]:
        """The processes on a machine whose title begins like this: `raylet`, `ray::_merge` …"""
        return [pid for pid in self.network.processes(node) if title(pid).startswith(process)]

    def busy(self) -> list[str]:
        """The nodes that are at a merge task now."""
        return [node for node in self.nodes if self.pids(node, MERGE_TASK)]

    def command(self, *arguments: str | Path, on: str = "head", extra: Mapping[str, str] | None = None) -> Command:
        """`mergeyard …` on the head, or on another machine."""
        self._starts += 1
        folder = self.folder / f"command{self._starts}"
        folder.mkdir()
        words = tuple(str(argument) for argument in arguments)
        return Command(words, folder, {**self.environment, **(extra or {})}, self.network.within(on))

    def run(self, job: Path, *, on: str = "head") -> Command:
        """`mergeyard run` of a job on this cluster."""
        return self.command("run", job, "--address", self.address, "--json", on=on)

    def _ray(self, name: str, *options: str) -> None:
        self._starts += 1
        self._options[name] = options
        temporary = self.folder / f"r{self._starts}"
        temporary.mkdir()
        ray = str(Path(sys.executable).with_name("ray"))
        command = [
            *self.network.within(name), ray, "start", "--block", f"--node-ip-address={self.network.address(name)}",
            "--num-gpus=0", "--object-store-memory=80000000", f"--temp-dir={temporary}", *options,
        ]  # fmt: skip
        self._log(name).write_text("")
        with self._log(name).open("wb") as log:
            self._started[name] = subprocess.Popen(
                command, env=self.environment, stdout=log, stderr=log, cwd=temporary, start_new_session=True
            )

    def _log(self, name: str) -> Path:
        return self.folder / f"{name}.log"


@contextmanager
def started(nodes: int, *, megabits: float | None = None, direct: bool = False) -> Iterator[Cluster]:
    """A cluster that runs, with the link of each node limited to so many megabits a second; gone at the end."""
    with Network(["head", "store", DESK, *(f"node{number}" for number in range(1, nodes + 1))], [DESK]) as network:
        cluster = Cluster(network, nodes, direct=direct)
        try:
            cluster.start()
            if megabits is not None:
                cluster.limit(megabits)
            yield cluster
        finally:
            cluster.proxy.stop()


def documented_settings() -> dict[str, str]:
    """What infra/ray/environment.sh exports for Ray."""
    text = (ROOT / "infra" / "ray" / "environment.sh").read_text()
    return dict(re.findall(r"^export (RAY_\w+)=(\S+)$", text, re.MULTILINE))


def title(pid: int) -> str:
    """What a process calls itself; empty when it is gone."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return ""
    return Path(words[0].decode(errors="replace")).name
