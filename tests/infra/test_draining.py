"""The hook that the manifests run before a worker's pod ends, as it is rendered, on a real Ray.

A process namespace stands for the pod: Ray finds the node that is to be drained by looking for its processes.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.infra.manifests import Document, cluster_spec
from tests.seaweedfs import free_ports

HOST = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's address in the network
TASK_SECONDS = 12

POD = """\
ray start --address="$RAY_ADDRESS" --num-cpus=2 --object-store-memory=100000000 --disable-usage-stats --block >&2 &
read -r _
SECONDS=0
bash -c "$1" >&2
echo "the hook ended with $? after $SECONDS seconds"
"""

DRIVER = f"""\
import os, time, ray
ray.init(os.environ["RAY_ADDRESS"], _node_ip_address="{HOST}", log_to_driver=False, logging_level="ERROR")
while ray.cluster_resources().get("CPU", 0) < 2:
    time.sleep(0.5)

@ray.remote(num_cpus=1, max_retries=0)
def work(seconds):
    time.sleep(seconds)
    return "whole"

@ray.remote(num_cpus=1, max_retries=0)
def started():
    return True

ray.get(started.remote())
first = work.remote({TASK_SECONDS})
time.sleep(1)
print("the pod may end", flush=True)
deadline = time.time() + {TASK_SECONDS}
while time.time() < deadline and ray.wait([started.remote()], timeout=2)[0]:
    time.sleep(0.2)
print("no new task is taken" if not ray.wait([first], timeout=0)[0] else "too late to say", flush=True)
print("the task is", ray.get(first), flush=True)
while all(node["Alive"] for node in ray.nodes()):
    time.sleep(0.5)
print("the node is gone:", *[node["DeathReasonMessage"] for node in ray.nodes() if not node["Alive"]], flush=True)
"""


def namespaces() -> bool:
    """Whether this machine lets us have process namespaces."""
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    try:
        return subprocess.run(command, capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.fixture
def launch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """`launch(command…)`: running with a Ray's environment, and ended with the test, with all below it."""
    home = tmp_path_factory.mktemp("d")
    (port,) = free_ports(1)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin:/usr/sbin:/sbin",
        "HOME": str(home),
        "RAY_TMPDIR": str(home),
        "RAY_ADDRESS": f"{HOST}:{port}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
        "OMP_NUM_THREADS": "1",
    }
    running: list[subprocess.Popen[str]] = []

    def begin(*command: str) -> subprocess.Popen[str]:
        filled = [word.replace("PORT", str(port)) for word in command]
        with (home / f"{len(running)}.log").open("w") as log:
            process = subprocess.Popen(
                filled, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        running.append(process)
        return process

    yield begin
    for process in reversed(running):
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for left in (process, *below):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(30)


@pytest.mark.heavy
@pytest.mark.skipif(not namespaces(), reason="needs the right to make process namespaces")
def test_a_pod_that_ends_finishes_its_task_takes_no_other_and_stops(
    rendered: dict[str, list[Document]], launch: Callable[..., subprocess.Popen[str]]
) -> None:
    (cluster,) = (spec for document in rendered["cluster"] if (spec := cluster_spec(document)))
    (worker,) = cluster["workerGroupSpecs"][0]["template"]["spec"]["containers"]
    shell, option, hook = worker["lifecycle"]["preStop"]["exec"]["command"]
    assert (shell, option) == ("/bin/bash", "-c")
    launch(
        "ray", "start", "--head", f"--node-ip-address={HOST}", "--port=PORT", "--num-cpus=0", "--block",
        "--object-store-memory=100000000", "--include-dashboard=false", "--disable-usage-stats",
    )  # fmt: skip
    time.sleep(10)
    pod = launch("unshare", "--pid", "--fork", "--mount-proc", "bash", "-c", POD, "pod", hook)
    driver = launch("python", "-c", DRIVER)
    assert driver.stdout and pod.stdin and pod.stdout
    assert driver.stdout.readline() == "the pod may end\n"
    pod.stdin.write("end\n")
    pod.stdin.flush()
    assert driver.stdout.readline() == "no new task is taken\n"
    assert driver.stdout.readline() == "the task is whole\n"
    assert driver.stdout.readline() == "the node is gone: the pod ends\n"
    ended = re.fullmatch(r"the hook ended with 0 after (\d+) seconds\n", pod.stdout.readline())
    assert ended and int(ended[1]) < 100
