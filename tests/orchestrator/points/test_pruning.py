"""Pruning from a user's chair: what is shown, what goes, what stays whatever it scored, and what can be had again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import AccessDenied
from jobs.sealing import sealed, unsealed
from orchestrator.points import pruning
from orchestrator.points.pruning import holdings, prune
from orchestrator.records.lease import Lease
from tests.orchestrator.conftest import Ended, JobText, files_under
from tests.orchestrator.scores import leave_scores
from workers.storage import open_store
from workers.storage.local import LocalStore

Mergeyard = Callable[..., Ended]
SCORES = {"w0.7": 0.9, "w0.3": 0.8, "w0.5": 0.6, "w0.9": 0.4, "w0.1": 0.2}


@pytest.fixture
def job_file(parents: Path, job_text: JobText, tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(job_text(grid="{w: [0.1, 0.3, 0.5, 0.7, 0.9]}", shard_size="5KB"))
    return path


@pytest.fixture
def run(mergeyard: Mergeyard, job_file: Path, tmp_path: Path) -> Path:
    """A finished run of five points, scored as `SCORES` says."""
    assert mergeyard("run", job_file, "--in-process", "-q").code == 0
    leave_scores(tmp_path / "runs" / "soup", {point: {512: score} for point, score in SCORES.items()})
    return tmp_path / "runs" / "soup"


def points(run: Path) -> set[str]:
    """The points of which anything is left."""
    return {path.name for path in (run / "points").iterdir()}


def refused(ended: Ended, line: str, code: int = 2) -> None:
    assert ended.code == code, ended.err
    assert ended.err.startswith("mergeyard: ") and ended.err.count("\n") == 1, ended.err
    assert line in ended.err


def test_a_dry_run_shows_sizes_scores_and_fates_and_changes_nothing(mergeyard: Mergeyard, run: Path) -> None:
    before = files_under(run)
    facts = mergeyard("prune", run, "--keep", 2, "--json").facts
    assert files_under(run) == before
    assert facts["bytes"] == sum(map(len, before.values()))
    shown = {point["point"]: point for point in facts["points"]}
    assert list(shown) == list(SCORES)  # best first
    assert {name: point["score"] / 100 for name, point in shown.items()} == pytest.approx(SCORES)
    assert [name for name, point in shown.items() if point["kept"]] == ["w0.7", "w0.3"]
    size = sum(len(data) for name, data in before.items() if name.startswith("points/w0.5/"))
    assert shown["w0.5"]["bytes"] == size
    assert facts["beside"]["receipts"] == sum(len(data) for name, data in before.items() if "receipts/" in name)
    table = mergeyard("prune", run, "--keep", 2).out
    assert "goes: not among the best 2" in table
    assert "--yes removes 3 points" in table


def test_points_that_only_their_names_parted_are_said_to_be(mergeyard: Mergeyard, run: Path) -> None:
    leave_scores(
        run, {"w0.9": {512: 1.0}, "w0.3": {512: 0.5}, "w0.5": {512: 0.5}, "w0.7": {512: 0.5}, "w0.1": {512: 0}}
    )
    shown = {point["point"]: point for point in mergeyard("prune", run, "--keep", 2, "--json").facts["points"]}
    assert [name for name, point in shown.items() if point["kept"]] == ["w0.9", "w0.3"]
    assert shown["w0.5"]["why"] == shown["w0.7"]["why"] == "not among the best 2, by its name alone"
    assert shown["w0.1"]["why"] == "not among the best 2"


def test_yes_removes_the_points_that_lost_and_run_merges_them_again(
    mergeyard: Mergeyard, run: Path, job_file: Path
) -> None:
    before = files_under(run / "points")
    ended = mergeyard("prune", run, "--keep", 2, "--yes")
    assert "removed: 3 points" in ended.out
    assert points(run) == {"w0.7", "w0.3"}
    kept = {json.loads(path.read_text())["point"] for path in (run / "receipts").rglob("*.json")}
    assert kept == {"w0.7", "w0.3"}
    assert mergeyard("prune", run, "--keep", 2, "--yes", "--json").facts["bytes_to_remove"] == 0
    again = mergeyard("run", job_file, "--in-process", "--json").facts
    assert again["units_found"] * 3 == again["units_merged"] * 2
    assert files_under(run / "points") == before


def test_what_the_gate_passed_and_what_is_blessed_stays(mergeyard: Mergeyard, run: Path, tmp_path: Path) -> None:
    (run / "gate").mkdir()
    (run / "gate" / "verdict.json").write_text(json.dumps({"outcome": "pass", "new": "w0.9", "old": "cos"}))
    blessed = {"point": f"{run}/points/w0.1", "epoch": 3}
    (tmp_path / "runs" / "blessed.json").write_text(json.dumps(blessed))
    ended = mergeyard("prune", run, "--keep", 1, "--yes")
    assert points(run) == {"w0.7", "w0.9", "w0.1"}
    assert "kept: the gate passed it" in ended.out
    assert f"kept: blessed by {tmp_path}/runs/blessed.json" in ended.out


def test_a_point_that_the_gate_failed_may_go(mergeyard: Mergeyard, run: Path) -> None:
    (run / "gate").mkdir()
    (run / "gate" / "verdict.json").write_text(json.dumps({"outcome": "fail", "new": "w0.9", "old": "cos"}))
    mergeyard("prune", run, "--keep", 1, "--yes")
    assert points(run) == {"w0.7"}


def test_a_pointer_that_cannot_be_read_stops_everything(mergeyard: Mergeyard, run: Path) -> None:
    (run / "blessed.json").write_text("{")
    refused(mergeyard("prune", run, "--yes"), "blessed.json: damaged, not JSON", 1)
    assert points(run) == set(SCORES)


def test_a_point_is_blessed_by_whatever_path(mergeyard: Mergeyard, run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "link").symlink_to(run)
    (tmp_path / "runs" / "blessed.json").write_text(json.dumps({"point": f"{run}/points/w0.1"}))
    ended = mergeyard("prune", tmp_path / "elsewhere" / "link", "--keep", 1, "--yes")
    assert ended.code == 0 and points(run) == {"w0.7", "w0.1"}, ended.err
    pointer = {"point": (tmp_path / "elsewhere" / "link" / "points" / "w0.1").as_uri()}
    (tmp_path / "runs" / "blessed.json").write_text(json.dumps(pointer))
    assert mergeyard("prune", run, "--keep", 1, "--yes").code == 0
    assert points(run) == {"w0.7", "w0.1"}


@pytest.mark.parametrize(
    ("pointer", "line", "code"),
    [
        ({"point": "points/w0.1"}, "blessed.json: its point points/w0.1 is a relative path; write the whole path", 2),
        (["points/w0.1"], "blessed.json: damaged, not a JSON object; mend or remove it", 1),
        ({"name": "w0.1"}, "blessed.json: damaged, there is no 'point'; mend or remove it", 1),
    ],
)
def test_a_pointer_that_does_not_say_which_point_stops_everything(
    mergeyard: Mergeyard, run: Path, pointer: object, line: str, code: int
) -> None:
    (run / "blessed.json").write_text(json.dumps(pointer))
    refused(mergeyard("prune", run, "--keep", 1, "--yes"), line, code)
    assert points(run) == set(SCORES)


def test_a_pointer_that_may_not_be_read_stops_everything(
    mergeyard: Mergeyard, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal is made up, since who runs the tests may be root, whom no file refuses."""
    read = LocalStore.read

    def refusing(store: LocalStore, key: str, **more: Any) -> Any:
        if key == "blessed.json" and store.url == str(run.parent):
            raise AccessDenied(f"{store.url}/{key}: not for you")
        return read(store, key, **more)

    monkeypatch.setattr(LocalStore, "read", refusing)
    refused(
        mergeyard("prune", run, "--keep", 1, "--yes"), f"{run.parent}/blessed.json: may not be read, and might name"
    )
    assert points(run) == set(SCORES)


