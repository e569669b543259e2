"""The shipment of a job to a cluster: a name that is equal for equal jobs, a command, and the files it needs there.

The code that is sent is these packages alone, never the user's folder. Credentials are not sent: the nodes have theirs.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from urllib.parse import urlsplit

from jobs.errors import BadInput
from jobs.job import Job
from jobs.merge_tasks import digest
from jobs.yaml_nodes import yaml_text
from workers.benchmarks.registry import BENCHMARKS, asked_benchmarks
from workers.fingerprint import package_folders

JOB_FILE = "job.yaml"
MOST_FILE_BYTES = 32 << 20


@dataclass(frozen=True, slots=True)
class Shipment:
    """A job on its way: `name` is the digest of job and output, `files` lie beside the code by these names."""

    name: str
    run: str
    entrypoint: str
    files: Mapping[str, bytes]

    def pack(self, folder: Path) -> None:
        """Writes code and files into a folder."""
        for package in map(Path, package_folders()):
            shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "examples"))
        for name, data in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)


def shipment(job: Job, folder: Path, address: str) -> Shipment:
    """The shipment of a job whose relative paths count from `folder`, to the cluster whose dashboard is at `address`.

    `BadInput` for local parents or outputs, which other machines do not see, unless the address is this machine's own.
    """
    output = job.output.rstrip("/") if "://" in job.output else os.path.abspath(Path(job.output).expanduser())  # noqa: PTH100
    run = f"{output}/{job.name}"
    here = next(_only_here(job, output), None)
    if here is None:
        texts = _texts(job, folder)
        return Shipment(
            _name(job, output, texts),
            run,
            _command(JOB_FILE, output),
            {JOB_FILE: yaml_text(job.document()).encode(), **texts},
        )
    if not is_loopback(address):
        raise BadInput(f"{here}, which the cluster does not see; use object storage, or a folder by its file:// URL")
    if job.source == "-":
        raise BadInput(f"{here}: a job with local paths is submitted from its file, not from standard input")
    return Shipment(_name(job, output, {}), run, _command(str(Path(job.source).resolve()), output), {})


def _name(job: Job, output: str, texts: Mapping[str, bytes]) -> str:
    """Equal for equal jobs and texts, so that two submissions are one."""
    told = {path: hashlib.sha256(data).hexdigest() for path, data in texts.items()}
    return "mergeyard-" + digest([job.digest(), output, told])[:16]


def _command(job_file: str, output: str) -> str:
    words = ["run", job_file, "--output", output, "--address", "auto"]
    return f"python -m orchestrator.cli {shlex.join(words)}"


def _only_here(job: Job, output: str) -> Iterator[str]:
    """The local paths of the job, each with its place. A file:// URL counts as shared by all nodes."""
    for name, url in job.parents.items():
        if "://" not in url:
            yield f"{job.place_of(f'parents.{name}')}: parent {name} is the local folder {url}"
    for recipe in (point.recipe for point in job.points):
        if recipe.aim is not None and "://" not in recipe.aim.statistics:
            yield f"{recipe.place_of('aim')}: `statistics:` names the local file {recipe.aim.statistics}"
        for key, files in (("grams", recipe.grams), ("fisher", recipe.fisher)):
            for model, file in (files or {}).items():
                if "://" not in file:
                    yield f"{recipe.place_of(key)}: `{key}:` names the local file {file} of {model}"
    if "://" not in output:
        yield f"{job.place_of('output')}: the output is the local folder {output}"


def _texts(job: Job, folder: Path) -> dict[str, bytes]:
    """The texts that the evaluation names by a relative path, by that path."""
    return {
        path: _text(path, place, folder) for path, place in _named(job) if not Path(path).expanduser().is_absolute()
    }


def _text(path: str, place: str, folder: Path) -> bytes:
    if path.startswith("~") or ".." in Path(path).parts or path.split("/")[0] in ("jobs", "workers", "orchestrator"):
        raise BadInput(f"{place}: {path} cannot be sent along; put it beside the job file, or into object storage")
    if (folder / path).is_dir():
        raise BadInput(f"{place}: {path} is a folder, and only files are sent along; put it into object storage")
    try:
        data = (folder / path).read_bytes()
    except OSError as error:
        raise BadInput(f"{place}: {path} cannot be read ({error.strerror}); give a text file") from None
    if len(data) > MOST_FILE_BYTES:
        raise BadInput(f"{place}: {path} is larger than {MOST_FILE_BYTES >> 20} MiB; put it into object storage")
    return data


def _named(job: Job) -> Iterator[tuple[str, str]]:
    """Every path in the evaluation, with its place; `BadInput` for one that each worker would have to see."""
    for key, spec in asked_benchmarks(job.evaluate) if job.evaluate is not None else ():
        for path in BENCHMARKS[key].files(spec):
            if path is not None and "://" not in path:
                yield path, spec.place


def is_loopback(address: str) -> bool:
    """Whether a URL names this machine."""
    host = urlsplit(address).hostname or ""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
