"""What can be known of the image without building it: there is no Docker here, so nothing proves that it builds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.infra.reading import DOCKERFILE, instructions

ROOT = Path(__file__).parents[2]
HADOLINT = Path(sys.executable).with_name("hadolint")
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def sources(steps: list[tuple[str, str]]) -> list[str]:
    """What is copied out of the build context."""
    copied = [rest.split() for name, rest in steps if name in ("COPY", "ADD")]
    return [source for words in copied if not words[0].startswith("--from") for source in words[:-1]]


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore keeps the path out of the build: the last pattern that speaks of it decides."""
    verdict = False
    for pattern in patterns:
        bare = pattern.removeprefix("!").removeprefix("**/")
        parents = [path, *map(str, Path(path).parents)]
        names = parents if "**/" not in pattern else list(Path(path).parts)
        if any(fnmatch(name, bare) for name in names if name != "."):
            verdict = not pattern.startswith("!")
    return verdict


def patterns() -> list[str]:
    lines = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def complaints(text: str) -> Iterator[str]:
    """What the house has against a Dockerfile, beside hadolint."""
    steps = instructions(text)
    for image in (rest.split()[0] for name, rest in steps if name == "FROM"):
        if ":" not in image or image.endswith(":latest"):
            yield f"{image} is another one tomorrow"
    for source in sources(steps):
        if not (ROOT / source).exists():
            yield f"{source} does not exist"
        elif ignored(source, patterns()):
            yield f"{source} is kept out by .dockerignore"
    users = [rest for name, rest in steps if name == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*(:\d+)?", users[-1]):
        yield "the user is root, or Kubernetes cannot tell"
    commands = " && ".join(rest for name, rest in steps if name == "RUN").split("&&")
    for command in commands:
        installs = "pip install" in command and "--no-deps" not in command
        if installs and "--constraint constraints.txt" not in command:
            yield f"{command.strip()[:40]} takes whatever is newest"
    entry = [json.loads(rest) for name, rest in steps if name == "ENTRYPOINT"]
    if entry != [list(PYPROJECT["project"]["scripts"])]:
        yield "the entrypoint is not the command"
    if any(re.search(r"TOKEN=|PASSWORD|SECRET", rest) for _, rest in steps):
        yield "a secret is in the image"


def test_hadolint_has_nothing_against_it() -> None:
    done = subprocess.run([HADOLINT, DOCKERFILE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_is_asked() -> None:
    planted = DOCKERFILE.read_text("utf-8").replace("WORKDIR /opt/mergeyard", "WORKDIR mergeyard")
    done = subprocess.run([HADOLINT, "-"], input=planted, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0 and "DL3000" in done.stdout


def test_the_house_has_nothing_against_it() -> None:
    assert list(complaints(DOCKERFILE.read_text("utf-8"))) == []


@pytest.mark.parametrize(
    ("there", "instead", "complaint"),
    [
        ("python:3.12-slim-bookworm", "python:latest", "another one tomorrow"),
        ("COPY jobs jobs", "COPY job jobs", "job does not exist"),
        ("COPY jobs jobs", "COPY tests tests", "tests is kept out"),
        ("USER 1000:1000", "", "the user is root"),
        ("USER 1000:1000", "USER mergeyard", "the user is root"),
        ("--constraint constraints.txt --requirement", "--requirement", "whatever is newest"),
        ('ENTRYPOINT ["mergeyard"]', 'ENTRYPOINT ["merge"]', "not the command"),
        ("RAY_AUTH_MODE=token", "RAY_AUTH_TOKEN=abc", "a secret"),
    ],
)
def test_a_planted_mistake_is_complained_about(there: str, instead: str, complaint: str) -> None:
    text = DOCKERFILE.read_text("utf-8")
    assert there in text
    assert any(complaint in found for found in complaints(text.replace(there, instead)))


def test_its_python_is_one_that_mergeyard_takes() -> None:
    image = next(rest for name, rest in instructions(DOCKERFILE.read_text("utf-8")) if name == "FROM")
    major, minor = re.findall(r"\d+", image)[:2]
    least = PYPROJECT["project"]["requires-python"].removeprefix(">=")
    assert (int(major), int(minor)) >= tuple(map(int, least.split(".")))


def test_data_credentials_and_history_stay_outside() -> None:
    for path in (".git/config", ".env", "runs/demo/job.yaml", "infra/kuberay/base/token.env", "tests/conftest.py"):
        assert ignored(path, patterns()), path
    assert ignored("jobs/__pycache__/job.cpython-312.pyc", patterns())
    assert not ignored("jobs/examples/demo.yaml", patterns())


def test_what_is_copied_is_all_that_a_plan_needs(tmp_path: Path) -> None:
    for source in sources(instructions(DOCKERFILE.read_text("utf-8"))):
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / source, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / source, tmp_path / source)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    script = "import orchestrator.cli as c, sys; print(c.__file__); sys.exit(c.main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "jobs/examples/demo.yaml", "--output", str(tmp_path / "runs")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(str(tmp_path))


def test_everything_that_is_installed_is_copied() -> None:
    copied = set(sources(instructions(DOCKERFILE.read_text("utf-8"))))
    project = PYPROJECT["project"]
    licences = [name for name in project["license-files"] if name.split("/")[0] not in copied]
    assert licences == []
    assert {*PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"], project["readme"]} <= copied
