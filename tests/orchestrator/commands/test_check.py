"""`mergeyard check`, and commands that write to a store that breaks its promises."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jobs.sealing import unsealed
from tests.orchestrator.conftest import Ended
from tests.quirky_s3 import BUCKET, QuirkyS3

PARENTS = Path(__file__).parents[3] / "jobs/examples/parents"
JOB = f"""\
name: small
parents: {{long: {PARENTS}/long, fmt: {PARENTS}/fmt}}
recipe:
  merge_method: linear
  dtype: bfloat16
  models: [{{model: long, parameters: {{weight: 0.5}}}}, {{model: fmt, parameters: {{weight: 0.5}}}}]
output: runs
evaluate: {{ruler: {{tasks: [niah_single_1], lengths: [256], items: 1}}}}
"""
URL = f"s3://{BUCKET}/runs"


def test_a_good_folder_in_words_and_as_json(mergeyard: Callable[..., Ended], tmp_path: Path) -> None:
    told = mergeyard("check", tmp_path)
    assert (told.code, told.out.splitlines()[-1]) == (0, "a run can have its output here")
    assert told.out.count("yes  ") == 8
    facts = mergeyard("check", tmp_path, "--json").facts
    assert (facts["store"], facts["settings"], facts["good"]) == (str(tmp_path), {}, True)
    assert [*tmp_path.iterdir()] == []


def test_a_service_that_ignores_conditions_is_told_apart(mergeyard: Callable[..., Ended], quirky_s3: QuirkyS3) -> None:
    quirky_s3.quirks.add("ignore_conditions")
    told = mergeyard("check", URL)
    assert told.code == 2
    assert f"endpoint        {quirky_s3.endpoint}" in told.out
    assert "it ignores If-None-Match and writes: two drivers could share a run" in told.out
    assert told.out.splitlines()[-1] == "a run cannot have its output here"
    assert "testsecret" not in told.out
    assert quirky_s3.objects == {}


def test_a_missing_bucket_is_not_written_to(mergeyard: Callable[..., Ended], quirky_s3: QuirkyS3) -> None:
    """Some services make a bucket at the first write."""
    quirky_s3.refuse = lambda asked: (404, "NoSuchBucket", "", {}) if asked.method == "GET" else None
    told = mergeyard("check", URL)
    assert (told.code, told.out.splitlines()[-1]) == (2, "a run cannot have its output here")
    assert f"s3://{BUCKET}: there is no such bucket; create it or correct the URL" in told.out
    assert not any(asked.method == "PUT" for asked in quirky_s3.seen)


@pytest.mark.parametrize("url", ["s3://", "s3:///runs", "s3://a b/runs", "gs://"])
def test_a_url_without_a_bucket_is_refused_as_everywhere(mergeyard: Callable[..., Ended], url: str) -> None:
    told = mergeyard("check", url)
    assert told.code == 2
    assert "://bucket/prefix, with a valid bucket name" in told.err


def test_a_service_that_is_away_is_to_be_tried_again(
    mergeyard: Callable[..., Ended], quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "0.1")
    quirky_s3.refuse = lambda asked: (503, "SlowDown", "", {})
    assert mergeyard("check", URL).code == 75


@pytest.mark.parametrize("verb", ["run", "evaluate", "nightly"])
def test_a_run_on_a_service_without_conditions_is_refused_and_leaves_nothing(
    mergeyard: Callable[..., Ended], quirky_s3: QuirkyS3, tmp_path: Path, verb: str
) -> None:
    quirky_s3.quirks.add("ignore_conditions")
    (tmp_path / "job.yaml").write_text(JOB + ("gate: {baseline: fmt}\n" if verb == "nightly" else ""))
    ended = mergeyard(verb, tmp_path / "job.yaml", "--output", URL, "--in-process")
    assert ended.code == 2, ended.err
    assert "this store ignores If-None-Match, so two drivers could share the run" in ended.err
    assert quirky_s3.objects == {}


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_every_run_on_a_file_system_without_flock_holds_a_lease_and_gives_it_back(
    mergeyard: Callable[..., Ended], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def flock(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    (tmp_path / "job.yaml").write_text(JOB.partition("evaluate:")[0])
    for epoch in (1, 2, 3):
        ended = mergeyard("run", tmp_path / "job.yaml", "--output", tmp_path / "runs", "--in-process")
        assert ended.code == 0, ended.err
        lease = unsealed((tmp_path / "runs/small/lease.json").read_bytes())
        assert (lease["epoch"], lease["released"]) == (epoch, True)
    assert mergeyard("check", tmp_path / "runs").code == 0
