"""Several machines in one: network namespaces on a bridge, each with an address of its own and a link that can be
limited, cut and counted.

What is started in a namespace ends with the network, also if we are killed: a shell of its own waits for the end of a
pipe that only we hold open, then kills whatever runs there and removes the namespaces.
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import TracebackType

CLEAN_UP = """
cat >/dev/null
for namespace in $(ip netns list | awk '{print $1}' | grep "^$1-"); do
    for _ in $(seq 50); do
        pids=$(ip netns pids "$namespace")
        [ -n "$pids" ] || break
        kill -9 $pids 2>/dev/null
        sleep 0.1
    done
    ip netns delete "$namespace"
done
ip link delete "$2" 2>/dev/null
umount -l "$3"/* 2>/dev/null
rm -rf "$3"
"""

BURST = "128k"
OURS = 254
_number = itertools.count()


@functools.cache
def why_not() -> str:
    """Why this machine has no network namespaces for us, or an empty string."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    if any(shutil.which(program) is None for program in ("ip", "tc", "nsenter", "bash")):
        return "needs iproute2, util-linux and bash"
    try:
        with Network(["probe"]) as network:
            network.limit("probe", 100)
    except (subprocess.CalledProcessError, OSError) as error:
        return f"no network namespaces here: {getattr(error, 'stderr', None) or error}".strip()
    return ""


class Network:
    """One namespace a name, in the order given at .1, .2 and so on of a free 198.18.x.0/24; this process is at .254.

    Those `apart` have process ids of their own as well: what runs there sees no other's processes.
    """

    def __init__(self, names: list[str], apart: Collection[str] = ()) -> None:
        self._names = names
        self._apart = apart
        self._first: dict[str, subprocess.Popen[bytes]] = {}
        self._prefix = f"y{os.getpid()}x{next(_number)}"
        self._subnet = ""
        self._harmed: set[str] = set()

    def __enter__(self) -> Network:
        self.folder = Path(tempfile.mkdtemp(prefix="yard-"))
        self._cleaner = subprocess.Popen(
            ["bash", "-c", CLEAN_UP, "clean-up", self._prefix, self._prefix, str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            self._lay()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends everything and returns when it has ended."""
        assert self._cleaner.stdin is not None
        self._cleaner.stdin.close()
        self._cleaner.wait()

    def _lay(self) -> None:
        taken = _run("ip", "-4", "addr", "show")
        self._subnet = next(f"198.18.{x}" for x in range(os.getpid() % 200, 256) if f"198.18.{x}." not in taken)
        switch = self._namespace("switch")
        _run("ip", "netns", "add", switch)
        self._in("switch", "ip", "link", "add", "bridge", "type", "bridge")
        self._in("switch", "ip", "link", "set", "bridge", "up")
        for name in self._names:
            namespace = self._namespace(name)
            _run("ip", "netns", "add", namespace)
            self._in("switch", "ip", "link", "add", f"to-{name}", "type", "veth", "peer", "eth0", "netns", namespace)
            self._plug(name)
            self._in(name, "ip", "link", "set", "eth0", "address", _hardware(self.address(name)))
            self._in(name, "ip", "addr", "add", f"{self.address(name)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                self._in(name, "ip", "link", "set", device, "up")
        ours = ("peer", self._prefix, "netns", str(os.getpid()))
        self._in("switch", "ip", "link", "add", "to-us", "type", "veth", *ours)
        self._plug("us")
        _run("ip", "addr", "add", f"{self.our_address}/24", "dev", self._prefix)
        _run("ip", "link", "set", self._prefix, "address", _hardware(self.our_address))
        _run("ip", "link", "set", self._prefix, "up")
        self._introduce()

    def _introduce(self) -> None:
        """Tells all where the others are: a router between them, as anywhere else, would not say that one is away."""
        for name in self._names:
            for address in (self.our_address, *(self.address(other) for other in self._names if other != name)):
                self._in(name, "ip", "neigh", "replace", *_neighbour(address, "eth0"))
            _run("ip", "neigh", "replace", *_neighbour(self.address(name), self._prefix))

    def _plug(self, name: str) -> None:
        self._in("switch", "ip", "link", "set", f"to-{name}", "master", "bridge", "up")

    @property
    def our_address(self) -> str:
        """Where this process is found."""
        return f"{self._subnet}.{OURS}"

    def address(self, name: str) -> str:
        """Where a namespace is found."""
        return f"{self._subnet}.{1 + self._names.index(name)}"

    def within(self, name: str) -> tuple[str, ...]:
        """What to put before a command for it to run there; its process id stays that of the command, if not apart."""
        enter = ("nsenter", f"--net=/run/netns/{self._namespace(name)}")
        if name not in self._apart:
            return (*enter, "--")
        if name not in self._first or self._first[name].poll() is not None:
            hold = ("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "sleep", "infinity")
            self._first[name] = subprocess.Popen([*enter, "--", *hold])
        while not (inside := [child for child in _children(self._first[name].pid) if _sleeps(child)]):
            time.sleep(0.01)
        return (*enter, f"--pid=/proc/{inside[0]}/ns/pid", f"--mount=/proc/{inside[0]}/ns/mnt", "--")

    def limit(self, name: str, megabits: float) -> None:
        """Lets at most this much pass a second on a namespace's link, each way."""
        shape = ("root", "tbf", "rate", f"{megabits:g}mbit", "burst", BURST, "latency", "200ms")
        self._in("switch", "tc", "qdisc", "replace", "dev", f"to-{name}", *shape)
        self._in(name, "tc", "qdisc", "replace", "dev", "eth0", *shape)

    def cut(self, name: str) -> None:
        """Pulls the cable; no end of a connection is told."""
        self._harmed.add(name)
        self._in("switch", "ip", "link", "set", f"to-{name}", "down")

    def mend(self, name: str) -> None:
        self._in("switch", "ip", "link", "set", f"to-{name}", "up")

    def part(self, name: str, other: str) -> None:
        """Lets two namespaces reach each other no more, though both reach all others."""
        self._harmed.add(name)
        self._in(name, "ip", "route", "add", "blackhole", f"{self.address(other)}/32")

    def heal(self, name: str) -> bool:
        """Undoes `cut` and `part`; whether anything was done to this namespace since it was healed last."""
        self.mend(name)
        for route in self._in(name, "ip", "route", "show", "type", "blackhole").splitlines():
            self._in(name, "ip", "route", "delete", *route.split()[:2])
        harmed = name in self._harmed
        self._harmed.discard(name)
        return harmed

    def moved(self, name: str) -> tuple[int, int]:
        """Bytes that went to a namespace and came from it, headers of packets included."""
        counts = self._in(name, "cat", "/proc/net/dev").split("eth0:")[1].split()
        return int(counts[0]), int(counts[8])

    def processes(self, name: str) -> list[int]:
        """Who runs there."""
        return [int(pid) for pid in _run("ip", "netns", "pids", self._namespace(name)).split()]

    def kill(self, name: str, how: signal.Signals = signal.SIGKILL) -> None:
        """Sends a signal to all that runs there."""
        self._harmed.add(name)
        for pid in self.processes(name):
            with suppress(ProcessLookupError):
                os.kill(pid, how)
        if how == signal.SIGKILL and name in self._first:
            self._first.pop(name).wait()

    def _namespace(self, name: str) -> str:
        return f"{self._prefix}-{name}"

    def _in(self, name: str, *command: str) -> str:
        return _run("nsenter", f"--net=/run/netns/{self._namespace(name)}", "--", *command)


def _hardware(address: str) -> str:
    """A hardware address that is as unique as this one."""
    return "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))


def _neighbour(address: str, device: str) -> tuple[str, ...]:
    return address, "lladdr", _hardware(address), "dev", device, "nud", "permanent"


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _sleeps(pid: int) -> bool:
    """Whether the first process of a namespace has mounted its `/proc`, after which it only sleeps."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    return False


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout
