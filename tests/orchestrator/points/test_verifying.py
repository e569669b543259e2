"""`mergeyard verify` finds damage in every file of a run, names it, and the same job mends it."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.errors import CorruptData
from jobs.sealing import MARK, is_sealed
from orchestrator.points.verifying import verify
from tests.orchestrator.conftest import Ended, files_under
from tests.orchestrator.tiny_jobs import RULER, job_text, scaled

KINDS = (
    "plan.json",
    "job.yaml",
    "lease.json",
    "receipts",
    "items",
    "scores",
    "gate",
    "report/evaluation.json",
    "report/results.parquet",
    "report/index.html",
)
FLIPS = 12
"""Of each kind of file, at places that a seed draws."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a job that wrote and judged two points: every kind of record."""
    from orchestrator.cli import main
    from tests.orchestrator.scripts import scripted, turned_down

    folder = tmp_path_factory.mktemp("finished")
    keys = {**scaled([0.5, 1.0]), "evaluate": {"ruler": {**RULER, "items": 8}}, "keep": "all"}
    (folder / "job.yaml").write_text(job_text(folder, **keys))
    with scripted(turned_down):
        assert main(["run", str(folder / "job.yaml"), "--in-process", "--quiet"]) in (0, 3)
    return folder


@pytest.fixture
def run(finished: Path) -> Path:
    return finished / "runs" / "tiny"


def damaged(run: Path) -> list[str]:
    points, records = verify(str(run))
    assert [check for check in points if check.problems] == []
    return [check.record for check in records if check.problems]


def flipped(data: bytes) -> bytes:
    """The data with one bit in the middle flipped."""
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


def of_kind(run: Path, kind: str) -> Path:
    return run / min(name for name in files_under(run) if name == kind or name.startswith(f"{kind}/"))


def test_a_finished_run_has_a_digest_in_every_record(run: Path) -> None:
    _, records = verify(str(run))
    outside = {name for name in files_under(run) if not name.startswith(("points/", "."))}
    assert {check.record for check in records} == outside
    assert all(check.sealed and not check.problems for check in records)
    assert {name.split("/")[0] for name in outside} == {kind.split("/")[0] for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_a_flipped_bit_in_a_record_is_found_and_named(run: Path, kind: str) -> None:
    path = of_kind(run, kind)
    whole, key = path.read_bytes(), path.relative_to(run).as_posix()
    draws = random.Random(kind)
    try:
        for place in draws.sample(range(len(whole)), FLIPS):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << draws.randrange(8)]) + whole[place + 1 :])
            try:
                sealed = is_sealed(path.read_bytes(), key)
            except CorruptData:
                sealed = True
            if sealed:
                assert damaged(run) == [key]
            else:  # the name of the digest itself, and nothing else
                assert path.read_bytes().count(MARK.encode()) < whole.count(MARK.encode()) or path.suffix == ".json"
        path.write_bytes(whole[: len(whole) // 2])
        assert damaged(run) == [key]
        path.write_bytes(b"")
        assert damaged(run) == [key]
    finally:
        path.write_bytes(whole)
    assert damaged(run) == []


GUARDS = ("plan.json", "lease.json")
"""They say whose run it is, so that no program guesses what they were."""


@pytest.mark.parametrize("kinds", [*((kind,) for kind in GUARDS), tuple(kind for kind in KINDS if kind not in GUARDS)])
def test_the_same_job_mends_damaged_records_or_their_remedy_does(
    mergeyard: Callable[..., Ended], finished: Path, run: Path, kinds: tuple[str, ...]
) -> None:
    again = ("run", finished / "job.yaml", "--in-process")
    before = files_under(run)
    paths = [of_kind(run, kind) for kind in kinds]
    for path in paths:
        path.write_bytes(flipped(path.read_bytes()))
    *problems, summary = mergeyard("verify", run).out.splitlines()
    assert re.search(r"; (\d+) of (\d+) records agree with their digests$", summary)
    assert [problem.split(": damaged, ")[0] for problem in problems] == sorted(str(path) for path in paths)
    assert all(problem.endswith("; remove it and run again") for problem in problems)
    ended = mergeyard(*again)
    if kinds[0] in GUARDS:
        assert ended.code == 1 and [ended.err.strip().removeprefix("mergeyard: ")] == problems
        paths[0].unlink()
        ended = mergeyard(*again)
    assert ended.code in (0, 3), ended.err
    asked_again = [str(path.relative_to(run)) for path in paths if "scores" in path.parts]
    assert re.findall(r"(\S+): damaged; its items are asked again", ended.err) == asked_again
    assert mergeyard("verify", run).code == 0
    after = files_under(run)
    assert after.keys() == before.keys()
    changing = re.compile(r"lease\.json|receipts/.*|report/index\.html|\..*")  # a time or a nonce is in them
    assert {name for name in before if before[name] != after[name] and not changing.fullmatch(name)} == set()


def test_the_same_job_mends_damaged_files_of_points(mergeyard: Callable[..., Ended], finished: Path, run: Path) -> None:
    before = files_under(run / "points")
    one, other = run / "points" / "w0.5", run / "points" / "w1"
    (one / "config.json").write_bytes(flipped((one / "config.json").read_bytes()))
    (one / "tokenizer.json").write_bytes((one / "tokenizer.json").read_bytes()[:100])
    (one / "README.md").unlink()
    (other / "manifest.json").write_bytes(flipped((other / "manifest.json").read_bytes()))
    assert mergeyard("run", finished / "job.yaml", "--in-process").code in (0, 3)
    assert files_under(run / "points") == before
    assert mergeyard("verify", run).code == 0


def test_records_of_an_older_version_are_counted_apart(
    mergeyard: Callable[..., Ended], run: Path, tmp_path: Path
) -> None:
    (tmp_path / "gate").mkdir()
    (tmp_path / "gate" / "verdict.json").write_text('{"outcome": "pass"}')
    (tmp_path / "plan.json").write_bytes((run / "plan.json").read_bytes())
    ended = mergeyard("verify", tmp_path)
    assert (ended.code, ended.out) == (
        0,
        "1 of 1 records agree with their digests; 1 records of an older version have no digest\n",
    )
    assert mergeyard("verify", tmp_path, "--json").facts == [
        {"record": "gate/verdict.json", "problems": []},
        {"record": "plan.json", "problems": []},
    ]
