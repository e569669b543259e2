"""`mergeyard submit`: a real Ray head with its dashboard, behind a token, that sees the bucket and nothing of ours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import psutil
import pytest
import requests

from tests.end_to_end.command import Command
from tests.end_to_end.conftest import POINTS, UNITS, Run, tensors
from tests.end_to_end.runtime import HOST, TOKEN, needs_linux, wait_for_runtime
from tests.seaweedfs import SeaweedFS, free_ports

TOKENS = {"RAY_AUTH_TOKEN": TOKEN}
Start = Callable[..., Command]

pytestmark = [needs_linux, pytest.mark.heavy]


@pytest.fixture(scope="module")
def address(home: Path, temporary: Path, s3_server: SeaweedFS) -> Iterator[str]:
    """The dashboard of a Ray of one node."""
    folder = temporary / "submit"
    folder.mkdir()
    port, client_port, dashboard = free_ports(3)
    environment = {
        "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
        "HOME": str(home),
        "OMP_NUM_THREADS": "1",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "RAY_USAGE_STATS_ENABLED": "0",
        "AWS_ENDPOINT_URL": s3_server.endpoint,
        "AWS_ACCESS_KEY_ID": s3_server.access_key,
        "AWS_SECRET_ACCESS_KEY": s3_server.secret_key,
    }
    command = [
        str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--node-ip-address={HOST}",
        f"--port={port}", f"--ray-client-server-port={client_port}", f"--dashboard-host={HOST}",
        f"--dashboard-port={dashboard}", "--num-cpus=2", "--memory=9000000000", "--object-store-memory=100000000",
        f"--temp-dir={folder}",
    ]  # fmt: skip
    with (folder / "head.log").open("wb") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    try:
        wait_for_runtime(head, folder / "head.log")
        yield f"http://{HOST}:{dashboard}"
    finally:
        below = psutil.Process(head.pid).children(recursive=True) if head.poll() is None else []
        head.kill()
        head.wait()
        for process in below:
            if process.is_running():
                process.kill()


@pytest.fixture
def submit(start: Start, address: str) -> Callable[..., Command]:
    """`submit(job, …)`: the command, running, with the cluster's token and without a word of the bucket."""

    def begin(job: Path, *options: str, extra: Mapping[str, str] = TOKENS) -> Command:
        nothing = {name: "" for name in os.environ if name.startswith("AWS_")}
        return start("submit", job, "--address", address, *options, extra=nothing | dict(extra))

    return begin


def details(address: str) -> dict[str, dict[str, object]]:
    """What the cluster tells of every submission, by id."""
    answer = requests.get(f"{address}/api/jobs/", headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
    return {job["submission_id"]: job for job in answer.json() if job["submission_id"]}


def test_a_job_is_submitted_once_followed_to_its_end_and_found_again(
    submit: Callable[..., Command],
    new_run: Callable[..., Run],
    expected: Run,
    parents_in_bucket: str,
    s3_url: str,
    address: str,
    s3_server: SeaweedFS,
) -> None:
    run = new_run(s3_url, parents=parents_in_bucket)
    ended = submit(run.job).ended()
    assert ended.code == 0, ended
    name = ended.out.split(":")[0]
    assert name.startswith("mergeyard-")
    assert f"{POINTS} points in {run.url}/points" in ended.out  # the job's own words
    assert tensors(run.manifests()) == tensors(expected.manifests())
    seeing = TOKENS | {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    again = submit(run.job, extra=seeing).ended()
    assert (again.code, again.out) == (0, f"{name}: succeeded already, its run is {run.url}\n")
    bucket, _, prefix = run.url.removeprefix("s3://").partition("/")
    s3_server.client().delete_object(Bucket=bucket, Key=f"{prefix}/{min(run.manifests())}")
    mended = submit(run.job, extra=seeing).ended()
    assert mended.code == 0, mended
    assert mended.out.startswith(f"{name}-2: submitted again after {name} succeeded"), mended.out
    assert tensors(run.manifests()) == tensors(expected.manifests())
    told = details(address)[name]
    assert set(told["runtime_env"]) <= {"working_dir", "_ray_commit"}
    assert s3_server.secret_key not in str(told) and TOKEN not in str(told)


def test_a_refusal_in_the_cluster_is_ours_and_the_job_can_be_submitted_again(
    submit: Callable[..., Command],
    new_run: Callable[..., Run],
    expected: Run,
    parents_in_bucket: str,
    s3_url: str,
    s3_server: SeaweedFS,
) -> None:
    bucket, _, prefix = parents_in_bucket.removeprefix("s3://").partition("/")
    key, client = f"{prefix}/fmt/config.json", s3_server.client()
    config = client.get_object(Bucket=bucket, Key=key)["Body"].read()
    client.delete_object(Bucket=bucket, Key=key)
    run = new_run(s3_url, parents=parents_in_bucket)
    ended = submit(run.job, "-q").ended()
    assert (ended.code, ended.out) == (2, "")
    assert ended.err.startswith("mergeyard: ") and "config.json" in ended.err and ended.err.count("\n") == 1
    client.put_object(Bucket=bucket, Key=key, Body=config)
    facts = submit(run.job, "--json").ended().facts
    assert (facts["state"], facts["exit_code"], facts["run"]) == ("succeeded", 0, run.url)
    assert facts["id"].endswith("-2")
    assert len(run.receipts()) == UNITS


def test_ctrl_c_stops_the_watching_and_cancel_the_job_which_then_goes_on(
    submit: Callable[..., Command], new_run: Callable[..., Run], expected: Run, tmp_path: Path
) -> None:
    run = new_run(str(tmp_path / "out"))  # local paths, which this cluster sees
    watching = submit(run.job)
    watching.until(lambda: "submitted, its run is" in watching.said())
    watching.process.send_signal(signal.SIGINT)
    left = watching.ended()
    assert left.code == 75
    assert "continues, but is not followed" in left.err
    name = left.out.split(":")[0]
    found = submit(run.job, "--no-wait").ended()
    assert found.code == 0
    assert found.out.startswith((f"{name}: pending already", f"{name}: running already")), found.out
    assert submit(run.job, "--cancel").ended().out == f"{name}: stopped; submit the job again to go on\n"
    again = submit(run.job, "--json").ended()
    assert again.facts["id"] == f"{name}-2"
    assert run.manifests() == expected.manifests()


def test_a_missing_and_a_wrong_token_are_refused_with_the_remedy(
    submit: Callable[..., Command], new_run: Callable[..., Run], s3_url: str
) -> None:
    job = new_run(s3_url, parents="s3://tests/parents").job
    for extra in ({}, {"RAY_AUTH_TOKEN": "f" * 64}):
        refusal = submit(job, extra=extra).ended().refused_with(2)
        assert "set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN" in refusal