@pytest.mark.parametrize("verdict", ["[1]", '{"outcome": "pass"}', "{", '{"outcome": "pass", "new": 1}'])
def test_a_verdict_that_cannot_be_read_stops_everything(mergeyard: Mergeyard, run: Path, verdict: str) -> None:
    (run / "gate").mkdir()
    (run / "gate" / "verdict.json").write_text(verdict)
    refused(mergeyard("prune", run, "--keep", 1, "--yes"), "gate/verdict.json: ", 1)
    assert points(run) == set(SCORES)


def test_an_evaluation_that_cannot_be_read_stops_everything(mergeyard: Mergeyard, run: Path) -> None:
    (run / "report" / "evaluation.json").write_text("[]")
    refused(mergeyard("prune", run, "--keep", 1, "--yes"), "report/evaluation.json: damaged, not a JSON object", 1)
    assert points(run) == set(SCORES)


def test_the_files_of_a_blessed_twin_stay(mergeyard: Mergeyard, run: Path) -> None:
    plan = unsealed((run / "plan.json").read_bytes())
    plan["points"].append({"name": "twin", "digest": "", "same_as": "w0.1"})
    (run / "plan.json").write_bytes(sealed(plan))
    (run / "points" / "twin").mkdir()
    (run / "points" / "twin" / "manifest.json").write_text("{}")
    (run / "blessed.json").write_text(json.dumps({"point": f"{run}/points/twin"}))
    mergeyard("prune", run, "--keep", 1, "--yes")
    assert points(run) == {"w0.7", "w0.1", "twin"}


