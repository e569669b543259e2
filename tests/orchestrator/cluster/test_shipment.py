"""What goes to a cluster, what is refused at the desk, and what an ended submission means. The cluster: end_to_end."""

from __future__ import annotations

import shlex
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.errors import BadInput, Interrupted, MergeyardError, WorkerLost
from jobs.job import Job, load_job
from orchestrator.cluster.ray_jobs import Submission
from orchestrator.cluster.shipment import is_loopback, shipment
from tests.orchestrator.conftest import Ended

ELSEWHERE, HERE = "http://ray.example:8265", "http://127.0.0.1:8265"
JOB = """\
name: soup
parents: {cos: s3://models/cos, fmt: s3://models/fmt}
recipe:
  merge_method: linear
  models:
    - {model: cos, parameters: {weight: "${w}"}}
    - {model: fmt, parameters: {weight: "${1 - w}"}}
grid: {w: [0.3, 0.7]}
evaluate: {perplexity: {lengths: [512], text: texts/prose.txt}}
output: s3://bucket/runs/
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A user's folder, with a package that has one of our names."""
    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs" / "__init__.py").write_text("raise ImportError")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "prose.txt").write_text("Once upon a time.")
    (tmp_path / "secret.txt").write_text("not to be sent")
    return tmp_path


def job(text: str = JOB, source: str = "job.yaml") -> Job:
    return load_job(text, source)


def test_the_code_the_job_and_its_texts_are_sent_and_nothing_else(folder: Path, tmp_path: Path) -> None:
    sent = shipment(job(), folder, ELSEWHERE)
    (tmp_path / "packed").mkdir()
    sent.pack(tmp_path / "packed")
    files = {path.relative_to(tmp_path / "packed").as_posix() for path in (tmp_path / "packed").rglob("*")}
    top = {name for name in files if "/" not in name}
    assert top == {"jobs", "workers", "orchestrator", "job.yaml", "texts"}
    assert load_job((tmp_path / "packed" / "job.yaml").read_text(), "job.yaml") == job()
    assert (tmp_path / "packed" / "texts" / "prose.txt").read_text() == "Once upon a time."
    assert "raise ImportError" not in (tmp_path / "packed" / "jobs" / "__init__.py").read_text()
    words = ["run", "job.yaml", "--output", "s3://bucket/runs", "--address", "auto"]
    assert shlex.split(sent.entrypoint) == ["python", "-m", "orchestrator.cli", *words]
    assert sent.run == "s3://bucket/runs/soup"


def test_the_same_job_has_the_same_name_and_another_another(folder: Path) -> None:
    def name(text: str) -> str:
        return shipment(job(text), folder, ELSEWHERE).name

    assert name(JOB) == name("# a comment\n" + JOB + "workers: {count: 7}\n")
    others = {name(JOB), name(JOB.replace("0.7]", "0.8]")), name(JOB.replace("bucket/runs", "bucket/more"))}
    assert len(others) == 3


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (("s3://models/fmt", "parents/fmt"), "job.yaml:2: parent fmt is the local folder parents/fmt"),
        (("s3://bucket/runs/", "runs"), "the output is the local folder"),
        (
            ("linear", "ties\n  base_model: cos\n  aim: {statistics: cos.safetensors}"),
            "job.yaml:6: `statistics:` names the local file cos.safetensors",
        ),
        (("texts/prose.txt", "../prose.txt"), "job.yaml:9: ../prose.txt cannot be sent along"),
        (("texts/prose.txt", "jobs/prose.txt"), "jobs/prose.txt cannot be sent along"),
        (("texts/prose.txt", "texts/none.txt"), "texts/none.txt cannot be read"),
        (("texts/prose.txt", "texts"), "job.yaml:9: texts is a folder, and only files are sent along; put it into"),
        (("perplexity: {lengths: [512], text: texts/prose.txt}", "lm_eval: {tasks: [own.yaml]}"), "on every worker"),
    ],
)
def test_what_the_cluster_would_not_see_is_refused_with_its_place(
    folder: Path, change: tuple[str, str], line: str
) -> None:
    with pytest.raises(BadInput) as refusal:
        shipment(job(JOB.replace(*change)), folder, ELSEWHERE)
    assert line in str(refusal.value)


def test_on_this_machine_a_job_with_local_paths_is_run_from_its_own_file(folder: Path) -> None:
    text = JOB.replace("s3://models/fmt", "parents/fmt").replace("s3://bucket/runs/", str(folder / "my runs"))
    sent = shipment(job(text, str(folder / "job.yaml")), folder, HERE)
    assert sent.files == {}
    assert shlex.split(sent.entrypoint)[4:7] == [str(folder / "job.yaml"), "--output", str(folder / "my runs")]
    with pytest.raises(BadInput, match="not from standard input"):
        shipment(job(text, "-"), folder, HERE)


def test_a_shared_folder_by_its_url_is_one_that_the_cluster_sees(folder: Path) -> None:
    text = JOB.replace("s3://models/fmt", "file:///mnt/fmt").replace("s3://bucket/runs/", "file:///mnt/runs")
    assert shipment(job(text), folder, ELSEWHERE).run == "file:///mnt/runs/soup"


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (HERE, True),
        ("http://localhost:1", True),
        ("http://[::1]:1", True),
        (ELSEWHERE, False),
        ("http://10.0.0.1", False),
    ],
)
def test_which_addresses_are_this_machine(address: str, expected: bool) -> None:
    assert is_loopback(address) is expected


def ended(state: str, code: int | None = None, message: str = "", *, lost: bool = False) -> Submission:
    return Submission("mergeyard-0", 1, state, code, message, "", lost)


def test_the_exit_code_of_the_job_is_ours() -> None:
    assert ended("succeeded", 0).outcome() == 0
    assert [ended("failed", code).outcome() for code in (1, 2, 3, 75)] == [1, 2, 3, 75]


@pytest.mark.parametrize(
    ("submission", "kind"),
    [
        (ended("stopped"), Interrupted),
        (ended("failed", -9), WorkerLost),
        (ended("failed", 137), WorkerLost),
        (ended("failed", None, "the supervisor died", lost=True), WorkerLost),
        (ended("failed", None, "no room for the packages\nmore"), MergeyardError),
        (ended("failed", 127, "python: not found"), MergeyardError),
    ],
)
def test_an_end_without_a_code_of_ours_says_what_to_do(submission: Submission, kind: type[MergeyardError]) -> None:
    with pytest.raises(MergeyardError) as error:
        submission.outcome()
    assert type(error.value) is kind
    assert "\n" not in str(error.value)


def test_a_dashboard_that_does_not_answer_is_to_be_tried_again_and_an_address_that_is_none_is_refused(
    mergeyard: Callable[..., Ended], folder: Path
) -> None:
    (folder / "job.yaml").write_text(JOB)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))  # bound, but nobody listens
        ended = mergeyard("submit", folder / "job.yaml", "--address", f"http://127.0.0.1:{probe.getsockname()[1]}")
    assert ended.code == 75 and "nothing answers there" in ended.err
    ended = mergeyard("submit", folder / "job.yaml", "--address", "127.0.0.1:6379")
    assert ended.code == 2 and "give the URL of the cluster's dashboard" in ended.err
