"""What `infra/kuberay` renders to, by the overlay's name; and programs that end with the test."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
KUBECTL = Path(sys.executable).with_name("kubectl")
TOKEN = "0123456789abcdef" * 4

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="session")
def kustomize(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """`kustomize(overlay)`: how rendering it in a copy of the folder, with a token, ended. No server is asked."""
    folder = tmp_path_factory.mktemp("kuberay")
    shutil.copytree(KUBERAY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("token.env"))
    (folder / "base" / "token.env").write_text(f"auth_token={TOKEN}\n")
    return lambda overlay: run_kustomize(folder / "overlays" / overlay)


def run_kustomize(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([KUBECTL, "kustomize", folder], capture_output=True, text=True, timeout=60)


@pytest.fixture(scope="session")
def rendered(kustomize: Callable[[str], subprocess.CompletedProcess[str]]) -> dict[str, list[dict[str, Any]]]:
    """Overlay → its documents. Do not change them: copy first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for overlay in sorted(path.name for path in (KUBERAY / "overlays").iterdir()):
        done = kustomize(overlay)
        assert (done.returncode, done.stderr) == (0, ""), f"{overlay}: {done.stderr}"
        found[overlay] = list(yaml.safe_load_all(done.stdout))
    return found


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A home of its own, whose name is short enough for Ray's sockets."""
    home = tmp_path_factory.mktemp("t")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    yield {**inherited, "HOME": str(home), "RAY_TMPDIR": str(home), "OMP_NUM_THREADS": "1", "RAY_AUTH_TOKEN": TOKEN}


@pytest.fixture
def start(environment: dict[str, str]) -> Iterator[Start]:
    """`start(command, …)`: running, and ended with the test."""
    running: list[subprocess.Popen[str]] = []

    def begin(*command: str | Path, **extra: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment | extra,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for left in (process, *below):
            with suppress(psutil.NoSuchProcess):
                left.kill()
        process.wait(60)
