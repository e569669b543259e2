"""What `infra/kuberay` renders to, by the overlay's name."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
KUBERAY = ROOT / "infra" / "kuberay"
KUBECTL = Path(sys.executable).with_name("kubectl")
TOKEN = "auth_token=0123456789abcdef\n"


@pytest.fixture(scope="session")
def kustomize(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], subprocess.CompletedProcess[str]]:
    """`kustomize(overlay)`: how rendering it in a copy of the folder, with a token, ended. No server is asked."""
    folder = tmp_path_factory.mktemp("kuberay")
    shutil.copytree(KUBERAY, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("token.env"))
    (folder / "base" / "token.env").write_text(TOKEN)
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
