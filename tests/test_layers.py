"""Every file has its room, rooms import downwards only, and a library with a room of its own is imported nowhere else.

The rules are read off the syntax tree, so an import inside a function, under `TYPE_CHECKING` or spelt
`importlib.import_module("ray")` counts as well. Not covered: a module name computed at run time.
"""

from __future__ import annotations

import ast
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("jobs", "workers", "orchestrator")
JOBS_MAY_IMPORT = {*sys.stdlib_module_names, "yaml", "jobs"}
LIBRARIES = {
    "ray": "orchestrator/cluster/",
    "boto3": "workers/storage/",
    "botocore": "workers/storage/",
    "obstore": "workers/storage/",
    "huggingface_hub": "workers/storage/",
    "vllm": "workers/engines/vllm_server.py",
    "numba": "workers/methods/kernels/compiling.py",
    "llvmlite": "workers/methods/kernels/compiling.py",
    "triton": "workers/methods/gpu_kernels/language.py",
}
ROOMS: Mapping[str, tuple[str, ...]] = {
    "jobs": (),
    "workers/fingerprint.py": (),
    "workers/digests.py": ("jobs",),
    "workers/services.py": ("jobs",),
    "workers/special_tokens.py": (),
    "workers/parquet.py": ("jobs",),
    "workers/gpu_memory.py": ("jobs",),
    "workers/half_products.py": (),
    "workers/storage": ("jobs", "workers/services.py"),
    "workers/checkpoints": ("jobs", "workers/digests.py", "workers/storage"),
    "workers/methods/kernels": (),
    "workers/methods/gpu_kernels": (),
    "workers/methods": ("jobs", "workers/methods/kernels", "workers/methods/gpu_kernels"),
    "workers/merging": (
        "jobs",
        "workers/digests.py",
        "workers/gpu_memory.py",
        "workers/storage",
        "workers/checkpoints",
        "workers/methods",
        "workers/methods/kernels",
    ),
    "workers/making": (
        "jobs",
        "workers/half_products.py",
        "workers/digests.py",
        "workers/storage",
        "workers/checkpoints",
    ),
    "workers/engines": (
        "jobs",
        "workers/half_products.py",
        "workers/gpu_memory.py",
        "workers/services.py",
        "workers/special_tokens.py",
        "workers/checkpoints",
    ),
    "workers/benchmarks/items.py": ("jobs", "workers/parquet.py"),
    "workers/benchmarks/texts": (
        "jobs",
        "workers/special_tokens.py",
        "workers/checkpoints",
        "workers/benchmarks/items.py",
    ),
    "workers/benchmarks/scorers.py": ("jobs",),
    "workers/benchmarks/planned.py": (
        "jobs",
        "workers/storage",
        "workers/benchmarks/texts",
        "workers/benchmarks/items.py",
    ),
    "workers/benchmarks/generation.py": (
        "jobs",
        "workers/engines",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
    ),
    "workers/benchmarks/answering.py": (
        "jobs",
        "workers/engines",
        "workers/benchmarks/items.py",
        "workers/benchmarks/scorers.py",
        "workers/benchmarks/generation.py",
    ),
    "workers/benchmarks/ruler": (
        "jobs",
        "workers/benchmarks/items.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/generation.py",
    ),
    "workers/benchmarks/needle.py": (
        "jobs",
        "workers/benchmarks/items.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/generation.py",
        "workers/benchmarks/ruler",
    ),
    "workers/benchmarks/perplexity.py": (
        "jobs",
        "workers/parquet.py",
        "workers/engines",
        "workers/benchmarks/items.py",
        "workers/benchmarks/answering.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
    ),
    "workers/benchmarks/questions.py": (
        "jobs",
        "workers/benchmarks/items.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
    ),
    "workers/benchmarks/nolima.py": (
        "jobs",
        "workers/benchmarks/items.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/generation.py",
        "workers/benchmarks/needle.py",
    ),
    "workers/benchmarks/mrcr.py": (
        "jobs",
        "workers/benchmarks/items.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/generation.py",
        "workers/benchmarks/questions.py",
    ),
    "workers/benchmarks/babilong": (
        "jobs",
        "workers/benchmarks/items.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/generation.py",
        "workers/benchmarks/questions.py",
    ),
    "workers/benchmarks/helmet": (
        "jobs",
        "workers/benchmarks/items.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/generation.py",
        "workers/benchmarks/questions.py",
        "workers/benchmarks/ruler",
    ),
    "workers/benchmarks/longbench_v2.py": (
        "jobs",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/generation.py",
        "workers/benchmarks/questions.py",
    ),
    "workers/benchmarks/custom.py": (
        "jobs",
        "workers/benchmarks/scorers.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/generation.py",
        "workers/benchmarks/questions.py",
    ),
    "workers/benchmarks/harness": (
        "jobs",
        "workers/engines",
        "workers/benchmarks/answering.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/generation.py",
    ),
    "workers/benchmarks/registry.py": (
        "jobs",
        "workers/engines",
        "workers/benchmarks/items.py",
        "workers/benchmarks/answering.py",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/ruler",
        "workers/benchmarks/needle.py",
        "workers/benchmarks/babilong",
        "workers/benchmarks/helmet",
        "workers/benchmarks/longbench_v2.py",
        "workers/benchmarks/perplexity.py",
        "workers/benchmarks/harness",
        "workers/benchmarks/mrcr.py",
        "workers/benchmarks/nolima.py",
        "workers/benchmarks/custom.py",
    ),
    "workers/benchmarks/sets.py": ("jobs", "workers/storage", "workers/benchmarks/planned.py"),
    "workers/activations": (
        "jobs",
        "workers/half_products.py",
        "workers/gpu_memory.py",
        "workers/storage",
        "workers/checkpoints",
        "workers/methods",
        "workers/methods/kernels",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
    ),
    "workers/evaluating": (
        "jobs",
        "workers/digests.py",
        "workers/parquet.py",
        "workers/storage",
        "workers/checkpoints",
        "workers/merging",
        "workers/engines",
        "workers/benchmarks/answering.py",
        "workers/benchmarks/registry.py",
    ),
    "orchestrator/words.py": ("jobs",),
    "orchestrator/watching.py": ("jobs", "orchestrator/words.py"),
    "orchestrator/judging": ("jobs",),
    "orchestrator/searching": ("jobs", "orchestrator/judging"),
    "orchestrator/records": ("jobs", "workers/storage", "workers/checkpoints"),
    "orchestrator/planning": (
        "jobs",
        "workers/storage",
        "workers/checkpoints",
        "workers/methods",
        "workers/merging",
        "orchestrator/words.py",
        "orchestrator/records",
    ),
    "orchestrator/cluster": (
        "jobs",
        "workers/digests.py",
        "workers/fingerprint.py",
        "workers/gpu_memory.py",
        "workers/storage",
        "workers/benchmarks/items.py",
        "workers/benchmarks/registry.py",
        "workers/benchmarks/scorers.py",
        "workers/merging",
        "workers/evaluating",
    ),
    "orchestrator/merging": (
        "jobs",
        "workers/digests.py",
        "workers/storage",
        "workers/checkpoints",
        "orchestrator/words.py",
        "orchestrator/watching.py",
        "orchestrator/records",
        "orchestrator/planning",
        "orchestrator/cluster",
    ),
    "orchestrator/making": (
        "jobs",
        "workers/digests.py",
        "workers/storage",
        "workers/checkpoints",
        "workers/methods",
        "workers/merging",
        "workers/making",
        "orchestrator/words.py",
        "orchestrator/records",
        "orchestrator/planning",
        "orchestrator/merging",
    ),
    "orchestrator/evaluating": (
        "jobs",
        "orchestrator/words.py",
        "workers/storage",
        "workers/checkpoints",
        "workers/engines",
        "workers/benchmarks/texts",
        "workers/benchmarks/planned.py",
        "workers/benchmarks/harness",
        "workers/benchmarks/registry.py",
        "workers/benchmarks/sets.py",
        "workers/evaluating",
        "orchestrator/watching.py",
        "orchestrator/judging",
        "orchestrator/searching",
        "orchestrator/records",
        "orchestrator/planning",
        "orchestrator/cluster",
    ),
    "orchestrator/viewing": (
        "jobs",
        "workers/storage",
        "workers/benchmarks/items.py",
        "workers/benchmarks/registry.py",
        "orchestrator/evaluating",
    ),
    "orchestrator/report": (
        "jobs",
        "workers/digests.py",
        "workers/storage",
        "workers/merging",
        "workers/benchmarks/registry.py",
        "orchestrator/words.py",
        "orchestrator/judging",
        "orchestrator/searching",
        "orchestrator/records",
        "orchestrator/planning",
        "orchestrator/merging",
        "orchestrator/evaluating",
        "orchestrator/viewing",
    ),
    "orchestrator/points": (
        "jobs",
        "workers/digests.py",
        "workers/storage",
        "workers/checkpoints",
        "orchestrator/words.py",
        "orchestrator/judging",
        "orchestrator/records",
        "orchestrator/evaluating",
        "orchestrator/report",
    ),
    "orchestrator/nightly": (
        "jobs",
        "workers/digests.py",
        "workers/services.py",
        "workers/storage",
        "workers/checkpoints",
        "orchestrator/words.py",
        "orchestrator/watching.py",
        "orchestrator/judging",
        "orchestrator/records",
        "orchestrator/planning",
        "orchestrator/cluster",
        "orchestrator/merging",
        "orchestrator/evaluating",
        "orchestrator/report",
    ),
    "orchestrator/commands": (
        "jobs",
        "workers/fingerprint.py",
        "workers/gpu_memory.py",
        "workers/storage",
        "workers/activations",
        "orchestrator/words.py",
        "orchestrator/watching.py",
        "orchestrator/judging",
        "orchestrator/records",
        "orchestrator/planning",
        "orchestrator/cluster",
        "orchestrator/merging",
        "orchestrator/making",
        "orchestrator/evaluating",
        "orchestrator/viewing",
        "orchestrator/report",
        "orchestrator/points",
        "orchestrator/nightly",
    ),
    "orchestrator/notebook": (
        "jobs",
        "workers/storage",
        "workers/evaluating",
        "orchestrator/watching.py",
        "orchestrator/records",
        "orchestrator/planning",
        "orchestrator/cluster",
        "orchestrator/merging",
        "orchestrator/report",
        "orchestrator/commands",
    ),
    "orchestrator/cli.py": ("jobs", "orchestrator/commands"),
}
"""Every room from the ground up, a folder or a file, and the rooms that it uses."""


