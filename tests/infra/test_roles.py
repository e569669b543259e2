"""A run on Ray asks the bucket for nothing that its roles may not do: neither its driver nor its workers.

S3 here is real but knows no roles. So each side has a proxy of its own, and what went through is held against the
policies.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from botocore.exceptions import ClientError

from tests.fault_proxy import FaultProxy
from tests.infra.conftest import ROOT, Start
from tests.infra.reading import allows, policy
from tests.seaweedfs import SeaweedFS, free_ports

PARENTS = ROOT / "jobs" / "examples" / "parents"

JOB = """\
name: grid
parents: {long: s3://models/long, fmt: s3://models/fmt}
recipe:
  merge_method: linear
  models:
    - {model: long, parameters: {weight: "${w}"}}
    - {model: fmt, parameters: {weight: "${1 - w}"}}
grid: {w: [0.25, 0.75]}
evaluate: {ruler: {tasks: [niah_single_1], lengths: [256], items: 4}}
keep: {best: 1}
workers: {cpus: 1, memory: 4GB, count: 1}
output: s3://bucket/runs
"""


def asked(method: str, path: str) -> tuple[str, str]:
    """The action and the resource of a request, as AWS calls them."""
    address = urlsplit(path)
    bucket, _, key = unquote(address.path).lstrip("/").partition("/")
    query = set(re.findall(r"(?:^|&)([\w-]+)", address.query))
    place = f"arn:aws:s3:::{bucket}/{key}" if key else f"arn:aws:s3:::{bucket}"
    if not key:
        return ("s3:ListBucketMultipartUploads" if "uploads" in query else "s3:ListBucket"), place
    if method == "DELETE":
        return ("s3:AbortMultipartUpload" if "uploadId" in query else "s3:DeleteObject"), place
    return ("s3:GetObject" if method in ("GET", "HEAD") else "s3:PutObject"), place


@pytest.mark.parametrize(
    ("method", "path", "action", "place"),
    [
        ("GET", "/bucket?list-type=2&prefix=runs", "s3:ListBucket", "bucket"),
        ("HEAD", "/bucket", "s3:ListBucket", "bucket"),
        ("GET", "/bucket?uploads&prefix=runs", "s3:ListBucketMultipartUploads", "bucket"),
        ("GET", "/bucket/runs/a%20b", "s3:GetObject", "bucket/runs/a b"),
        ("PUT", "/bucket/runs/a?partNumber=1&uploadId=x", "s3:PutObject", "bucket/runs/a"),
        ("POST", "/bucket/runs/a?uploads", "s3:PutObject", "bucket/runs/a"),
        ("DELETE", "/bucket/runs/a?uploadId=x", "s3:AbortMultipartUpload", "bucket/runs/a"),
        ("DELETE", "/bucket/runs/a", "s3:DeleteObject", "bucket/runs/a"),
    ],
)
def test_a_request_is_known_by_what_it_asks(method: str, path: str, action: str, place: str) -> None:
    assert asked(method, path) == (action, f"arn:aws:s3:::{place}")


@dataclass(frozen=True)
class Sides:
    """The proxies of driver and workers."""

    driver: FaultProxy
    workers: FaultProxy


@pytest.fixture
def sides(s3_environment: SeaweedFS) -> Iterator[Sides]:
    """Both, before a server with a bucket of models and one of runs."""
    client = s3_environment.client()
    for bucket in ("models", "bucket"):
        try:
            client.create_bucket(Bucket=bucket)
        except ClientError as error:  # of an earlier test
            assert "BucketAlready" in str(error)
    for file in (file for name in ("long", "fmt") for file in sorted((PARENTS / name).iterdir())):
        client.upload_file(str(file), "models", f"{file.parent.name}/{file.name}")
    found = Sides(FaultProxy(s3_environment), FaultProxy(s3_environment))
    found.driver.start()
    found.workers.start()
    yield found
    found.driver.stop()
    found.workers.stop()


@pytest.mark.heavy
def test_neither_driver_nor_workers_ask_for_more_than_their_roles_allow(
    sides: Sides, start: Start, tmp_path: Path
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(JOB)
    (port,) = free_ports(1)
    credentials = {
        "AWS_ACCESS_KEY_ID": SeaweedFS.access_key,
        "AWS_SECRET_ACCESS_KEY": SeaweedFS.secret_key,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": sides.workers.endpoint,  # Ray starts with it, and so does what it starts
    }
    ended = start(
        ROOT / "infra" / "ray" / "together.sh", "0", "1", f"127.0.0.2:{port}",
        "env", f"AWS_ENDPOINT_URL={sides.driver.endpoint}", "mergeyard", "run", job, "--address", "auto",
        **credentials,
    )  # fmt: skip
    said, _ = ended.communicate(timeout=300)
    assert ended.returncode == 0, said
    for role, proxy in (("driver", sides.driver), ("worker", sides.workers)):
        wanted = {asked(*request) for request in proxy.requests}
        assert {action for action, _ in wanted} >= {"s3:GetObject", "s3:PutObject"}, role
        assert [it for it in sorted(wanted) if not allows(policy(role), *it)] == [], role
    assert any("/points/" in path for method, path in sides.workers.requests if method in ("PUT", "POST"))
    assert any("/scores/" in path for method, path in sides.workers.requests if method == "PUT")
