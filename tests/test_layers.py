"""Imports go down one staircase, and a library with a room of its own is imported nowhere else.

The rules are read off the syntax tree, so an import inside a function, under `TYPE_CHECKING` or spelt
`importlib.import_module("ray")` counts as well. Not covered: a module name computed at run time.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAIRCASE = ("jobs", "workers", "orchestrator")
JOBS_MAY_IMPORT = {*sys.stdlib_module_names, "yaml", "jobs"}
ROOMS = {
    "ray": "orchestrator/cluster/",
    "boto3": "workers/storage/",
    "botocore": "workers/storage/",
    "obstore": "workers/storage/",
    "huggingface_hub": "workers/storage/",
    "vllm": "workers/engines/vllm_server.py",
}


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything the module imports; `package` is what its relative imports start from."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, level=0):
                yield node.lineno, module or ""
            case ast.ImportFrom(module=module, level=level, names=names):
                base = [*package[: len(package) - level + 1], *([module] if module else [])]
                yield from ((node.lineno, ".".join([*base, alias.name])) for alias in names)
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name
            case _:
                pass


def objection(importer: str, name: str) -> str | None:
    """Why the file at `importer`, relative to the root, may not import `name`; None if it may."""
    package, library = importer.split("/")[0], name.split(".")[0]
    if library == "infra":
        return "infra is never imported"
    if package in STAIRCASE and library in STAIRCASE and STAIRCASE.index(library) > STAIRCASE.index(package):
        return f"{library} is above {package}"
    if package == "jobs" and library not in JOBS_MAY_IMPORT:
        return "jobs is the standard library and yaml alone"
    if package in STAIRCASE and not importer.startswith(ROOMS.get(library, "")):
        return f"only {ROOMS[library]} may"
    return None


def violations(root: Path) -> list[str]:
    """`file:line: imports NAME: why not`, for every import under `root` that a rule forbids."""
    found: list[str] = []
    for path in sorted(path for top in (*STAIRCASE, "tests") for path in (root / top).rglob("*.py")):
        importer = path.relative_to(root).as_posix()
        package = path.relative_to(root).parent.parts
        for line, name in imports(ast.parse(path.read_text()), package):
            if reason := objection(importer, name):
                found.append(f"{importer}:{line}: imports {name}: {reason}")
    return found


def test_imports_go_down_the_staircase_and_libraries_keep_to_their_rooms():
    assert violations(ROOT) == []


def test_every_step_of_the_staircase_is_looked_at():
    assert all(list((ROOT / package).rglob("*.py")) for package in STAIRCASE)


@pytest.mark.parametrize(
    ("importer", "source", "line", "name"),
    [
        ("jobs/job.py", "import workers.merging", 1, "workers.merging"),
        ("jobs/job.py", "from orchestrator import planning", 1, "orchestrator"),
        ("workers/merging.py", "def merge():\n    from orchestrator.cli import main", 2, "orchestrator.cli"),
        ("workers/merging.py", "if TYPE_CHECKING:\n    import orchestrator", 2, "orchestrator"),
        ("workers/storage/s3.py", "try:\n    import orchestrator as o\nexcept ImportError: ...", 2, "orchestrator"),
        ("workers/merging.py", "\nimportlib.import_module('orchestrator.driver')", 2, "orchestrator.driver"),
        ("jobs/recipe.py", "import numpy as np", 1, "numpy"),
        ("jobs/recipe.py", "def f():\n    __import__('torch')", 2, "torch"),
        ("jobs/recipe.py", "from typing_extensions import Buffer", 1, "typing_extensions"),
        ("jobs/recipe.py", "from .. import workers", 1, "workers"),
        ("orchestrator/driver.py", "import ray", 1, "ray"),
        ("orchestrator/driver.py", "from ray.util.queue import Queue", 1, "ray.util.queue"),
        ("workers/merging.py", "async def f():\n    import os, ray", 2, "ray"),
        ("orchestrator/planning.py", "from botocore.exceptions import ClientError", 1, "botocore.exceptions"),
        ("workers/checkpoint.py", "import boto3", 1, "boto3"),
        ("workers/checkpoint.py", "import obstore as obs", 1, "obstore"),
        ("workers/vocabulary.py", "from huggingface_hub import hf_hub_download", 1, "huggingface_hub"),
        ("workers/engines/vllm_server_client.py", "import vllm", 1, "vllm"),
        ("orchestrator/submitting.py", "import infra.kuberay", 1, "infra.kuberay"),
        ("tests/infra/test_docker.py", "from infra import docker", 1, "infra"),
    ],
)
def test_a_planted_violation_is_found_with_its_file_and_line(
    tmp_path: Path, importer: str, source: str, line: int, name: str
):
    plant(tmp_path, importer, source)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{importer}:{line}: imports {name}: ")


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("jobs/job.py", "import json, yaml\nfrom jobs.errors import BadInput\nfrom .errors import BadInput"),
        ("workers/merging.py", "import torch\nfrom jobs.tasks import MergeTask"),
        ("workers/storage/s3.py", "import boto3, botocore.config, obstore\nfrom . import store"),
        ("workers/engines/vllm_server.py", "def serve():\n    import vllm"),
        (
            "orchestrator/cluster/ray_merging.py",
            "import ray\nfrom ray.util import state\nfrom workers.merging import merge",
        ),
        ("orchestrator/driver.py", "import rayon, vllmish\nfrom orchestrator import ray_pool\nray = 'import ray'"),
        ("tests/orchestrator/cluster/test_ray_cluster.py", "import ray, boto3"),
    ],
)
def test_what_the_house_allows_is_not_objected_to(tmp_path: Path, importer: str, source: str):
    plant(tmp_path, importer, source)
    assert violations(tmp_path) == []


def plant(root: Path, importer: str, source: str) -> None:
    path = root / importer
    path.parent.mkdir(parents=True)
    path.write_text(source)
