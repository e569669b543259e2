"""Parents, jobs over them, the command line in this process, and answers by a function in place of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from jobs.job import Job, load_job
from jobs.sealing import sealed, unsealed
from orchestrator.cli import main
from orchestrator.planning.plan import Plan, make_plan
from tests.orchestrator.models import weights, write_model
from tests.orchestrator.scripts import scripted, turned_down

LINEAR = """
  merge_method: linear
  models:
  - {model: cos, parameters: {weight: "${w}"}}
  - {model: fmt, parameters: {weight: "${1 - w}"}}
  dtype: bfloat16
"""


@pytest.fixture
def parents(tmp_path: Path) -> Path:
    """A folder with base, cos and fmt: siblings in bfloat16, tied, one file each."""
    for who in ("base", "cos", "fmt"):
        write_model(tmp_path / "parents" / who, weights(who))
    return tmp_path / "parents"


JobText = Callable[..., str]


@pytest.fixture
def job_text(tmp_path: Path) -> JobText:
    """job_text(grid=…, recipe=…, **more): the YAML of a job over the parents that its recipe names."""

    def text(grid: str = "{w: [0.25, 0.5]}", recipe: str = LINEAR, **more: Any) -> str:
        used = [name for name in ("base", "cos", "fmt", "other") if f"model: {name}" in recipe]
        lines = [
            "name: soup",
            "parents:",
            *(f"  {name}: {tmp_path}/parents/{name}" for name in used),
            f"recipe:{recipe.rstrip()}",
            *([f"grid: {grid}"] if grid else []),
            f"output: {tmp_path}/runs",
            *(f"{key}: {value}" for key, value in more.items()),
        ]
        return "\n".join(lines) + "\n"

    return text


@pytest.fixture
def job(job_text: JobText) -> Callable[..., Job]:
    """job(**as job_text): the job itself."""
    return lambda **more: load_job(job_text(**more), "job.yaml")


@pytest.fixture
def plan(job: Callable[..., Job], parents: Path) -> Callable[..., Plan]:
    """plan(**as job_text): the plan over the parents."""
    return lambda **more: make_plan(job(**more))


@dataclass(frozen=True)
class Ended:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> Any:
        """What `--json` printed."""
        return json.loads(self.out)


@pytest.fixture
def mergeyard(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """mergeyard("plan", path, …): the command, run in this process."""

    def run(*arguments: object) -> Ended:
        capfd.readouterr()
        code = main([os.fspath(part) if isinstance(part, Path) else str(part) for part in arguments])
        captured = capfd.readouterr()
        return Ended(code, captured.out, captured.err)

    return run


@pytest.fixture
def real_model() -> None:
    """The models of this test answer themselves."""


@pytest.fixture
def figures() -> None:
    """The pages that this test writes have their figures."""


@pytest.fixture(autouse=True)
def light_pages(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages have no figures, which take two seconds, unless the test uses `figures`."""
    if "figures" not in request.fixturenames:
        monkeypatch.setattr("orchestrator.report.page.sections", lambda report, view="": [])


@pytest.fixture(autouse=True)
def answers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Evaluations in this process ask a function, unless the test uses `real_model`."""
    if "real_model" in request.fixturenames:
        yield
    else:
        with scripted(turned_down):
            yield


def edit(path: Path, **changes: Any) -> dict[str, Any]:
    """Changes entries of a JSON file as another writer would, with its digest; returns the new document."""
    document = {**unsealed(path.read_bytes(), older=True), **changes}
    path.write_bytes(sealed(document))
    return document


def files_under(folder: Path) -> dict[str, bytes]:
    """Every file by its path below the folder."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }
