"""The whole product: the real command, a real Ray, a real S3 server, and the example parents."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest

from tests.end_to_end.command import ROOT, Command, Ended, run_here
from tests.fault_proxy import FaultProxy
from tests.seaweedfs import SeaweedFS
from workers.storage import open_store

PARENTS = ROOT / "jobs" / "examples" / "parents"
POINTS = 5
SHARDS = 9
UNITS = POINTS * SHARDS

JOB = """\
name: grid
parents: {{long: {parents}/long, fmt: {parents}/fmt}}
recipe:
  merge_method: linear
  models:
    - {{model: long, parameters: {{weight: "${{w}}"}}}}
    - {{model: fmt, parameters: {{weight: "${{1 - w}}"}}}}
  dtype: bfloat16
grid: {{w: {{from: 0, to: 1, step: {step}}}}}
point: long{{w}}_fmt{{1-w}}
workers: {{{workers}}}
shard_size: 200KB
output: {output}
"""


@dataclass(frozen=True)
class Run:
    """A job file and where its run lies."""

    job: Path
    url: str

    def receipts(self) -> dict[str, str]:
        """ETag of every receipt, by key."""
        return {info.key: info.etag for info in open_store(self.url).list("receipts/")}

    def manifests(self) -> dict[str, bytes]:
        """Every point's manifest, by key."""
        store = open_store(self.url)
        keys = [info.key for info in store.list("points/") if info.key.endswith("/manifest.json")]
        return {key: bytes(store.read(key)) for key in keys}

    def shards(self) -> dict[str, bytes]:
        """Every shard, by key."""
        store = open_store(self.url)
        keys = [info.key for info in store.list("points/") if info.key.endswith(".safetensors")]
        return {key: bytes(store.read(key)) for key in keys}


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of every command here, with the compiled loops that this user has already."""
    folder = tmp_path_factory.mktemp("home")
    compiled = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser(), "mergeyard")
    compiled.mkdir(parents=True, exist_ok=True)
    (folder / ".cache").mkdir()
    (folder / ".cache" / "mergeyard").symlink_to(compiled)
    return folder


@pytest.fixture(scope="session")
def temporary() -> Iterator[Path]:
    """Where every command here keeps its temporary files; the name is short enough for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="e2e-"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def launch(home: Path, temporary: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Command]:
    """`launch("run", job, …)`: the command with this checkout's code, in a folder of its own, one thread a process."""

    def begin(
        *arguments: str | Path,
        folder: Path | None = None,
        root: Path = ROOT,
        extra: Mapping[str, str] = MappingProxyType({}),
    ) -> Command:
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        ours = {"HOME": str(home), "TMPDIR": str(temporary), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
        folder = folder or tmp_path_factory.mktemp("commands")
        return Command(tuple(str(argument) for argument in arguments), folder, inherited | ours | dict(extra))

    return begin


@pytest.fixture
def start(launch: Callable[..., Command]) -> Iterator[Callable[..., Command]]:
    """`start("run", job, …)`: the command, running; whatever is left of it ends with the test."""
    started: list[Command] = []

    def begin(*arguments: str | Path, **where: Any) -> Command:
        started.append(launch(*arguments, **where))
        return started[-1]

    yield begin
    for command in started:
        command.clean_up()


@pytest.fixture
def mergeyard(start: Callable[..., Command]) -> Callable[..., Ended]:
    """`mergeyard("run", job, …)`: how the command ended."""
    return lambda *arguments: start(*arguments).ended()


@pytest.fixture
def here(tmp_path: Path) -> Callable[..., Ended]:
    """`here("status", run, …)`: how the command ended in this process."""
    return lambda *arguments: run_here(*arguments, folder=tmp_path)


@pytest.fixture(scope="session")
def foreign_code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose packages have our packages' names, and are not ours."""
    folder = tmp_path_factory.mktemp("foreign")
    for package in ("jobs", "workers", "orchestrator"):
        (folder / package).mkdir()
        (folder / package / "__init__.py").write_text("raise ImportError('this is the package of somebody else')\n")
    return folder


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., Run]:
    """`new_run(output, …)`: a job file of five points, nine shards each, that goes there."""
    made: list[Run] = []

    def make(output: str, **how: str) -> Run:
        made.append(write_job(tmp_path / f"job{len(made)}.yaml", output, **how))
        return made[-1]

    return make


def write_job(
    job: Path,
    output: str,
    *,
    parents: str = str(PARENTS),
    workers: str = "cpus: 1, memory: 4GB",
) -> Run:
    """Writes a job file."""
    job.write_text(JOB.format(parents=parents, workers=workers, step=1 / (POINTS - 1), output=output))
    return Run(job, f"{output}/grid")


@pytest.fixture(scope="session")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The grid, merged in one process from local disk to local disk."""
    folder = tmp_path_factory.mktemp("expected")
    run = write_job(folder / "job.yaml", str(folder))
    assert run_here("run", run.job, "--in-process", "--json", folder=folder).facts["units_merged"] == UNITS
    return run


@pytest.fixture
def parents_in_bucket(s3_server: SeaweedFS, s3_url: str) -> str:
    """The URL below which the parents lie."""
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    client = s3_server.client()
    for file in sorted(PARENTS.glob("*/*")):
        client.upload_file(str(file), bucket, f"{prefix}/parents/{file.parent.name}/{file.name}")
    return f"{s3_url}/parents"


@pytest.fixture
def held(fault_proxy: FaultProxy) -> FaultProxy:
    """The proxy, through which no point's fifth shard is written until it heals: a run stays in its middle."""
    fault_proxy.fail("PUT", "hold", times=10**9, key="model-00005-of")
    return fault_proxy


def tensors(manifests: dict[str, bytes]) -> dict[str, object]:
    """What came out of every point, to compare runs whose parents lie in different places."""
    return {key: [json.loads(manifest)[name] for name in ("weights", "tensors")] for key, manifest in manifests.items()}
