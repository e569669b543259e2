"""`--address`: a Ray that runs already, behind a token, whose nodes and whose users have folders of their own."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.command import Command, Ended
from tests.end_to_end.conftest import UNITS, Run
from tests.end_to_end.runtime import HOST, TOKEN, needs_linux, wait_for_runtime
from tests.seaweedfs import free_ports


@pytest.fixture(scope="module")
def address(home: Path, temporary: Path, foreign_code: Path) -> Iterator[str]:
    """Of the head of a Ray of one node, which asks for `TOKEN` and would import the foreign packages."""
    folder = temporary / "cluster"
    folder.mkdir()
    port, client_port = free_ports(2)
    environment = {
        "PATH": "/usr/bin:/bin",
        "HOME": str(home),
        "PYTHONPATH": str(foreign_code),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--node-ip-address={HOST}",
        f"--port={port}", f"--ray-client-server-port={client_port}", "--include-dashboard=false", "--num-cpus=2",
        "--memory=9000000000", "--object-store-memory=100000000", f"--temp-dir={folder}",
    ]  # fmt: skip
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        wait_for_runtime(head, folder / "head.log")
        yield f"{HOST}:{port}"
    finally:
        below = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.kill()
        head.wait()
        for process in below:
            if process.is_running():
                process.kill()


@needs_linux
@pytest.mark.heavy
def test_a_running_cluster_gets_our_code_whatever_else_lies_about(
    start: Callable[..., Command],
    new_run: Callable[..., Run],
    expected: Run,
    address: str,
    foreign_code: Path,
    tmp_path: Path,
) -> None:
    run = new_run(str(tmp_path / "out"))
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    ended = start("run", run.job, "--address", address, "--json", folder=foreign_code, extra=token).ended()
    assert ended.facts["units_merged"] == UNITS
    assert run.manifests() == expected.manifests()


@needs_linux
@pytest.mark.heavy
def test_a_cluster_that_wants_a_token_is_refused_with_the_remedy(
    start: Callable[..., Command], new_run: Callable[..., Run], address: str, tmp_path: Path
) -> None:
    ended = start("run", new_run(str(tmp_path / "out")).job, "--address", address).ended()
    assert ended.code == 2
    assert "set RAY_AUTH_MODE=token" in ended.err.splitlines()[-1]


def test_a_cluster_that_is_not_there_now_is_one_to_try_again_and_that_is_said_at_once(
    here: Callable[..., Ended], new_run: Callable[..., Run], tmp_path: Path
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"  # bound, but nobody listens
        refusal = here("run", new_run(str(tmp_path / "out")).job, "--address", address).refused_with(75)
    assert f"--address {address}: no Ray answers there" in refusal
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("address", ["head", "head:port", "http://head:6379", "127.0.0.1:0", "127.0.0.1:65536"])
def test_an_address_that_is_none_is_bad_input(
    here: Callable[..., Ended], new_run: Callable[..., Run], tmp_path: Path, address: str
) -> None:
    refusal = here("run", new_run(str(tmp_path / "out")).job, "--address", address).refused_with(2)
    assert f"--address {address}: give host:port" in refusal
