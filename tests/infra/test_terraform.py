"""The bucket and its roles. Providers cannot be fetched here, so nothing is planned or applied.

The text is parsed, what it refers to is looked up, and the policies are read as AWS reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import hcl2
import pytest
import yaml

from tests.infra.conftest import ROOT
from tests.infra.reading import TERRAFORM, allows, policy
from tests.markdown import fenced_blocks

POLICIES = sorted(path.stem for path in (TERRAFORM / "policies").glob("*.json"))

RUN = "arn:aws:s3:::bucket/runs/demo/receipts/00/0.json"
PARENT = "arn:aws:s3:::models/cos/model.safetensors"
ELSEWHERE = "arn:aws:s3:::bucket/other"


def text() -> str:
    return "\n".join(path.read_text("utf-8") for path in sorted(TERRAFORM.glob("*.tf")))


def blocks(kind: str) -> Iterator[tuple[str, ...]]:
    """The labels of every block of a kind."""
    for labels in re.findall(rf'^{kind}((?: "[^"]+")+) {{', text(), re.MULTILINE):
        yield tuple(re.findall(r'"([^"]+)"', labels))


# ---- the text


@pytest.mark.parametrize("file", sorted(path.name for path in TERRAFORM.glob("*.tf")))
def test_a_file_can_be_parsed(file: str) -> None:
    assert hcl2.loads((TERRAFORM / file).read_text("utf-8"))


def test_a_broken_file_cannot() -> None:
    with pytest.raises(Exception, match="Unexpected token"):
        hcl2.loads((TERRAFORM / "main.tf").read_text("utf-8").replace("{", "[", 1))


def unknown(written: str) -> set[str]:
    """What is referred to and declared nowhere."""
    resources = {".".join(labels) for labels in blocks("resource")}
    referred = set(re.findall(r"\b(aws_\w+\.\w+)\b", re.sub(r'data "[^"]+"|data\.\w+\.\w+', "", written)))
    variables = {name for (name,) in blocks("variable")}
    return (referred - resources) | (set(re.findall(r"\bvar\.(\w+)", written)) - variables)


def test_everything_that_is_referred_to_is_declared_and_used() -> None:
    assert unknown(text()) == set()
    assert {name for (name,) in blocks("variable")} == set(re.findall(r"\bvar\.(\w+)", text()))
    assert unknown(text().replace("var.bucket", "var.buckets")) == {"buckets"}
    assert unknown(text() + "x = aws_s3_bucket.run.id") == {"aws_s3_bucket.run"}


def test_unfinished_uploads_are_aborted_after_a_week() -> None:
    (rule,) = re.findall(r"abort_incomplete_multipart_upload \{\s*days_after_initiation = (\d+)", text())
    assert rule == "7"
    assert "expiration" not in text()  # nothing that is finished is ever removed by the bucket


def test_every_policy_file_is_used_and_gets_all_it_asks_for() -> None:
    named = set(re.findall(r"policies/([\w-]+)\.json", text()))
    (keys,) = re.findall(r"toset\(\[(.*?)\]\)", text())
    assert named | set(re.findall(r"\w+", keys)) == set(POLICIES)
    calls = re.findall(
        r"templatefile\(\s*\"\$\{path\.module\}/policies/([^\"]+)\.json\",\s*\{(.*?)\}\s*\)", text(), re.S
    )
    assert len(calls) == 4
    for name, given in calls:
        files = re.findall(r"\w+", keys) if "$" in name else [name]
        asked = {
            it for file in files for it in re.findall(r"\$\{(\w+)\}", (TERRAFORM / f"policies/{file}.json").read_text())
        }
        assert asked <= set(re.findall(r"(\w+)\s*=", given)), name


# ---- the policies


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_one_that_aws_reads(name: str) -> None:
    document = policy(name)
    assert document.keys() == {"Version", "Statement"}
    assert document["Version"] == "2012-10-17"
    for statement in document["Statement"]:
        assert statement.keys() <= {"Sid", "Effect", "Principal", "Action", "Resource", "Condition"}
        assert ("Principal" in statement) == (name == "bucket" or name.startswith("assumed"))
        assert ("Resource" in statement) == (not name.startswith("assumed"))
        assert all(re.fullmatch(r"(s3|ec2|ssm|iam|sts):[A-Z*]\w*\*?", action) for action in statement["Action"])
        assert all(re.fullmatch(r"\*|arn:aws:\w+:\S*", resource) for resource in statement.get("Resource", []))


@pytest.mark.parametrize(
    ("action", "resource", "worker", "driver"),
    [
        ("s3:GetObject", PARENT, True, True),
        ("s3:ListBucket", "arn:aws:s3:::models", True, True),
        ("s3:GetObject", RUN, True, True),
        ("s3:PutObject", RUN, True, True),
        ("s3:AbortMultipartUpload", RUN, True, True),
        ("s3:ListBucket", "arn:aws:s3:::bucket", True, True),
        ("s3:ListBucketMultipartUploads", "arn:aws:s3:::bucket", False, True),
        ("s3:DeleteObject", RUN, False, True),
        ("s3:PutObject", PARENT, False, False),
        ("s3:DeleteObject", PARENT, False, False),
        ("s3:PutObject", ELSEWHERE, False, False),
        ("s3:GetObject", ELSEWHERE, False, False),
        ("s3:DeleteObject", ELSEWHERE, False, False),
        ("s3:DeleteBucket", "arn:aws:s3:::bucket", False, False),
        ("s3:PutBucketPolicy", "arn:aws:s3:::bucket", False, False),
        ("s3:ListAllMyBuckets", "*", False, False),
        ("ec2:RunInstances", "arn:aws:ec2:us-east-1:000000000000:instance/i-0", False, False),
    ],
)
def test_a_role_may_do_what_it_needs_and_no_more(action: str, resource: str, worker: bool, driver: bool) -> None:
    assert allows(policy("worker"), action, resource) == worker
    assert allows(policy("driver"), action, resource) == driver


def test_the_driver_may_do_what_the_page_says_and_what_tests_compare_with_the_code() -> None:
    page = (ROOT / "infra" / "README.md").read_text("utf-8")
    block = next(block for block in fenced_blocks(page) if block.language == "json")
    assert json.loads(block.text) == policy("driver")


def test_no_role_of_a_bucket_may_do_everything() -> None:
    for name in ("worker", "driver"):
        for statement in policy(name)["Statement"]:
            assert not any("*" in action for action in statement["Action"])
            assert "*" not in statement["Resource"]


def test_workers_code_never_deletes() -> None:
    """The worker's role has no DeleteObject: what runs on a node asks for none. The driver makes sets of items."""
    drivers = ROOT / "workers" / "benchmarks" / "sets.py"
    assert "stored(" in (ROOT / "orchestrator" / "evaluating" / "session.py").read_text("utf-8")
    assert not [path for path in (ROOT / "workers").rglob("*.py") if "benchmarks.sets" in path.read_text("utf-8")]
    rooms = [path for path in (ROOT / "workers").rglob("*.py") if "storage" not in path.parts and path != drivers]
    assert len(rooms) > 20
    assert [str(path) for path in rooms if re.search(r"\.(delete|sweep)\(", path.read_text("utf-8"))] == []


