"""The command line from a user's chair: what it makes, what it says, what it refuses, and its exit codes."""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs import stopping
from jobs.errors import RunBusy, StorageUnavailable, Unavailable, WorkerLost
from jobs.job import load_job
from jobs.manifest import Manifest
from jobs.sealing import sealed, unsealed
from orchestrator.cluster.in_process import InProcessPool
from orchestrator.commands import schema as schema_command
from orchestrator.merging import driver
from orchestrator.merging.driver import drive
from orchestrator.planning.plan import make_plan
from orchestrator.records.lease import Lease
from orchestrator.records.ledger import Ledger
from orchestrator.watching import Watcher
from tests.orchestrator.conftest import Ended, files_under
from tests.orchestrator.models import CONFIG, HIDDEN, VOCABULARY, load_model, weights, write_model
from tests.orchestrator.trajectories import trajectory_job, write_run
from workers.storage import open_store
from workers.storage.local import LocalStore
from workers.storage.retrying import patiently

Mergeyard = Callable[..., Ended]

MERGE = """\
merge_method: linear
models:
- {{model: {parents}/cos, parameters: {{weight: 0.7}}}}
- {{model: {parents}/fmt, parameters: {{weight: 0.3}}}}
dtype: bfloat16
"""


@pytest.fixture
def job_file(parents: Path, job_text: Callable[..., str], tmp_path: Path) -> Callable[..., Path]:
    """job_file(**as job_text): the path of a job file."""

    def write(**more: Any) -> Path:
        path = tmp_path / "job.yaml"
        path.write_text(job_text(**more))
        return path

    return write


@pytest.fixture
def config(parents: Path, tmp_path: Path) -> Path:
    """A mergekit document: cos and fmt, 0.7 and 0.3."""
    path = tmp_path / "merge.yml"
    path.write_text(MERGE.format(parents=parents))
    return path


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "soup"


def assert_refused(ended: Ended, line: str, *, code: int = 2) -> None:
    """One line on standard error, nothing on standard output."""
    lines = ended.err.splitlines()
    assert lines[-1].startswith("mergeyard: ") and line in lines[-1]
    assert len(lines) == 1 or code != 2, "progress, although nothing was to be written"
    assert ended.out == ""
    assert ended.code == code


# ---- plan


def test_plan_writes_nothing_and_counts_bytes(mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path):
    path = job_file(shard_size=3000)
    before = files_under(tmp_path)
    facts = mergeyard("plan", path, "--json").facts
    assert files_under(tmp_path) == before
    one_model = sum(tensor.nbytes for tensor in weights("cos").values())
    assert facts["points"] == ["w0.25", "w0.5"]
    assert facts["bytes_to_read"] == 2 * one_model
    assert facts["bytes_to_write"] == 2 * one_model
    assert facts["units"] == 2 * facts["shards_a_point"]
    assert facts["units_done"] == 0


def test_plan_says_what_is_done_already(mergeyard: Mergeyard, job_file: Callable[..., Path]):
    path = job_file()
    assert mergeyard("run", path, "--in-process").code == 0
    facts = mergeyard("plan", path, "--json").facts
    assert (facts["units_done"], facts["tasks"], facts["bytes_to_read"]) == (2, 0, 0)
    ended = mergeyard("plan", path)
    assert ended.code == 0
    assert "2 of 2 shards" in ended.out


def test_a_plan_lists_the_checkpoints_of_a_trajectory_in_one_row(mergeyard: Mergeyard, tmp_path: Path):
    write_run(tmp_path, 5)
    job = tmp_path / "job.yaml"
    job.write_text(trajectory_job(str(tmp_path), 5, str(tmp_path / "runs"), grid="{k: [2, 4], shape: [uniform]}"))
    facts = mergeyard("plan", job, "--json").facts
    assert facts["trajectories"] == {"step": ["step-2", "step-3", "step-4", "step-5"]} and len(facts["parents"]) == 4
    assert [*facts["points"]] == ["k2", "k4"]
    out = mergeyard("plan", job).out
    urls = f"{tmp_path}/step-2, {tmp_path}/step-3, {tmp_path}/step-4 … {tmp_path}/step-5"
    assert f"parents step  4 checkpoints: {urls}  (" in out and "parent step-2" not in out


def test_plan_refuses_an_output_that_run_could_not_write(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "notes.txt").write_text("a file")
    ended = mergeyard("plan", job_file(), "--output", tmp_path / "notes.txt" / "runs")
    assert_refused(ended, f"{tmp_path}/notes.txt is a file, not a folder; choose another path")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # root may write all
    ended = mergeyard("plan", job_file(), "--output", tmp_path / "runs")
    assert_refused(ended, f"the folder {tmp_path} cannot be written; choose another path")


@pytest.mark.parametrize(
    ("workers", "lack"),
    [
        ("{cpus: 100000}", r"a worker takes 100000 CPUs and this machine has \d+"),
        ("{memory: 900TB}", r"a worker takes 900000.0 GB and this machine has [\d.]+ GB"),
        ("{gpus: 3}", "a worker takes 3 GPUs and this machine has 2"),
    ],
)
def test_plan_refuses_workers_that_run_would_find_no_node_for(
    mergeyard: Mergeyard,
    job_file: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    workers: str,
    lack: str,
):
    for gpu in ("0000:01:00.0", "0000:02:00.0"):  # the form of the NVIDIA driver's folder
        (tmp_path / "gpus" / gpu).mkdir(parents=True)
    monkeypatch.setattr("orchestrator.cluster.this_machine.NVIDIA", tmp_path / "gpus")
    path = job_file()
    path.write_text(f"{path.read_text()}\nworkers: {workers}\n")
    ended = mergeyard("plan", path)
    assert_refused(ended, "ask for less under `workers:`, or name a larger cluster with --address")
    assert re.search(lack, ended.err)
    assert mergeyard("plan", path, "--address", "http://10.0.0.7:8265").code == 0, "another machine's"
    path.write_text(path.read_text().replace(workers, "{cpus: 1}"))
    assert mergeyard("plan", path).code == 0


# ---- run


