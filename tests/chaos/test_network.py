"""The network of namespaces does what the faults rely on."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.chaos.network import Network, why_not
from tests.end_to_end.command import ROOT

pytestmark = pytest.mark.skipif(bool(why_not()), reason=why_not() or "there are namespaces")

SERVE = "import socket, sys; s = socket.create_server((sys.argv[1], 9)); print(); c, _ = s.accept(); {}"
SEND = SERVE.format("c.sendall(bytes(2_000_000))")
TAKE = "import socket, sys, time; s = socket.create_connection((sys.argv[1], 9), 2); s.settimeout(2); n = 0\n{}"
COUNT = TAKE.format("while part := s.recv(1 << 16): n += len(part)\nprint(n)")


@pytest.fixture
def network() -> Iterator[Network]:
    with Network(["one", "two"]) as network:
        yield network


def python(network: Network, name: str, code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [*network.within(name), sys.executable, "-S", "-c", code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def fetch(network: Network) -> tuple[str, float]:
    """What `two` got from `one`, and in how many seconds."""
    server = python(network, "one", SEND, network.address("one"))
    assert server.stdout is not None
    server.stdout.readline()
    began = time.monotonic()
    got, said = python(network, "two", COUNT, network.address("one")).communicate(timeout=20)
    server.kill()
    server.communicate()
    return got.strip() or said.splitlines()[-1], time.monotonic() - began


@pytest.mark.serial
def test_a_link_is_limited_and_counted(network: Network) -> None:
    network.limit("one", megabits=16)  # two million bytes take a second
    before = network.moved("two")[0]
    got, seconds = fetch(network)
    assert got == "2000000"
    assert 0.8 < seconds < 3
    assert 2_000_000 < network.moved("two")[0] - before < 2_300_000


@pytest.mark.parametrize("how", ["cut", "part"])
def test_what_is_cut_is_silent_until_it_heals(network: Network, how: str) -> None:
    network.cut("two") if how == "cut" else network.part("two", "one")
    assert "Error" in fetch(network)[0]
    network.heal("two")
    assert fetch(network)[0] == "2000000"


def test_who_is_apart_sees_no_others_process_and_is_there_again_after_a_kill() -> None:
    count = "import os; print(sum(name.isdigit() for name in os.listdir('/proc')))"
    with Network(["one", "two"], ["two"]) as network:
        for _ in range(2):
            assert int(python(network, "one", count).communicate()[0]) > 10
            assert int(python(network, "two", count).communicate()[0]) == 2
            assert fetch(network)[0] == "2000000"
            network.kill("two")
    assert network.within("one")[1].rpartition("/")[2] not in namespaces()


def test_nothing_is_left_when_the_process_that_made_it_is_killed() -> None:
    program = (
        "import subprocess, time; from tests.chaos.network import Network\n"
        "with Network(['one']) as network:\n"
        "    inside = subprocess.Popen([*network.within('one'), 'sleep', '600'])\n"
        "    print(network.within('one')[1].rpartition('/')[2], inside.pid, network.folder, flush=True)\n"
        "    time.sleep(600)"
    )
    maker = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert maker.stdout is not None
    namespace, pid, folder = maker.stdout.readline().split()
    assert namespace in namespaces() and Path(folder).exists()
    maker.send_signal(signal.SIGKILL)
    maker.communicate()
    deadline = time.monotonic() + 20
    while namespace in namespaces() or Path(f"/proc/{pid}").exists() or Path(folder).exists():
        assert time.monotonic() < deadline, "left behind"
        time.sleep(0.1)


def namespaces() -> str:
    return subprocess.run(["ip", "netns", "list"], check=True, capture_output=True, text=True).stdout
