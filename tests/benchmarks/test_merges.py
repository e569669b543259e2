"""A short form of the program `merges`: fails if a merge costs twice what it did, counted in plain copies.

The unit is CPU time, because other work on the machine stretches seconds.
"""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import yaml

from orchestrator.cli import main
from tests.benchmarks.make_checkpoints import Size, write_family
from tests.benchmarks.merges import figures, worker
from tests.benchmarks.merges.__main__ import main as merges
from tests.benchmarks.merges.copying import read_and_copy
from tests.benchmarks.merges.documents import RECIPES, document, grid_job
from tests.growth import growth
from workers.merging import shard

ROUNDS = 3
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def parents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base, cos and fmt of 43 million parameters."""
    folder = tmp_path_factory.mktemp("parents")
    write_family(folder / "made", Size(2, 512, 2048, 8, 2, 65536, True))
    return folder / "made"


def copies_of_a_merge(method: str, parents: Path, folder: Path, at_most: float) -> float:
    """CPU seconds of the merge over those of the plain copy, measured in turn."""
    (folder / "config.yaml").write_text(yaml.safe_dump(document(method, parents)))
    *read, copied = (parents / who / "model.safetensors" for who in RECIPES[method].parents)

    def copy_or_merge(merges: int) -> object:
        if merges:
            return main(["merge", str(folder / "config.yaml"), str(folder / "merge"), "--quiet"])
        return read_and_copy(read, copied, folder, 1, synced=True)

    return growth(copy_or_merge, 0, 1, at_most)


@pytest.mark.serial
@pytest.mark.parametrize(("method", "copies"), [("linear", 2.2), ("ties", 8.0)])
def test_a_written_merge_costs_at_most_twice_its_copies(
    method: str, copies: float, parents: Path, tmp_path: Path
) -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as alone:  # without the memory and threads of earlier tests
        found = alone.submit(copies_of_a_merge, method, parents, tmp_path, 2 * copies).result()
    assert found < 2 * copies, f"{found:.1f} copies instead of {copies}"


@pytest.mark.serial
@pytest.mark.parametrize(("method", "copies"), [("linear", 3.0), ("ties", 36.0)])
def test_a_point_into_a_resident_model_costs_at_most_twice_its_copies(
    method: str, copies: float, parents: Path, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(grid_job(method, parents, tmp_path, 4)))
    floor = worker.copy(parents / "cos")["cpu"]
    point = min(worker.resident(tmp_path / "job.yaml")["cpu"] for _ in range(ROUNDS))
    assert point < 2 * copies * floor, f"{point / floor:.1f} copies instead of {copies}"


@pytest.mark.heavy
def test_a_row_is_measured_once_and_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "merges --parameters tiny --rows linear-resident --repeat 1 --without-mergekit --work"
    monkeypatch.setattr("sys.argv", [*words.split(), str(tmp_path)])
    merges()
    (found,) = figures.read(tmp_path / "results.jsonl")
    assert (found["row"], found["points"], [*found["samples"]]) == ("linear-resident", 16, ["floor", "mergeyard"])
    merges()
    assert figures.read(tmp_path / "results.jsonl") == [found]
    assert "`linear`, 16 points into a resident model, a point" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "merges.svg").read_text().count("linear, 16 points into a resident model") == 1


def test_a_worker_can_merge_more_than_the_disk_holds(
    parents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard, "open_store", shard.open_store)  # put back what `task` replaces
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(grid_job("linear", parents, tmp_path / "runs", 2)))
    assert worker.task(tmp_path / "job.yaml")["wall"] > 0
    assert not (tmp_path / "runs").exists()


RESULT = {
    "row": "linear", "parameters": "1.5b", "points": 1, "limit_bytes": None, "commit": "abc", "machine": "2 cores",
    "date": "2026-11-28", "samples": {
        "floor": [{"wall": 2.0, "cpu": 2.0, "rss": 1}],
        "mergeyard": [{"wall": 3.0, "cpu": 4.0, "rss": 1}, {"wall": 5.0, "cpu": 4.0, "rss": 1}],
        "mergekit": [{"wall": 36.0, "cpu": 40.0, "rss": 1}],
    },
}  # fmt: skip


def test_ratios_are_of_the_middle_runs() -> None:
    row = figures.table([RESULT]).splitlines()[4].split(" | ")
    assert row[:7] == ["| `linear`, written", "2", "", "4 ± 1", "4 ± 0", "36", "40"]
    assert row[7:10] == ["9 ×", "10 ×", "2 ×"]


def test_the_table_of_the_page_shows_the_published_results() -> None:
    page = (ROOT / "tests" / "benchmarks" / "README.md").read_text()
    assert figures.with_table(page, figures.read(ROOT / "tests" / "benchmarks" / "merges.jsonl")) == page