def test_every_point_is_the_formula_rounded_once(mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path):
    assert mergeyard("run", job_file(shard_size=3000), "--in-process").code == 0
    cos, fmt = weights("cos"), weights("fmt")
    for w in (0.25, 0.5):
        merged = load_model(run_folder / "points" / f"w{w}")
        assert merged.keys() == cos.keys()
        for name, tensor in merged.items():
            assert tensor.equal((w * cos[name].double() + (1 - w) * fmt[name].double()).bfloat16()), name


def test_running_again_does_nothing_twice(mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path):
    path = job_file(shard_size=3000)
    first = mergeyard("run", path, "--in-process", "--json").facts
    times = {path: path.stat().st_mtime_ns for path in (run_folder / "points").rglob("*")}
    again = mergeyard("run", path, "--in-process", "--json").facts
    assert (again["units_merged"], again["units_found"]) == (0, first["units_merged"])
    assert again["bytes_read"] == 0
    assert again["points"] == first["points"]
    assert {path: path.stat().st_mtime_ns for path in (run_folder / "points").rglob("*")} == times


def test_a_vanished_or_truncated_shard_is_merged_again(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path
):
    path = job_file(shard_size=3000)
    assert mergeyard("run", path, "--in-process").code == 0
    before = files_under(run_folder / "points")
    shards = sorted((run_folder / "points" / "w0.5").glob("*.safetensors"))
    shards[1].unlink()
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    assert mergeyard("run", path, "--in-process", "--json").facts["units_merged"] == 2
    assert files_under(run_folder / "points") == before


class FailingPool(InProcessPool):
    """Its machine goes away after a number of tasks."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self._left = tasks

    def run(self, tasks: Any, progress: Any) -> Iterator[Any]:
        for receipts in super().run(tasks, progress):
            if self._left == 0:
                raise WorkerLost("the machine is gone")
            self._left -= 1
            yield receipts


@pytest.mark.parametrize("tasks_before", [0, 1, 3])
def test_a_broken_run_ends_in_the_same_bytes(
    tasks_before: int, mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path, tmp_path: Path
):
    """The grid varies the embeddings alone: the points share the bytes of all other shards."""
    recipe = """
  merge_method: linear
  models:
  - {model: cos, parameters: {weight: [{filter: embed_tokens, value: "${w}"}, {value: 1}]}}
  - {model: fmt, parameters: {weight: 1}}
"""
    path = job_file(recipe=recipe, grid="{w: [1, 2, 3]}", shard_size=3000)
    assert mergeyard("run", path, "--in-process", "--output", tmp_path / "whole").code == 0
    plan = make_plan(load_job(path.read_text(), "job.yaml"))
    with pytest.raises(WorkerLost):
        drive(plan, FailingPool(tasks_before), Watcher(visible=False))
    facts = mergeyard("run", path, "--in-process", "--json").facts
    assert facts["units_found"] >= tasks_before
    assert facts["units_found"] + facts["units_merged"] == len(plan.units)
    assert files_under(run_folder / "points") == files_under(tmp_path / "whole" / "soup" / "points")


def test_equal_points_are_merged_once(mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path):
    recipe = """
  merge_method: linear
  models:
  - {model: cos, parameters: {weight: "${a}"}}
  - {model: fmt, parameters: {weight: "${b}"}}