def test_the_store_of_the_parents_is_not_asked(
    mergeyard: Mergeyard, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nowhere")
    plan = unsealed((run / "plan.json").read_bytes())
    for parent in plan["parents"].values():
        parent["url"] = "s3://elsewhere/parent"
    (run / "plan.json").write_bytes(sealed(plan))
    assert "--yes removes 3 points" in mergeyard("prune", run, "--keep", 2).out


def test_nothing_goes_without_scores_or_before_the_evaluation_is_finished(mergeyard: Mergeyard, run: Path) -> None:
    scores = {point: {512: score} for point, score in SCORES.items()}
    leave_scores(run, scores, finished=False)
    assert "its evaluation is not finished" in mergeyard("prune", run, "--keep", 1, "--yes").out
    (run / "report" / "evaluation.json").unlink()
    assert "kept: no scores yet" in mergeyard("prune", run, "--keep", 1).out
    refused(mergeyard("prune", run, "--keep", 1, "--yes"), "no scores there to judge by")
    assert points(run) == set(SCORES)


def test_nothing_goes_while_a_driver_is_at_work(
    mergeyard: Mergeyard, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Lease(open_store(run), "lease.json", seconds=2.0, heartbeat=0.2):
        refused(mergeyard("prune", run, "--keep", 1, "--yes"), "already driven", 75)
        assert mergeyard("prune", run, "--keep", 1).code == 0
    assert points(run) == set(SCORES)


def test_an_interrupted_prune_leaves_no_point_that_looks_whole_and_finds_the_rest(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    deleted: list[str] = []
    store_class = type(open_store(run))
    delete = store_class.delete

    def stumbling(store: object, key: str) -> None:
        if len(deleted) == 4:
            raise KeyboardInterrupt
        deleted.append(key)
        delete(store, key)

    monkeypatch.setattr(store_class, "delete", stumbling)
    monkeypatch.setattr(pruning, "READS_AT_ONCE", 1)
    with pytest.raises(KeyboardInterrupt):
        prune(str(run), 1)
    monkeypatch.undo()
    assert deleted[0].endswith("/manifest.json")
    begun = deleted[0].split("/")[1]
    assert any((run / "points" / begun).iterdir())
    prune(str(run), 1)
    assert points(run) == {"w0.7"}
    assert {json.loads(path.read_text())["point"] for path in (run / "receipts").rglob("*.json")} == {"w0.7"}


def test_in_a_bucket_leftovers_of_broken_uploads_go_too(mergeyard: Mergeyard, job_file: Path, s3_url: str) -> None:
    assert mergeyard("run", job_file, "--in-process", "-q", "--output", s3_url).code == 0
    leave_scores(f"{s3_url}/soup", {point: {512: score} for point, score in SCORES.items()})
    store = open_store(f"{s3_url}/soup")
    upload = store.upload("points/w0.7/left-behind")
    upload.write(b"x" * (17 << 20))  # more than one part, so that it is open on the server
    facts = mergeyard("prune", f"{s3_url}/soup", "--keep", 1, "--yes", "--json").facts
    assert facts["leftovers_removed"] == 1
    assert {info.key.split("/")[1] for info in store.list("points/")} == {"w0.7"}
    upload.abort()


def test_a_place_without_a_run_and_a_silly_number_are_refused(mergeyard: Mergeyard, run: Path, tmp_path: Path) -> None:
    refused(mergeyard("prune", tmp_path / "nowhere"), "no run there")
    refused(mergeyard("prune", run, "--keep", 0), "at least 1")
    assert holdings(str(run), 3).lost


def test_status_does_not_wait_for_pruned_points_until_they_are_merged_again(
    mergeyard: Mergeyard, job_file: Path, run: Path
) -> None:
    assert mergeyard("prune", run, "--keep", 2, "--yes").code == 0
    facts = mergeyard("status", run, "--json").facts
    assert (facts["points_done"], facts["waiting"]) == (2, [])
    assert facts["pruned"] == ["w0.1", "w0.5", "w0.9"]
    assert "2 of 5 complete, 3 pruned" in mergeyard("status", run).out
    assert mergeyard("run", job_file, "--in-process", "-q").code == 0
    assert mergeyard("status", run, "--json").facts["pruned"] == []