def test_the_head_passes_on_no_role_but_the_workers_and_ends_no_instance_but_its_own() -> None:
    (passed,) = (entry for entry in policy("launcher")["Statement"] if entry["Action"] == ["iam:PassRole"])
    assert passed["Resource"] == ["arn:aws:iam::000000000000:role/mergeyard-worker"]
    (ended,) = (entry for entry in policy("launcher")["Statement"] if "ec2:TerminateInstances" in entry["Action"])
    cluster = yaml.safe_load((ROOT / "infra" / "ray" / "aws.yaml").read_text("utf-8"))["cluster_name"]
    assert ended["Condition"] == {"StringEquals": {"aws:ResourceTag/ray-cluster-name": cluster}}


def test_a_pod_gets_its_own_role_alone() -> None:
    condition = policy("assumed-by-eks")["Statement"][0]["Condition"]["StringEquals"]
    assert condition["oidc.example/id:sub"] == "system:serviceaccount:mergeyard:mergeyard-worker"
    accounts = (ROOT / "infra" / "kuberay" / "base" / "serviceaccounts.yaml").read_text("utf-8")
    written = {entry["metadata"]["name"]: entry["metadata"]["annotations"] for entry in yaml.safe_load_all(accounts)}
    (roles,) = re.findall(r"roles = \{(.*?)\}", text(), re.S)
    for name, given in written.items():
        assert given["eks.amazonaws.com/role-arn"].endswith(f":role/{name}")
        assert name.removeprefix("mergeyard-") in re.findall(r"(\w+)\s*=", roles)


def test_names_of_profiles_are_those_that_ray_up_asks_for() -> None:
    cluster = (ROOT / "infra" / "ray" / "aws.yaml").read_text("utf-8")
    asked = set(re.findall(r"IamInstanceProfile: \{Name: mergeyard-(\w+)\}", cluster))
    (roles,) = re.findall(r"roles = \{(.*?)\}", text(), re.S)
    assert asked == {"head", "worker"}
    assert asked <= set(re.findall(r"(\w+)\s*=", roles))


def test_the_outputs_prefix_is_the_one_that_may_be_written() -> None:
    (prefix,) = re.findall(r'"s3://\$\{aws_s3_bucket\.runs\.bucket\}/(\w+)"', text())
    assert allows(policy("worker"), "s3:PutObject", f"arn:aws:s3:::bucket/{prefix}/x")
    for path in Path(ROOT / "infra").rglob("*.yaml"):
        for output in re.findall(r"^output: s3://bucket/(\w+)", path.read_text("utf-8"), re.MULTILINE):
            assert output == prefix, path