def imports(tree: ast.Module, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and dotted name of everything that is imported; `package` is the start of relative imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((node.lineno, alias.name) for alias in names)
            case ast.ImportFrom(module=module, level=level, names=names):
                base = [*package[: len(package) - level + 1]] if level else []
                yield from (
                    (node.lineno, ".".join([*base, *([module] if module else []), alias.name])) for alias in names
                )
            case ast.Call(
                func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield node.lineno, name
            case _:
                pass


@cache
def room_of(path: str) -> str | None:
    """The room of a file, or of a dotted name written with slashes, relative to the root; None if it has none."""
    found = [room for room in ROOMS if f"{path.removesuffix('.py')}/".startswith(f"{room.removesuffix('.py')}/")]
    return max(found, key=len, default=None)


def objection(importer: str, name: str) -> str | None:
    """Why the file at `importer`, relative to the root, may not import `name`; None if it may."""
    package, library = importer.split("/")[0], name.split(".")[0]
    if library == "infra":
        return "infra is never imported"
    if package not in PACKAGES:
        return None
    if library in PACKAGES:
        return _upwards(room_of(importer), room_of(name.replace(".", "/")))
    if package == "jobs" and library not in JOBS_MAY_IMPORT:
        return "jobs is the standard library and yaml alone"
    return None if importer.startswith(LIBRARIES.get(library, "")) else f"only {LIBRARIES[library]} may"


def _upwards(here: str | None, there: str | None) -> str | None:
    if here is None or there is None:
        return "in no room of ROOMS"
    if here == there or there in ROOMS[here]:
        return None
    rooms = [*ROOMS]
    above = rooms.index(there) > rooms.index(here)
    return f"{there} is above {here}" if above else f"{there} is not in the row of {here} in ROOMS"


@cache
def modules(root: Path) -> Mapping[str, tuple[bool, list[tuple[int, str]]]]:
    """By path relative to the root: whether a module has more than a docstring, and its imports.

    A test may import anything but infra, so only tests with that word are parsed.
    """
    found: dict[str, tuple[bool, list[tuple[int, str]]]] = {}
    for path in sorted(path for package in (*PACKAGES, "tests") for path in (root / package).rglob("*.py")):
        here, text = path.relative_to(root), path.read_text()
        if here.parts[0] in PACKAGES or "infra" in text:
            tree = ast.parse(text)
            more = any(not isinstance(node, ast.Expr) for node in tree.body)
            found[here.as_posix()] = more, [*imports(tree, here.parent.parts)]
    return found


def violations(root: Path) -> list[str]:
    """One line for every file without a room, and for every import under `root` that a rule forbids."""
    found: list[str] = []
    for path, (more, imported) in modules(root).items():
        if path.split("/")[0] in PACKAGES and room_of(path) is None and more:
            found.append(f"{path}:1: stands in no room; add one to ROOMS and to README's map")
        for line, name in imported:
            if reason := objection(path, name):
                found.append(f"{path}:{line}: imports {name}: {reason}")
    return found


def test_imports_go_down_the_staircase_and_libraries_keep_to_their_rooms():
    assert violations(ROOT) == []


def test_every_row_names_rooms_below_it_and_only_those_that_it_uses():
    used: dict[str, set[str]] = defaultdict(set)
    for path, (_, imported) in modules(ROOT).items():
        here = room_of(path)
        for _, name in imported:
            there = room_of(name.replace(".", "/"))
            if here is not None and there is not None and here != there:
                used[here].add(there)
    below: list[str] = []
    for room, uses in ROOMS.items():
        assert set(uses) <= set(below), f"{room}: a row above it"
        assert set(uses) == used[room], f"{room}: says more or less than the code"
        below.append(room)


def test_the_map_on_the_front_page_shows_every_room():
    drawn = re.findall(r"^((?:jobs|workers|orchestrator)[a-z_/]*)/ +\S", (ROOT / "README.md").read_text(), re.MULTILINE)
    folders = {room for room in ROOMS if not room.endswith(".py")}
    assert {*drawn} == folders | {"jobs", "workers", "workers/benchmarks", "orchestrator"}


def test_the_top_of_the_orchestrator_holds_rooms_and_at_most_four_files():
    files = [path.name for path in (ROOT / "orchestrator").glob("*.py") if path.name != "__init__.py"]
    assert len(files) <= 4, files


def test_every_room_exists():
    assert [room for room in ROOMS if not (ROOT / room).exists()] == []


@pytest.mark.parametrize(
    ("importer", "source", "line", "name"),
    [
        ("jobs/job.py", "import workers.merging", 1, "workers.merging"),
        ("jobs/job.py", "from orchestrator import planning", 1, "orchestrator.planning"),
        ("workers/merging/shard.py", "def f():\n    from orchestrator.cli import main", 2, "orchestrator.cli.main"),
        ("workers/merging/shard.py", "if TYPE_CHECKING:\n    import orchestrator", 2, "orchestrator"),
        ("workers/storage/s3.py", "try:\n    import orchestrator as o\nexcept ImportError: ...", 2, "orchestrator"),
        (
            "workers/storage/s3.py",
            "from workers.merging.shard import merge_task",
            1,
            "workers.merging.shard.merge_task",
        ),
        ("workers/merging/shard.py", "\nimportlib.import_module('orchestrator.cli')", 2, "orchestrator.cli"),
        ("jobs/recipe.py", "import numpy", 1, "numpy"),
        ("jobs/recipe.py", "def f():\n    __import__('torch')", 2, "torch"),
        ("jobs/recipe.py", "from typing_extensions import Buffer", 1, "typing_extensions.Buffer"),
        ("jobs/recipe.py", "from .. import workers", 1, "workers"),
        ("orchestrator/judging/race.py", "from orchestrator.report import page", 1, "orchestrator.report.page"),
        ("orchestrator/judging/race.py", "import orchestrator.records.lease", 1, "orchestrator.records.lease"),
        ("orchestrator/merging/driver.py", "import ray", 1, "ray"),
        ("orchestrator/merging/driver.py", "from ray.util.queue import Queue", 1, "ray.util.queue.Queue"),
        ("workers/merging/shard.py", "async def f():\n    import os, ray", 2, "ray"),
        ("orchestrator/planning/plan.py", "from botocore.exceptions import Error", 1, "botocore.exceptions.Error"),
        ("workers/checkpoints/opening.py", "import boto3", 1, "boto3"),
        ("workers/checkpoints/opening.py", "import obstore as obs", 1, "obstore"),
        ("workers/checkpoints/names.py", "from huggingface_hub import HfApi", 1, "huggingface_hub.HfApi"),
        ("workers/engines/vllm_server_client.py", "import vllm", 1, "vllm"),
        ("orchestrator/cluster/shipment.py", "import infra.kuberay", 1, "infra.kuberay"),
        ("tests/infra/test_docker.py", "from infra import docker", 1, "infra.docker"),
    ],
)
def test_a_planted_violation_is_found_with_its_file_and_line(
    tmp_path: Path, importer: str, source: str, line: int, name: str
):
    plant(tmp_path, importer, source)
    (found,) = violations(tmp_path)
    assert found.startswith(f"{importer}:{line}: imports {name}: ")


@pytest.mark.parametrize("stray", ["orchestrator/helpers.py", "workers/benchmarks/toys.py", "workers/utils/text.py"])
def test_a_file_in_no_room_is_found(tmp_path: Path, stray: str):
    plant(tmp_path, stray, '"""Help."""\n\nMOST = 3\n')
    assert violations(tmp_path) == [f"{stray}:1: stands in no room; add one to ROOMS and to README's map"]


@pytest.mark.parametrize(
    ("importer", "source"),
    [
        ("jobs/job.py", "import json, yaml\nfrom jobs.errors import BadInput\nfrom .errors import BadInput"),
        ("workers/merging/shard.py", "import torch\nfrom jobs.merge_tasks import MergeTask"),
        ("workers/storage/s3.py", "import boto3, botocore.config, obstore\nfrom . import store"),
        ("workers/engines/vllm_server.py", "def serve():\n    import vllm"),
        ("orchestrator/cluster/ray_merging.py", "import ray\nfrom ray.util import state\nimport workers.merging.shard"),
        (
            "orchestrator/merging/driver.py",
            "import rayon, vllmish\nfrom orchestrator.cluster import pool\nray = 'import ray'",
        ),
        ("tests/orchestrator/cluster/test_ray_cluster.py", "import ray, boto3"),
    ],
)
def test_a_permitted_import_is_not_objected_to(tmp_path: Path, importer: str, source: str):
    plant(tmp_path, importer, source)
    assert violations(tmp_path) == []


def plant(root: Path, importer: str, source: str) -> None:
    path = root / importer
    path.parent.mkdir(parents=True)
    path.write_text(source)