"""
    path = job_file(recipe=recipe, grid="{points: [{a: 0.7, b: 0.3}, {a: 1.4, b: 0.6}]}")
    facts = mergeyard("run", path, "--in-process", "--json").facts
    assert facts["units_merged"] == 1
    first, second = facts["points"]
    assert facts["points"][second]["same_as"] == first
    assert facts["points"][second]["weights"] == facts["points"][first]["weights"]
    assert f"same merge as {first}" in mergeyard("run", path, "--in-process").out
    assert mergeyard("verify", run_folder).out.startswith("2 of 2 points agree with their manifests; ")


def test_nan_in_a_parent_is_told_with_the_tensors_name(
    mergeyard: Mergeyard, job_file: Callable[..., Path], parents: Path
):
    tensors = weights("cos")
    tensors["model.norm.weight"][3] = float("nan")
    write_model(parents / "cos", tensors)
    ended = mergeyard("run", job_file(), "--in-process")
    assert ended.code == 0
    assert "warning: NaN or infinity in a parent's model.norm.weight" in ended.out


@pytest.fixture
def large_norm(parents: Path) -> None:
    """In both parents, three numbers of the final norm are above the largest number of float16, 65504."""
    for name in ("cos", "fmt"):
        tensors = weights(name)
        tensors["model.norm.weight"][:3] = 1e5
        write_model(parents / name, tensors)


@pytest.mark.usefixtures("large_norm")
def test_a_merge_beyond_float16_ends_with_1_and_its_remedy_helps(mergeyard: Mergeyard, config: Path, tmp_path: Path):
    document = config.read_text()
    config.write_text(document.replace("bfloat16", "float16"))
    ended = mergeyard("merge", config, tmp_path / "half", "-q")
    assert (ended.code, ended.out) == (1, "")
    assert "3 numbers are NaN or infinite that are finite in the parents, in tensor model.norm.weight" in ended.err
    assert "give `dtype: bfloat16`, and merge into another folder" in ended.err
    assert torch.isinf(load_model(tmp_path / "half")["model.norm.weight"]).sum() == 3
    card = (tmp_path / "half" / "README.md").read_text()
    assert "| NaN or infinite, finite in every parent | `model.norm.weight` (3) |" in card
    config.write_text(document)
    assert mergeyard("merge", config, tmp_path / "whole", "-q").code == 0


@pytest.mark.parametrize(
    ("numerics", "keys", "remedy"),
    [
        ("float32", {"dtype": "float16"}, ["dtype"]),
        ("float32", {"dtype": "bfloat16", "out_dtype": "float16"}, ["out_dtype"]),
        ("mergekit", {"dtype": "float16", "out_dtype": "float16"}, ["dtype", "out_dtype"]),
        ("mergekit", {"dtype": "float16", "out_dtype": "bfloat16"}, ["dtype"]),
    ],
)
@pytest.mark.usefixtures("large_norm")
def test_the_remedy_of_an_overflow_names_the_keys_that_are_too_narrow(
    mergeyard: Mergeyard, config: Path, tmp_path: Path, numerics: str, keys: dict[str, str], remedy: list[str]
):
    def merge(keys: dict[str, str], folder: str) -> Ended:
        config.write_text(yaml.safe_dump({**document, **keys}))
        return mergeyard("merge", config, tmp_path / folder, "-q", "--numerics", numerics)

    document = yaml.safe_load(config.read_text())
    ended = merge(keys, "narrow")
    told = " and ".join(f"`{key}: bfloat16`" for key in remedy)
    assert ended.code == 1 and f"; give {told}, and merge into another folder" in ended.err
    assert merge({**keys, **dict.fromkeys(remedy, "bfloat16")}, "whole").code == 0


def test_a_merge_of_float32_beyond_bfloat16_ends_with_1_and_its_remedy_helps(
    mergeyard: Mergeyard, config: Path, parents: Path, tmp_path: Path
):
    for name in ("cos", "fmt"):
        tensors = weights(name, dtype=torch.float32)
        tensors["model.norm.weight"][:3] = 3.4e38  # the largest numbers are 3.3895e38 and 3.4028e38
        write_model(parents / name, tensors)
    ended = mergeyard("merge", config, tmp_path / "narrow", "-q")
    assert ended.code == 1 and "; give `dtype: float32` or smaller weights, and merge into" in ended.err
    config.write_text(config.read_text().replace("bfloat16", "float32"))
    assert mergeyard("merge", config, tmp_path / "whole", "-q").code == 0


@pytest.mark.usefixtures("large_norm")
def test_a_grid_beyond_float16_ends_with_1_each_time_it_is_run(
    mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
):
    path = job_file()
    path.write_text(path.read_text().replace("bfloat16", "float16"))
    for _ in range(2):
        ended = mergeyard("run", path, "--in-process", "--json")
        assert ended.code == 1
        counted = json.loads(ended.out)["overflowed"]
        assert set(counted) == set(json.loads(ended.out)["points"])
        assert all(tensors == {"model.norm.weight": 3} for tensors in counted.values())


def test_a_run_of_another_job_is_refused(mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path):
    assert mergeyard("run", job_file(), "--in-process").code == 0
    before = files_under(run_folder / "points")
    ended = mergeyard("run", job_file(grid="{w: [0.25, 0.75, 1]}"), "--in-process")
    assert_refused(ended, f"{run_folder}: this run belongs to another job, with 2 points, 2 of yours not among them;")
    assert files_under(run_folder / "points") == before


def test_a_run_whose_points_had_other_names_is_refused_with_the_key_that_names_them_so(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path
):
    path = job_file()
    named = path.read_text() + "point: weight-{w}\n"
    path.write_text(named)
    assert mergeyard("run", path, "--in-process").code == 0
    path.write_text(named.replace("point: weight-{w}\n", ""))
    ended = mergeyard("run", path, "--in-process")
    assert_refused(ended, "points have other names, such as weight-0.25: name them so by `point:`, or give the job")
    path.write_text(named)
    assert mergeyard("run", path, "--in-process", "--json").facts["units_merged"] == 0


def test_a_run_whose_parent_changed_is_refused(
    mergeyard: Mergeyard, job_file: Callable[..., Path], parents: Path, run_folder: Path
):
    path = job_file()
    assert mergeyard("run", path, "--in-process").code == 0
    write_model(parents / "cos", weights("another"))
    assert_refused(mergeyard("run", path, "--in-process"), "or its parent cos has changed since")


def test_who_stops_a_run_does_not_wait_for_a_store_that_is_down(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    """Threads try to write the files of a point again and again, and the command waits for these threads."""
    down, write, began = threading.Event(), LocalStore.write, time.monotonic()

    def unavailable(store: LocalStore, key: str, data: bytes, **more: Any) -> Any:
        if not key.endswith("README.md"):
            return write(store, key, data, **more)
        down.set()
        raise StorageUnavailable(f"{key}: the bucket does not answer")

    def interrupt() -> None:
        assert down.wait(60)
        time.sleep(0.5)  # CPython does not wake a thread whose wait begins as the signal comes
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "50")
    monkeypatch.setattr(stopping, "stopped", True)  # by an earlier command
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "write", lambda *of, **more: patiently(partial(unavailable, *of, **more)))
            thread.start()
            assert_refused(mergeyard("run", job_file(), "--in-process"), "run the same command to continue", code=75)
    finally:
        thread.join()
        assert signal.signal(signal.SIGINT, handler) is signal.default_int_handler
    assert time.monotonic() - began < 30
    assert stopping.stopped and not [*run_folder.rglob("manifest.json")]
    assert mergeyard("run", job_file(), "--in-process", "--json").facts["units_merged"] == 0
    assert not stopping.stopped


def test_an_interrupt_that_a_shell_has_switched_off_stays_so(mergeyard: Mergeyard, monkeypatch: pytest.MonkeyPatch):
    """A shell starts what it puts into the background so."""
    seen: list[Any] = []
    monkeypatch.setattr(schema_command, "schema", lambda _: seen.append(signal.getsignal(signal.SIGINT)) or 0)
    for handler in (signal.SIG_IGN, signal.default_int_handler):
        before = signal.signal(signal.SIGINT, handler)
        try:
            assert mergeyard("schema").code == 0
        finally:
            assert signal.signal(signal.SIGINT, before) is handler
    assert seen[0] is signal.SIG_IGN and seen[1] is not signal.default_int_handler


def test_a_second_driver_is_refused(mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path):
    with Lease(open_store(run_folder), "lease.json", seconds=1.5, heartbeat=0.1):
        ended = mergeyard("run", job_file(), "--in-process")
        assert_refused(ended, f"{run_folder}: already driven by process ", code=75)


def test_a_driver_that_lost_its_lease_stops(
    job_file: Callable[..., Path], run_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(driver, "Lease", partial(Lease, seconds=5, heartbeat=0.02))
    store = open_store(run_folder)

    class Robbed(InProcessPool):
        """While it works, another driver takes the run over."""

        def run(self, tasks: Any, progress: Any) -> Iterator[Any]:
            store.delete("lease.json")
            lost = threading.Event()
            for receipts in super().run(tasks, progress):
                lost.wait(0.3)
                yield receipts

    plan = make_plan(load_job(job_file().read_text(), "job.yaml"))
    with pytest.raises(RunBusy, match="another driver took this run over; this one stops"):
        drive(plan, Robbed(), Watcher(visible=False))
    assert list(run_folder.rglob("manifest.json")) == []


# ---- status, verify, diff


def test_status_follows_a_run_from_its_folder_alone(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path
):
    path = job_file(shard_size=3000)
    assert_refused(mergeyard("status", run_folder), "no run there; `mergeyard run` starts one")
    plan = make_plan(load_job(path.read_text(), "job.yaml"))
    with pytest.raises(WorkerLost):
        drive(plan, FailingPool(2), Watcher(visible=False))
    facts = mergeyard("status", path, "--json").facts
    assert (facts["points"], facts["points_done"], facts["waiting"]) == (2, 0, ["w0.25", "w0.5"])
    assert 0 < facts["shards_done"] < len(plan.units)
    assert facts["driver"] is None
    assert "none; the same command continues" in mergeyard("status", run_folder).out
    assert mergeyard("run", path, "--in-process").code == 0
    assert mergeyard("status", run_folder, "--json").facts["points_done"] == 2
    assert "2 of 2 complete" in mergeyard("status", run_folder).out


def test_status_shows_the_stage_of_a_living_driver_and_that_a_killed_one_is_dead(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path
):
    assert mergeyard("run", job_file(), "--in-process").code == 0
    progress = {"stage": "evaluating 2 models", "unit": "tokens", "done": 1000, "total": 4000, "seconds": 20.0}
    failed = {"failed": 2, "failures": ["block 3 on node 10.0.0.7: no answer"]}
    with Lease(open_store(run_folder), "lease.json", lambda: progress | failed):
        shown = mergeyard("status", run_folder)
        assert "evaluating 2 models: 1 k of 4 k tokens, 60 s left" in shown.out
        assert "2 tasks" in shown.out and "block 3 on node 10.0.0.7: no answer" in shown.out
        held = unsealed((run_folder / "lease.json").read_bytes())
    (run_folder / "lease.json").write_bytes(sealed({**held, "process_started": "long ago"}))
    shown = mergeyard("status", run_folder)
    assert f"dead: process {held['process']} on {held['host']}, last heard of" in shown.out
    assert "evaluating" not in shown.out
    assert_refused(
        mergeyard("status", run_folder, "--follow"), "is dead; the same command continues", code=Unavailable.exit_code
    )


def test_status_follows_the_stages_of_a_run_until_its_end(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("orchestrator.commands.status.FOLLOW_SECONDS", 0.02)
    assert mergeyard("run", job_file(), "--in-process").code == 0
    done = itertools.count(1)

    def progress() -> dict[str, Any]:
        return {"stage": "merging 1/2 points", "unit": "bytes", "done": next(done), "total": 900, "seconds": 1.0}

    lease = Lease(open_store(run_folder), "lease.json", progress, heartbeat=0.1)
    lease.__enter__()
    end = threading.Timer(1.0, lambda: lease.__exit__(None, None, None))
    end.start()
    lines = mergeyard("status", run_folder, "--follow").out.splitlines()
    end.join()
    assert sum(line.startswith("merging 1/2 points: ") for line in lines) >= 2
    assert any("2 of 2 complete" in line for line in lines)


@pytest.mark.parametrize(
    ("keep", "said"), [("none", "2, none is written (keep: none)"), ("{best: 1}", "2, the best are not known yet")]
)
def test_status_waits_for_no_point_that_is_not_to_be_written(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path, keep: str, said: str
):
    path = job_file()
    path.write_text(f"{path.read_text()}\nkeep: {keep}\nevaluate: {{ruler: {{lengths: [512]}}}}\n")
    plan = make_plan(load_job(path.read_text(), "job.yaml"))
    Ledger(plan.run_url, plan.places).claim(plan.job_text(), plan.document())
    shown = mergeyard("status", path)
    assert said in shown.out
    assert "waiting" not in shown.out
    assert "evaluation  not finished, 0 items answered" in shown.out


def test_status_waits_for_no_point_of_a_night_that_did_not_pass(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path, tmp_path: Path
):
    path = job_file()
    plan = make_plan(load_job(path.read_text(), "job.yaml"))
    Ledger(plan.run_url, plan.places).claim(plan.job_text(), plan.document())
    night = tmp_path / "book" / "nights" / "0001-0123abcd"
    shutil.copytree(run_folder, night)
    assert "waiting" in mergeyard("status", night).out
    (tmp_path / "book" / "concluded").mkdir()
    (tmp_path / "book" / "concluded" / "000001").touch()
    shown = mergeyard("status", night).out
    assert "2, none is written (the night did not pass)" in shown
    assert "waiting" not in shown
    assert "continues" not in shown


def test_status_of_a_folder_has_a_line_for_each_run(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path, tmp_path: Path
):
    assert mergeyard("run", job_file(), "--in-process").code == 0
    shutil.copytree(run_folder, tmp_path / "runs" / "other")
    (tmp_path / "runs" / "other" / "points" / "w0.5" / "manifest.json").unlink()
    shown = mergeyard("status", tmp_path / "runs").out.splitlines()
    assert [line.split()[0] for line in shown] == ["other", "soup"]
    assert "1 of 2 complete; none; the same command continues" in shown[0]
    assert "2 of 2 complete; complete" in shown[1]
    assert [run["points_done"] for run in mergeyard("status", tmp_path / "runs", "--json").facts] == [1, 2]


@pytest.fixture
def with_counters(parents: Path) -> Path:
    """The parents, each with an integer tensor of its own, which no plan can see: headers are the same."""
    for number, who in enumerate(("base", "cos", "fmt")):
        write_model(parents / who, {**weights(who), "model.counter": torch.tensor([number])})
    return parents


def test_bad_input_that_a_worker_finds_is_1_as_the_run_has_begun_and_names_the_shard_and_the_points(
    mergeyard: Mergeyard, with_counters: Path, job_file: Callable[..., Path], run_folder: Path
):
    ended = mergeyard("run", job_file(), "--in-process")
    assert_refused(
        ended, "model.safetensors of w0.25, w0.5: tensor model.counter (I64) differs between cos and", code=1
    )
    assert (run_folder / "plan.json").is_file()


def all_but_the_lease(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in files_under(folder).items() if "lease.json" not in name}


def test_bad_input_that_is_found_before_anything_is_written_stays_2(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path
):
    path = job_file()
    assert mergeyard("run", path, "--in-process").code == 0
    before = all_but_the_lease(run_folder)
    path.write_text(path.read_text().replace("0.25", "0.3"))
    assert_refused(mergeyard("run", path, "--in-process"), "this run belongs to another job")
    assert all_but_the_lease(run_folder) == before


def test_verify_finds_nothing_wrong_with_a_fresh_run(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path
):
    assert mergeyard("run", job_file(shard_size=3000), "--in-process").code == 0
    ended = mergeyard("verify", run_folder)
    records = len([*run_folder.glob("[a-z]*.*"), *run_folder.glob("receipts/*/*")])
    summary = f"2 of 2 points agree with their manifests; {records} of {records} records agree with their digests\n"
    assert (ended.code, ended.out) == (0, summary)
    assert mergeyard("verify", run_folder / "points" / "w0.5", "--json").facts == [{"point": "w0.5", "problems": []}]


def test_verify_finds_one_flipped_bit_anywhere(mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path):
    assert mergeyard("run", job_file(grid="{w: [0.5]}", shard_size=3000), "--in-process").code == 0
    folder = run_folder / "points" / "w0.5"
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        in_header = whole.find(b'"pt"') + 1  # a letter of the metadata: the header still parses
        places = (in_header, len(whole) - 1) if path.suffix == ".safetensors" else (0, len(whole) // 2, len(whole) - 1)
        for place in places:
            flipped = bytearray(whole)
            flipped[place] ^= 1
            path.write_bytes(flipped)
            ended = mergeyard("verify", run_folder)
            assert ended.code == 1
            told, summary = ended.out.splitlines()
            if path.name == "manifest.json":
                assert told.startswith(f"w0.5: {path}: damaged, ")
            else:
                assert told.startswith(f"w0.5: {path.name}: ")
                assert told.endswith("changed since it was written")
            assert summary.startswith("0 of 1 points agree with their manifests; ")
        path.write_bytes(whole)
    assert mergeyard("verify", run_folder).code == 0


def test_verify_names_what_is_missing_truncated_or_damaged(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path
):
    assert mergeyard("run", job_file(grid="{w: [0.25, 0.5, 0.75]}"), "--in-process").code == 0
    points = run_folder / "points"
    (points / "w0.25" / "config.json").unlink()
    shard = points / "w0.5" / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (points / "w0.75" / "manifest.json").write_text("{")
    ended = mergeyard("verify", run_folder)
    assert ended.code == 1
    *told, summary = ended.out.splitlines()
    assert summary.startswith("0 of 3 points agree with their manifests; ")
    assert told == [
        f"w0.25: {points}/w0.25/config.json does not exist",
        f"w0.5: model.safetensors: {shard.stat().st_size} bytes, {shard.stat().st_size + 1} were written",
        f"w0.75: {points}/w0.75/manifest.json: damaged, not JSON (Expecting property name enclosed in double quotes:"
        " line 1 column 2 (char 1)); remove it and run again",
    ]


def test_verify_of_nothing_is_refused(mergeyard: Mergeyard, tmp_path: Path):
    assert_refused(mergeyard("verify", tmp_path / "nowhere"), "no manifest.json there; is the run complete?")


def test_diff_measures_what_sets_two_models_apart(mergeyard: Mergeyard, parents: Path):
    base, changed = weights("base"), weights("base")
    norm = changed["model.norm.weight"]
    norm[2] = norm[2] + 1
    write_model(parents / "changed", changed, files=3)
    same = mergeyard("diff", parents / "base", parents / "base")
    assert (same.code, same.out) == (0, f"0 of {len(base)} tensors differ\n")
    ended = mergeyard("diff", parents / "base", parents / "changed", "--json")
    assert ended.code == 1
    (different,) = [entry for entry in ended.facts if entry["changed"]]
    gap = (norm.double() - base["model.norm.weight"].double()).abs()
    assert (different["tensor"], different["changed"]) == ("model.norm.weight", 1)
    assert different["largest"] == float(gap.max())
    assert different["relative"] == pytest.approx(float(gap.norm() / base["model.norm.weight"].double().norm()))
    table = mergeyard("diff", parents / "base", parents / "changed").out
    assert "6.25%" in table
    assert table.endswith(f"1 of {len(base)} tensors differ\n")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64", "bool", "int8"])
def test_diff_reads_every_kind_of_number(mergeyard: Mergeyard, parents: Path, dtype: str):
    for name, values in (("one", [0, 1, 0, 1]), ("two", [0, 1, 1, 1])):
        write_model(parents / name, {**weights("base"), "extra": torch.tensor(values).to(getattr(torch, dtype))})
    ended = mergeyard("diff", parents / "one", parents / "two", "--json")
    (different,) = [entry for entry in ended.facts if entry["changed"]]
    assert (different["tensor"], different["changed"], different["largest"]) == ("extra", 1, 1.0)


def test_diff_compares_quantised_checkpoints_that_no_merge_takes(mergeyard: Mergeyard, parents: Path):
    change = {"quantization_config": {"quant_method": "fp8"}}
    write_model(parents / "one", weights("base"), config=change)
    assert mergeyard("diff", parents / "one", parents / "base").code == 0


def test_diff_tells_of_tensors_that_only_one_has(mergeyard: Mergeyard, parents: Path):
    more = {**weights("base"), "extra": torch.ones(2), "model.norm.weight": torch.ones(3)}
    write_model(parents / "more", more)
    ended = mergeyard("diff", parents / "base", parents / "more")
    assert ended.code == 1
    assert [line.split() for line in ended.out.splitlines()[1:3]] == [
        ["extra", "only", "in", "B"],
        ["model.norm.weight", "[16]", "and", "[3]"],
    ]


# ---- merge


def test_merge_makes_a_model_that_transformers_loads(mergeyard: Mergeyard, config: Path, tmp_path: Path):
    from transformers import AutoModelForCausalLM

    ended = mergeyard("merge", config, tmp_path / "out")
    assert ended.code == 0, ended.err
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype is torch.bfloat16
    cos, fmt = weights("cos"), weights("fmt")
    state = model.state_dict()
    for name in cos:
        expected = (0.7 * cos[name].double() + 0.3 * fmt[name].double()).bfloat16()
        assert torch.equal(state[name], expected), name
    logits = model(torch.arange(5)[None]).logits
    assert logits.shape == (1, 5, VOCABULARY)
    assert torch.isfinite(logits).all()


def test_a_merge_in_several_files_loads_as_the_same_model(mergeyard: Mergeyard, config: Path, tmp_path: Path):
    assert mergeyard("merge", config, tmp_path / "one", "-q").code == 0
    assert mergeyard("merge", config, tmp_path / "many", "--out-shard-size", "3kB", "--threads", 3, "-q").code == 2
    ended = mergeyard("merge", config, tmp_path / "many", "--out-shard-size", "3KB", "--threads", 3, "-q")
    assert (ended.code, ended.out, ended.err) == (0, "", "")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    one, many = load_model(tmp_path / "one"), load_model(tmp_path / "many")
    assert one.keys() == many.keys()
    assert all(torch.equal(one[name], many[name]) for name in one)


def test_merge_leaves_the_checkpoint_and_its_papers_alone(mergeyard: Mergeyard, config: Path, tmp_path: Path):
    assert mergeyard("merge", config, tmp_path / "out").code == 0
    assert {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*")} == {
        "model.safetensors",
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "mergekit_config.yml",
        "README.md",
        "manifest.json",
    }
    assert mergeyard("verify", tmp_path / "out").code == 0
    assert yaml.safe_load((tmp_path / "out" / "mergekit_config.yml").read_text()) == yaml.safe_load(config.read_text())
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == CONFIG


@pytest.mark.parametrize("option", ["--copy-code", "--trust-remote-code"])
def test_merge_says_how_to_copy_code_and_then_copies_it(
    mergeyard: Mergeyard, config: Path, parents: Path, tmp_path: Path, option: str
):
    auto_map = {"AutoModelForCausalLM": "modeling_x.X"}
    write_model(parents / "cos", weights("cos"), config={"auto_map": auto_map})
    (parents / "cos" / "modeling_x.py").write_text("class X: ...")
    ended = mergeyard("merge", config, tmp_path / "out")
    said = "because it is code: modeling_x.py; --copy-code copies it"
    assert (ended.code, said in ended.err) == (0, True), ended.err
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    again = mergeyard("merge", config, tmp_path / "out", option)
    assert (again.code, "merged already, without modeling_x.py; give an empty folder" in again.err) == (2, True)
    assert mergeyard("merge", config, tmp_path / "other", option).code == 0
    assert (tmp_path / "other" / "modeling_x.py").read_text() == "class X: ..."
    assert json.loads((tmp_path / "other" / "config.json").read_text())["auto_map"] == auto_map


def test_a_config_gives_a_terminal_nothing_to_obey(mergeyard: Mergeyard, config: Path, parents: Path, tmp_path: Path):
    write_model(parents / "cos", weights("cos"), config={"model_type": "\x1b]0;taken\x07\u202e"})
    ended = mergeyard("merge", config, tmp_path / "out")
    assert ended.code == 2
    assert r"cos is a \x1b]0;taken\x07\u202e" in ended.err
    assert len(ended.err.splitlines()) == 1


def test_two_merges_of_a_document_are_the_same_files(mergeyard: Mergeyard, config: Path, tmp_path: Path):
    assert mergeyard("merge", config, tmp_path / "one").code == 0
    assert mergeyard("merge", config, tmp_path / "two", "--threads", 1, "--memory", "1GB").code == 0
    assert files_under(tmp_path / "one") == files_under(tmp_path / "two")
    assert mergeyard("merge", config, tmp_path / "one").code == 0, "the same merge may be repeated"
    assert files_under(tmp_path / "one") == files_under(tmp_path / "two")


def test_a_seed_decides_what_dare_drops(mergeyard: Mergeyard, parents: Path, tmp_path: Path):
    config = tmp_path / "dare.yml"
    config.write_text(
        f"merge_method: dare_linear\nbase_model: {parents}/base\nmodels:\n"
        f"- {{model: {parents}/cos, parameters: {{weight: 1, density: 0.5}}}}\n"
    )
    found: list[str] = []
    for number, seed in enumerate((0, 0, 1)):
        assert mergeyard("merge", config, tmp_path / f"out{number}", "--random-seed", seed).code == 0
        found.append(Manifest.from_json((tmp_path / f"out{number}" / "manifest.json").read_bytes()).weights)
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("method", ["slerp", "ties", "dare_ties", "task_arithmetic", "passthrough"])
def test_every_method_merges_whole_models(method: str, mergeyard: Mergeyard, parents: Path, tmp_path: Path):
    shared = {"slerp": "t: 0.3", "passthrough": "scale: 0.5"}.get(method, "weight: 0.5, density: 0.5")
    if method == "task_arithmetic":
        shared = "weight: 0.5"
    models = (
        f"[{{model: {parents}/cos}}]" if method != "ties" else f"[{{model: {parents}/cos}}, {{model: {parents}/fmt}}]"
    )
    base = "" if method == "passthrough" else f"base_model: {parents}/base\n"
    config = tmp_path / "merge.yml"
    config.write_text(f"merge_method: {method}\n{base}models: {models}\nparameters: {{{shared}}}\n")
    ended = mergeyard("merge", config, tmp_path / "out")
    assert ended.code == 0, ended.err
    merged, one, zero = load_model(tmp_path / "out"), weights("cos"), weights("base")
    for name, tensor in merged.items():
        assert torch.isfinite(tensor).all()
        if method == "task_arithmetic":
            expected = (zero[name].double() + 0.5 * (one[name].double() - zero[name].double())).bfloat16()
            assert torch.equal(tensor, expected)
        if method == "passthrough":
            assert torch.equal(tensor, (0.5 * one[name].double()).bfloat16())


def test_config_from_settles_a_disagreement(mergeyard: Mergeyard, config: Path, parents: Path, tmp_path: Path):
    write_model(parents / "fmt", weights("fmt"), config={"max_position_embeddings": 4096})
    assert_refused(mergeyard("merge", config, tmp_path / "out"), "max_position_embeddings: ")
    assert_refused(mergeyard("merge", config, tmp_path / "out"), "say whose holds with `--config-from PARENT`")
    assert not (tmp_path / "out").exists()
    ended = mergeyard("merge", config, tmp_path / "out", "--config-from", parents / "fmt")
    assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 4096
    assert "4,096 tokens" in (tmp_path / "out" / "README.md").read_text()


def test_heads_that_some_parents_lack_are_copied_from_the_one_that_config_from_names(
    mergeyard: Mergeyard, config: Path, parents: Path, tmp_path: Path
):
    score = torch.ones(2, HIDDEN).bfloat16()
    as_classifier = {"architectures": ["Qwen2ForSequenceClassification"], "tie_word_embeddings": False}
    write_model(parents / "cos", {**weights("cos"), "score.weight": score}, config=as_classifier)
    write_model(parents / "fmt", weights("fmt", tied=False))
    ended = mergeyard("merge", config, tmp_path / "out")
    assert_refused(
        ended,
        f"2 of 28 tensors are not in all parents (lm_head.weight is not in {parents}/cos; score.weight is not in"
        f" {parents}/fmt); say whose to copy with `--config-from PARENT`; those that it lacks are left out",
    )
    ended = mergeyard("merge", config, tmp_path / "out", "--config-from", f"{parents}/cos")
    assert ended.code == 0, ended.err
    merged = load_model(tmp_path / "out")
    assert merged.keys() == {*weights("cos"), "score.weight"}
    assert torch.equal(merged["score.weight"], score)
    norm = 0.7 * weights("cos")["model.norm.weight"].double() + 0.3 * weights("fmt")["model.norm.weight"].double()
    assert torch.equal(merged["model.norm.weight"], norm.bfloat16())


def test_a_merge_never_replaces_another_model(mergeyard: Mergeyard, config: Path, parents: Path, tmp_path: Path):
    before = files_under(parents)
    assert_refused(mergeyard("merge", config, parents / "cos"), "there is another model already (config.json)")
    assert files_under(parents) == before
    assert mergeyard("merge", config, tmp_path / "out").code == 0
    before = files_under(tmp_path / "out")
    config.write_text(config.read_text().replace("0.7", "0.6"))
    assert_refused(mergeyard("merge", config, tmp_path / "out"), f"{tmp_path}/out: there is another model already")
    assert files_under(tmp_path / "out") == before


# ---- refusals: one line, exit code 2, nothing written

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "misspelt parameter": (
        {"recipe": "\n  merge_method: linear\n  models:\n  - {model: cos, parameters: {wieght: 1}}\n", "grid": ""},
        'job.yaml:7: linear has no parameter "wieght"; did you mean "weight"?',
    ),
    "unknown method": (
        {"recipe": "\n  models: [{model: cos}]\n  merge_method: linaer\n", "grid": ""},
        'job.yaml:4: unknown method "linaer"; did you mean "linear"?',
    ),
    "mixture of experts": (
        {"recipe": "\n  base_model: cos\n  gate_mode: hidden\n  experts: [{source_model: fmt}]\n", "grid": ""},
        "job.yaml:7: `gate_mode:` is not accepted: it builds a mixture of experts: run `mergeyard moe CONFIG OUT`",
    ),
    "tab": ({"recipe": "\n  merge_method: linear\n  models:\n\t- {model: cos}\n", "grid": ""}, "begins with a tab"),
    "unknown key": ({"shardsize": "1GB"}, 'job.yaml:13: unknown key "shardsize"; did you mean "shard_size"?'),
    "unused axis": ({"grid": "{w: [1], v: [2]}"}, 'the axis "v" is used nowhere in the recipe'),
    "unknown config_from": ({"config_from": "cso"}, 'job.yaml:13: "cso" is not a parent; did you mean "cos"?'),
}


@pytest.mark.parametrize(
    ("command", "file", "message"),
    [
        ("plan", "mergekit.yml", "2: this is a mergekit document: `mergeyard merge FILE OUT` merges it"),
        ("plan", "evolve/genome.yml", "2: this is a genome of mergekit-evolve: `mergeyard search FILE OUT` runs its"),
        ("search", "search.yaml", "6: this is a job: `mergeyard run FILE` runs it"),
        ("merge", "search.yaml", "6: this is a job: `mergeyard run FILE` runs it"),
        ("moe", "mergekit.yml", "2: this is a mergekit document: `mergeyard merge FILE OUT` merges it"),
    ],
)
def test_a_file_of_another_kind_is_refused_with_its_command(
    command: str, file: str, message: str, mergeyard: Mergeyard, tmp_path: Path
):
    path = Path(__file__).parents[3] / "jobs" / "examples" / file
    ended = mergeyard(command, path, *([] if command == "plan" else [tmp_path / "out"]))
    assert_refused(ended, f"{path}:{message}")


@pytest.mark.parametrize("command", [("plan",), ("run", "--in-process")])
@pytest.mark.parametrize("kind", REFUSED)
def test_a_wrong_job_is_refused_before_anything_is_written(
    kind: str, command: tuple[str, ...], mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path
):
    more, line = REFUSED[kind]
    path = job_file(**more)
    before = files_under(tmp_path)
    assert_refused(mergeyard(command[0], path, *command[1:]), line)
    assert files_under(tmp_path) == before


@pytest.mark.parametrize("damage", ["gone", "truncated", "pickle", "config", "shape"])
def test_a_wrong_parent_is_refused_before_anything_is_written(
    damage: str, mergeyard: Mergeyard, job_file: Callable[..., Path], parents: Path, tmp_path: Path
):
    weights_file = parents / "fmt" / "model.safetensors"
    match damage:
        case "gone":
            shutil.rmtree(parents / "fmt")
        case "truncated":
            weights_file.write_bytes(weights_file.read_bytes()[:1000])
        case "pickle":
            weights_file.rename(parents / "fmt" / "pytorch_model.bin")
        case "config":
            (parents / "fmt" / "config.json").write_text("{")
        case _:
            write_model(parents / "fmt", {**weights("fmt"), "model.norm.weight": torch.ones(3)})
    path = job_file()
    before = files_under(tmp_path)
    assert_refused(mergeyard("run", path, "--in-process"), "fmt")
    assert files_under(tmp_path) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("run", "nowhere.yaml", "--in-process"), "nowhere.yaml: no such file"),
        (("plan", "."), ".: a folder, not a YAML file"),
        (("merge", "CONFIG", "OUT", "--memory", "much"), "--memory: a size such as 500MB or 2GiB, not 'much'"),
        (("merge", "CONFIG", "OUT", "--out-shard-size", "0"), "--out-shard-size: a size such as"),
        (("merge", "CONFIG", "OUT", "--device", "cuda:77"), "--device cuda:77: this machine does not have it ("),
        (("merge", "CONFIG", "OUT", "--device", "abacus"), "--device abacus: this machine does not have it ("),
        (("merge", "CONFIG", "OUT", "--config-from", "nobody"), "config_from names nobody, which is not a parent"),
        (("merge", "CONFIG", "ftp://host/out"), "ftp://host/out: unknown kind of storage ftp://"),
    ],
)
def test_a_wrong_command_is_refused(
    arguments: tuple[str, ...], line: str, mergeyard: Mergeyard, config: Path, tmp_path: Path
):
    named = {"CONFIG": str(config), "OUT": str(tmp_path / "out")}
    assert_refused(mergeyard(*(named.get(part, part) for part in arguments)), line)
    assert not (tmp_path / "out").exists()


def test_an_output_below_a_file_is_refused(mergeyard: Mergeyard, job_file: Callable[..., Path], tmp_path: Path):
    (tmp_path / "file").write_text("mine")
    ended = mergeyard("run", job_file(), "--in-process", "--output", tmp_path / "file" / "runs")
    assert_refused(ended, "a part of this path is a file, not a folder; choose another path")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mounted(options): a small disk of its own; skips where this user may not mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounts = 0

    def mount(options: str) -> Path:
        nonlocal mounts
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True)
        if done.returncode:
            pytest.skip("mounting a disk takes root")
        mounts += 1
        return folder

    if shutil.which("mount") is None or sys.platform != "linux":
        pytest.skip("mounting a disk takes Linux")
    yield mount
    for _ in range(mounts):
        subprocess.run(["umount", "--lazy", folder], check=True)  # a store may still hold files open


def test_a_disk_without_room_is_refused_before_anything_is_written(
    mergeyard: Mergeyard, job_file: Callable[..., Path], mounted: Callable[[str], Path]
):
    disk = mounted("size=16k")
    ended = mergeyard("run", job_file(), "--in-process", "--output", disk)
    assert_refused(ended, " free; make room, or choose another output")
    assert list(disk.iterdir()) == []


def test_a_finished_run_on_a_full_disk_may_be_run_again(
    mergeyard: Mergeyard, job_file: Callable[..., Path], mounted: Callable[[str], Path]
):
    disk = mounted("size=256k")
    path = job_file()
    assert mergeyard("run", path, "--in-process", "--output", disk).code == 0
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - 8192))
    assert mergeyard("run", path, "--in-process", "--output", disk).code == 0


def test_a_disk_that_is_read_only_is_refused(
    mergeyard: Mergeyard, job_file: Callable[..., Path], mounted: Callable[[str], Path]
):
    disk = mounted("size=1m,ro")
    ended = mergeyard("run", job_file(), "--in-process", "--output", disk)
    assert_refused(ended, "is on a read-only file system; choose another output folder")


def test_the_hub_is_no_output_of_a_run(
    mergeyard: Mergeyard, job_file: Callable[..., Path], config: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    said = "hf://me/runs can only be read; write to a folder or bucket, then use `mergeyard publish`"
    for verb in ("plan", "run"):
        assert_refused(mergeyard(verb, job_file(), "--output", "hf://me/runs"), said)
    assert_refused(mergeyard("merge", config, "hf://me/runs"), said)


def test_a_job_may_come_from_standard_input(
    mergeyard: Mergeyard, job_file: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
):
    with job_file().open() as text:
        monkeypatch.setattr(sys, "stdin", text)
        assert mergeyard("plan", "-", "--json").facts["points"] == ["w0.25", "w0.5"]


# ---- the command line


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "the following arguments are required: COMMAND; see `mergeyard --help`"),
        ("run", "the following arguments are required: JOB.yaml; see `mergeyard run --help`"),
        ("nope", "invalid choice: 'nope' (choose from 'plan', "),
        (
            "evaluate m --lengths 4k",
            "argument --lengths: give whole numbers such as 4096,8192, not '4k'; see",
        ),
        ("evaluate m --items 0", "argument --items: give a whole number from 1 on, not '0'"),
        ("merge c o --threads 0", "argument -j/--threads/--num-threads: give a whole number from 1 on, not '0'"),
        ("merge c o -j -2", "argument -j/--threads/--num-threads: give a whole number from 1 on, not '-2'"),
        ("measure m o --count 0", "argument --count: give a whole number from 1 on, not '0'"),
        ("measure m o --tokens 1", "argument --tokens: give a whole number from 2 on, not '1'"),
        ("compare a b --flips -1", "argument --flips: give a whole number from 0 on, not '-1'"),
        ("run JOB --output ''", "--output: the value is empty; give one, or leave the option out"),
        ("run JOB --output= --json", "--output: the value is empty; give one, or leave the option out"),
        ("gate JOB --point '' -q", "--point: the value is empty; give one, or leave the option out"),
        ("run JOB --address nonsense", "--address nonsense: give host:port of the cluster's head"),
    ],
)
def test_a_wrong_command_line_is_refused_in_a_line(
    mergeyard: Mergeyard, job_file: Callable[..., Path], run_folder: Path, line: str, said: str
):
    words = [str(job_file()) if word == "JOB" else word for word in shlex.split(line)]
    assert_refused(mergeyard(*words), said)
    assert not run_folder.exists()
