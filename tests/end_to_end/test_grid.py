"""A grid on Ray is the grid merged in one process, and costs the bucket one reading of each parent."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.command import Command, Ended
from tests.end_to_end.conftest import PARENTS, POINTS, UNITS, Run, tensors
from tests.fault_proxy import FaultProxy
from tests.seaweedfs import SeaweedFS

WEIGHTS = {
    f"{name}/model.safetensors": (PARENTS / name / "model.safetensors").stat().st_size for name in ("long", "fmt")
}


def largest_open_file(command: Command) -> int:
    """Size of the largest file that a process below the command has open, but for logs and what is installed."""
    sizes = [0]
    for process in command.look():
        with suppress(psutil.Error, OSError):
            sizes += [
                Path(file.path).stat().st_size
                for file in process.open_files()
                if not file.path.startswith(("/dev/", "/proc/", sys.prefix, sys.base_prefix))
                and "/logs/" not in file.path
                and ".so" not in Path(file.path).suffixes
            ]
    return max(sizes)


def bytes_below(folder: Path) -> int:
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                total += os.lstat(Path(place, name)).st_size
    return total


def test_a_grid_from_bucket_to_bucket_is_the_grid_merged_in_one_process_and_leaves_nothing_else(
    start: Callable[..., Command],
    here: Callable[..., Ended],
    new_run: Callable[..., Run],
    expected: Run,
    parents_in_bucket: str,
    s3_url: str,
    s3_server: SeaweedFS,
    fault_proxy: FaultProxy,
    temporary: Path,
    home: Path,
    foreign_code: Path,
) -> None:
    """From a folder with packages of our names, which are not imported."""
    run = new_run(s3_url, parents=parents_in_bucket)
    sessions = set(temporary.rglob("session_2*"))
    open_files, temporary_bytes = [0], [bytes_below(temporary)]
    command = start("run", run.job, "--json", folder=foreign_code)

    while command.process.poll() is None:
        open_files.append(largest_open_file(command))
        temporary_bytes.append(bytes_below(temporary))
        time.sleep(0.3)
    ended = command.ended()
    assert all(line.startswith("merging ") for line in ended.err.splitlines()), ended.err
    assert ended.facts["units_merged"] == UNITS
    assert ended.facts["bytes_read"] < sum(WEIGHTS.values())

    for name, size in WEIGHTS.items():
        sent = sum(bytes for path, bytes in fault_proxy.sent.items() if path.endswith(f"/parents/{name}"))
        assert 0.95 * size < sent < 1.15 * size, f"{name}: {sent} bytes were sent of a parent of {size}"
    assert max(open_files) < min(WEIGHTS.values())
    assert max(temporary_bytes) - temporary_bytes[0] < min(WEIGHTS.values())

    assert tensors(run.manifests()) == tensors(expected.manifests())
    assert run.shards() == expected.shards()
    assert here("verify", run.url).code == 0

    assert command.survivors(seconds=20) == []
    assert set(temporary.rglob("session_2*")) == sessions
    left = {str(file.relative_to(home)) for file in home.rglob("*") if file.is_file()}
    assert {name for name in left if not name.startswith(".cache/matplotlib/")} <= {".ray/auth_token"}  # but for fonts
    assert "Uploads" not in s3_server.client().list_multipart_uploads(Bucket="tests")


def dare_ties(run: Run) -> Run:
    """The same grid by a method that draws random numbers and looks at whole tensors."""
    text = run.job.read_text().replace("merge_method: linear", "merge_method: dare_ties\n  base_model: base")
    run.job.write_text(text.replace("parents: {", f"parents: {{base: {PARENTS}/base, "))
    return run


@pytest.mark.heavy
@pytest.mark.parametrize("changed", [lambda run: run, dare_ties], ids=["linear", "dare_ties"])
def test_workers_and_memory_change_no_byte(
    mergeyard: Callable[..., Ended], new_run: Callable[..., Run], tmp_path: Path, changed: Callable[[Run], Run]
) -> None:
    manifests: list[dict[str, bytes]] = []
    for number, workers in enumerate(
        (
            "count: 1, cpus: 2, memory: 500MB",
            "count: 2, cpus: 1, memory: 1.1GB",
            "count: 7, cpus: 0.25, memory: 1.3GB",
        )
    ):
        run = changed(new_run(str(tmp_path / f"out{number}"), workers=workers))
        assert mergeyard("run", run.job, "--json").facts["units_merged"] == UNITS
        manifests.append(run.manifests())
    assert len(manifests[0]) == POINTS
    assert all(others == manifests[0] for others in manifests[1:])
