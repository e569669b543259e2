"""`submit` of a job that has ended before: what its run says counts, not what the cluster remembers.

The cluster is a stand-in, and Ray's own client asks it: what is asked here are endings that a real one takes minutes to
come by, or never comes by when asked. Submitting to a real one is in end_to_end.
"""

from __future__ import annotations

import json
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from jobs.job import load_job
from orchestrator.cluster import ray_jobs as ray_submission
from orchestrator.cluster.ray_jobs import RayJobs
from orchestrator.cluster.shipment import shipment
from tests.orchestrator.conftest import Ended, edit
from tests.orchestrator.models import weights, write_model
from tests.orchestrator.tiny_jobs import job_text as evaluation_text
from tests.orchestrator.tiny_jobs import scaled
from workers.fingerprint import fingerprint

Mergeyard = Callable[..., Ended]


class Dashboard(ThreadingHTTPServer):
    """Ray's Jobs API as far as it is asked here: `jobs` by their ids, and what each job has said."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.jobs: dict[str, dict[str, Any]] = {}
        self.log, self.logs_asked, self.runs_for = "", 0, 0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def remember(self, submission: str, code: int, **changed: Any) -> None:
        """A job that ended with this code."""
        self.jobs[submission] = {
            "type": "SUBMISSION",
            "submission_id": submission,
            "entrypoint": "mergeyard",
            "status": "FAILED" if code else "SUCCEEDED",
            "driver_exit_code": code,
            "metadata": {"code": fingerprint()},
            **changed,
        }


class Answers(BaseHTTPRequestHandler):
    server: Dashboard

    def do_GET(self) -> None:
        match self.path.strip("/").split("/")[1:]:
            case ["version"]:
                self.reply({"version": "4", "ray_version": ray.__version__, "ray_commit": ""})
            case ["jobs"]:
                self.reply([*self.server.jobs.values()])
            case ["jobs", submission]:
                self.server.runs_for -= 1
                running = {"status": "RUNNING", "driver_exit_code": None} if self.server.runs_for >= 0 else {}
                self.reply({**self.server.jobs[submission], **running})
            case ["jobs", _, "logs"]:
                self.server.logs_asked += 1
                self.reply({"logs": self.server.log})
            case _:
                self.reply({})  # it has every package

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.remember(asked["submission_id"], 0, metadata=asked["metadata"])
        self.reply({"job_id": None, "submission_id": asked["submission_id"]})

    def reply(self, content: object) -> None:
        data = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    server = Dashboard()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def name_of(job: Path, dashboard: Dashboard) -> str:
    return shipment(load_job(job.read_text(), str(job)), job.parent, dashboard.address).name


@pytest.fixture
def merged(mergeyard: Mergeyard, parents: Path, job_text: Callable[..., str], tmp_path: Path) -> Path:
    """The file of a job whose run lies there whole."""
    (tmp_path / "job.yaml").write_text(job_text())
    assert mergeyard("run", tmp_path / "job.yaml", "--in-process").code == 0
    return tmp_path / "job.yaml"


def test_a_job_that_succeeded_is_not_submitted_again_while_its_run_is_there(
    mergeyard: Mergeyard, merged: Path, dashboard: Dashboard
) -> None:
    name = name_of(merged, dashboard)
    dashboard.remember(name, 0)
    ended = mergeyard("submit", merged, "--address", dashboard.address)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out == f"{name}: succeeded already, its run is {merged.parent}/runs/soup\n"
    assert list(dashboard.jobs) == [name]


def test_where_the_cluster_is_gone_the_bucket_says_how_the_job_ended(mergeyard: Mergeyard, merged: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        gone = f"http://127.0.0.1:{server.getsockname()[1]}"
    ended = mergeyard("submit", merged, "--address", gone)
    assert ended.code == 0
    assert f"but the job has ended, its run is {merged.parent}/runs/soup" in ended.out
    assert mergeyard("submit", merged, "--address", gone, "--json").facts["exit_code"] == 0
    (merged.parent / "runs/soup/points/w0.5/manifest.json").unlink()
    ended = mergeyard("submit", merged, "--address", gone)
    assert (ended.code, ended.out) == (75, "")
    assert f"its run {merged.parent}/runs/soup: 1 of 2 complete; none; the same command continues" in ended.err
    assert mergeyard("submit", merged, "--address", gone, "--cancel").code == 75


def removed(job: Path) -> None:
    shutil.rmtree(job.parent / "runs")


def without_a_point(job: Path) -> None:
    next((job.parent / "runs" / "soup" / "points").glob("*/manifest.json")).unlink()


def with_a_parent_that_moved(job: Path) -> None:
    write_model(job.parent / "parents" / "cos", weights("base"))


def of_another_job(job: Path) -> None:
    rewrite(job.parent / "runs" / "soup" / "job.yaml", "- 0.5\n", "- 0.75\n")


def over_another_parent(job: Path) -> None:
    rewrite(job.parent / "runs" / "soup" / "job.yaml", "/parents/cos\n", "/parents/base\n")


def rewrite(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))


@pytest.mark.parametrize(
    "change", [removed, without_a_point, with_a_parent_that_moved, of_another_job, over_another_parent]
)
def test_what_the_cluster_remembers_does_not_count_without_the_run(
    change: Callable[[Path], None], mergeyard: Mergeyard, merged: Path, dashboard: Dashboard
) -> None:
    name = name_of(merged, dashboard)
    dashboard.remember(name, 0)
    change(merged)
    ended = mergeyard("submit", merged, "--address", dashboard.address)
    assert (ended.code, ended.err) == (0, "")
    assert ended.out.startswith(f"{name}-2: submitted again after {name} succeeded, which its run does not confirm")
    assert list(dashboard.jobs) == [name, f"{name}-2"]


def test_what_other_code_made_is_submitted_again(mergeyard: Mergeyard, merged: Path, dashboard: Dashboard) -> None:
    dashboard.remember(name_of(merged, dashboard), 0, metadata={"code": "of yesterday"})
    assert "submitted again after" in mergeyard("submit", merged, "--address", dashboard.address).out


def test_a_verdict_ends_a_job_and_is_its_exit_code(mergeyard: Mergeyard, dashboard: Dashboard, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(evaluation_text(tmp_path, **scaled([0.3], margin=10)))
    assert mergeyard("run", job, "--in-process").code == 1
    name, verdict = name_of(job, dashboard), tmp_path / "runs" / "tiny" / "gate" / "verdict.json"
    dashboard.remember(name, 1)
    told = mergeyard("submit", job, "--address", dashboard.address)
    assert (told.code, told.err) == (1, "")
    assert told.out == f"{name}: ended already, the gate says fail, its run is {tmp_path}/runs/tiny\n"
    assert mergeyard("submit", job, "--address", dashboard.address, "--no-wait").code == 0
    edit(verdict, outcome="inconclusive")
    dashboard.remember(name, 3)
    told = mergeyard("submit", job, "--address", dashboard.address, "--json")
    assert (told.code, told.facts["id"], told.facts["exit_code"]) == (3, name, 3)
    assert list(dashboard.jobs) == [name]
    verdict.unlink()  # it failed of something else
    told = mergeyard("submit", job, "--address", dashboard.address)
    assert (told.code, list(dashboard.jobs)) == (0, [name, f"{name}-2"])


def test_a_long_log_is_not_asked_for_every_second(dashboard: Dashboard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_submission, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(ray_submission, "LOG_BYTES_A_SECOND", 1000)
    dashboard.remember("mergeyard-0", 0)
    dashboard.log = "a line of a long log\n" * 10**4
    cluster, said = RayJobs(dashboard.address), list[str]()
    submission = cluster.latest("mergeyard-0")
    assert submission is not None
    dashboard.runs_for = 5
    ended = cluster.follow(submission, said.append)
    assert ended.state == "succeeded"
    assert "".join(said) == dashboard.log
    assert dashboard.logs_asked == 2, "at its start and at its end; there are 210 seconds to the next time"
