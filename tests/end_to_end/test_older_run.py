"""A run that an older mergeyard left resumes: nothing is merged or asked again, and every file keeps its bytes.

`older_run/` was written by 22fd1ff, before the code was moved into rooms: `mergeyard run --in-process --json` on both
jobs, against the S3 server of these tests, whose ETags are digests of the content. `merged` merges two tiny
checkpoints by TIES at three densities; `evaluated` scores three unwritten merges of the example parents, with a gate.
Left out are pages, leases, and the example parents, which lie in jobs/examples/.
"""

from __future__ import annotations

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BUCKET
from tests.end_to_end.command import ROOT, run_here
from tests.seaweedfs import SeaweedFS

OLDER = Path(__file__).parent / "older_run"
EXAMPLES = ROOT / "jobs" / "examples" / "parents"
PREFIX = "older/"
RENEWED = ("lease.json", "job.yaml", "report/", "gate/")
"""Written anew by every run; the numbers in them are compared instead."""


@pytest.fixture
def older(s3_environment: SeaweedFS) -> Any:
    """A client of the server, with the older runs and their parents where their plans say."""
    client = s3_environment.client()
    places = {
        OLDER / "merged": "runs/merged",
        OLDER / "evaluated": "runs/evaluated",
        OLDER / "parents": "parents",
        EXAMPLES: "parents",
    }
    for folder, prefix in places.items():
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            key = f"{PREFIX}{prefix}/{path.relative_to(folder).as_posix()}"
            client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
    return client


def kept(client: Any, run: str) -> dict[str, bytes]:
    """The files of a run that no later run may change or add to."""
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{PREFIX}runs/{run}/")
    keys = [entry["Key"] for page in pages for entry in page["Contents"]]
    names = {key: key.removeprefix(f"{PREFIX}runs/{run}/") for key in keys}
    return {
        name: client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        for key, name in names.items()
        if not name.startswith(RENEWED)
    }


def resumed(name: str, folder: Path, code: int) -> dict[str, Any]:
    ended = run_here("run", "--in-process", "--json", OLDER / f"{name}.yaml", folder=folder)
    assert ended.code == code, ended.err
    return json.loads(ended.out)


def test_a_merged_run_is_found_whole_and_verifies(older: Any, tmp_path: Path) -> None:
    before = kept(older, "merged")
    assert sum(name.startswith("receipts/") for name in before) == 9
    facts = resumed("merged", tmp_path, 0)
    assert (facts["units_merged"], facts["units_found"], facts["bytes_read"]) == (0, 9, 0)
    assert kept(older, "merged") == before
    verified = run_here("verify", f"s3://{BUCKET}/{PREFIX}runs/merged", folder=tmp_path)
    assert (verified.code, verified.err) == (0, "")


def test_a_run_that_an_older_version_left_half_merged_goes_on(older: Any, tmp_path: Path) -> None:
    lost = "points/density0.5/model-00002-of-00003.safetensors"
    before = kept(older, "merged")
    receipts = {json.loads(data)["key"]: name for name, data in before.items() if name.startswith("receipts/")}
    gone = {lost, receipts[lost], "points/density0.5/manifest.json"}
    for name in gone:
        older.delete_object(Bucket=BUCKET, Key=f"{PREFIX}runs/merged/{name}")
    facts = resumed("merged", tmp_path, 0)
    assert (facts["units_merged"], facts["units_found"]) == (1, 8)
    after = kept(older, "merged")
    assert after.keys() == before.keys()
    changed = {name for name in before if before[name] != after[name]} - gone
    assert changed == {"points/density0.5/README.md", "points/density0.5/config.json"}, "those beside the weights"
    assert after[lost] == before[lost]
    tensors = json.loads(after["points/density0.5/manifest.json"])["tensors"].values()
    renewed = {entry["file"] for entry in tensors if entry["digest"].startswith("blake3:")}
    assert renewed == {lost.rsplit("/", 1)[1]} < {entry["file"] for entry in tensors}
    verified = run_here("verify", f"s3://{BUCKET}/{PREFIX}runs/merged", folder=tmp_path)
    assert (verified.code, verified.err) == (0, "")


def test_a_point_of_an_older_version_is_checked_as_a_parent(older: Any, tmp_path: Path) -> None:
    point = f"{PREFIX}runs/merged/points/density0.5"
    (tmp_path / "copy.yml").write_text(f"merge_method: passthrough\nmodels: [{{model: 's3://{BUCKET}/{point}'}}]\n")
    assert run_here("merge", "copy.yml", "whole", "--quiet", folder=tmp_path).code == 0
    key = f"{point}/model-00002-of-00003.safetensors"
    data = bytearray(older.get_object(Bucket=BUCKET, Key=key)["Body"].read())
    data[-1] ^= 1
    older.put_object(Bucket=BUCKET, Key=key, Body=bytes(data))
    ended = run_here("merge", "copy.yml", "damaged", "--quiet", folder=tmp_path)
    assert ended.code == 1 and "is not the one of manifest.json there" in ended.err, ended.err


def test_an_evaluated_run_asks_nothing_again_and_says_the_same(older: Any, tmp_path: Path) -> None:
    then = json.loads((OLDER / "evaluated.json").read_text())
    before = kept(older, "evaluated")
    assert sum(name.startswith("scores/") for name in before) == 29
    facts = resumed("evaluated", tmp_path, 3)
    assert kept(older, "evaluated") == before
    for name in ("score", "half_width", "by_benchmark", "by_length"):
        assert [line[name] for line in facts["leaderboard"]] == [line[name] for line in then["leaderboard"]]
    for line in facts["leaderboard"]:  # of RULER and the needle now, as by_length is; of RULER alone then
        reached = [*takewhile(lambda entry: entry[1] >= 85.6, line["by_length"].items())]
        assert line["effective_length"][1] == (int(reached[-1][0]) if reached else 0)
    assert facts["gate"]["outcome"] == then["gate"]["outcome"] == "inconclusive"
