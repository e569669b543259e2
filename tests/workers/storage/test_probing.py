"""The promises of a store, asked: a store that breaks one is named, and nothing of the asking stays behind."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from typing_extensions import Buffer

from jobs.errors import AccessDenied, StorageRefused, StorageUnavailable
from tests.quirky_s3 import BUCKET, Asked, QuirkyS3, Refusal
from workers.storage import ObjectInfo, open_store
from workers.storage.memory import MemoryStore
from workers.storage.probing import broken_condition, probe, settings

URL = f"s3://{BUCKET}/runs"
CONDITIONS = "refuses to create an object that is there, and to replace another version"


class Careless(MemoryStore):
    """A store that reads no conditions, or only those of `create`."""

    def __init__(self, heeds_create: bool) -> None:
        super().__init__("memory://careless")
        self.heeds_create = heeds_create

    def write(self, key: str, data: Buffer, *, mode: Literal["create", "overwrite"] = "overwrite") -> ObjectInfo:
        return super().write(key, data, mode=mode if self.heeds_create else "overwrite")

    def swap(self, key: str, data: Buffer, *, etag: str) -> ObjectInfo:
        return super().write(key, data)


@pytest.mark.parametrize(("heeds_create", "broken"), [(False, "If-None-Match"), (True, "If-Match")])
def test_the_condition_that_a_store_ignores_is_named(heeds_create: bool, broken: str) -> None:
    store = Careless(heeds_create)
    store.write("lease", b"0")
    assert broken_condition(store, "lease", lambda: b"1") == broken


def test_a_folder_keeps_every_promise_and_is_left_as_it_was(tmp_path: Path) -> None:
    open_store(tmp_path).write("mine", b"x")
    findings = probe(str(tmp_path))
    assert [finding.promise for finding in findings if finding.trouble] == []
    assert len(findings) == 8
    assert [info.key for info in open_store(tmp_path).list()] == ["mine"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_good_service_keeps_every_promise(s3_url: str) -> None:
    assert [finding for finding in probe(s3_url) if finding.trouble] == []
    assert list(open_store(s3_url).list()) == []


@pytest.mark.parametrize("quirk", ["ignore_conditions", "ignore_if_match"])
def test_a_service_without_conditions_is_found_and_left_empty(quirky_s3: QuirkyS3, quirk: str) -> None:
    quirky_s3.quirks.add(quirk)
    broken = {finding.promise: finding.trouble for finding in probe(URL) if finding.trouble}
    header = "If-None-Match" if quirk == "ignore_conditions" else "If-Match"
    assert broken == {CONDITIONS: f"it ignores {header} and writes: two drivers could share a run"}
    assert quirky_s3.objects == {}


def test_a_listing_without_the_newest_object_is_found(quirky_s3: QuirkyS3) -> None:
    quirky_s3.quirks.add("forget_listed")
    (broken,) = [finding for finding in probe(URL) if finding.trouble]
    assert (broken.promise, broken.trouble) == (
        "lists new objects at once, and all of them",
        "1 of 2 objects are listed",
    )


def test_a_bucket_that_can_only_be_read_is_told_from_one_that_cannot(quirky_s3: QuirkyS3) -> None:
    quirky_s3.refuse = lambda asked: (403, "AccessDenied", "no", {}) if asked.method in ("PUT", "POST") else None
    findings = probe(URL)
    assert [(finding.promise, finding.trouble is None) for finding in findings] == [
        ("lists the folder", True),
        ("writes a small object and reads it back", False),
    ]


def test_what_cannot_be_deleted_is_named(quirky_s3: QuirkyS3) -> None:
    quirky_s3.refuse = lambda asked: (403, "AccessDenied", "no", {}) if asked.method == "DELETE" else None
    *_, last = probe(URL)
    assert last.promise == "deletes"
    assert all(f"{key.removeprefix('runs/')} stays" in (last.trouble or "") for key in quirky_s3.objects)
    assert len(quirky_s3.objects) == 2


def test_a_service_that_is_away_is_no_finding(quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "0.1")
    quirky_s3.refuse = lambda asked: (503, "SlowDown", "later", {})
    with pytest.raises(StorageUnavailable, match="503 SlowDown: later"):
        probe(URL)


def test_settings_are_in_words_and_without_secrets(quirky_s3: QuirkyS3, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SERVER_SIDE_ENCRYPTION", "aws:kms")
    monkeypatch.setenv("AWS_SSE_KMS_KEY_ID", "my-key")
    monkeypatch.setenv("http_proxy", "http://user:password@proxy.example:3128")
    found = settings(URL)
    assert found["endpoint"] == quirky_s3.endpoint
    assert (found["addressing"], found["region"]) == ("path style", "us-east-1")
    assert (found["encryption"], found["proxy"]) == ("aws:kms my-key", "http://proxy.example:3128")
    assert found["credentials"] == "from env"
    assert not any(secret in str(found) for secret in ("testsecret", "password", "user"))
    assert settings("/folder") == {}


def test_a_truncated_listing_without_a_token_is_read_to_its_end(quirky_s3: QuirkyS3) -> None:
    quirky_s3.quirks.add("no_tokens")
    quirky_s3.objects |= {f"runs/{number:04d}": (b"x", '"e"', {}) for number in range(2500)}
    assert [info.key for info in open_store(URL).list()] == [f"{number:04d}" for number in range(2500)]


def test_a_service_that_answers_conditions_with_501_is_refused_at_once(quirky_s3: QuirkyS3) -> None:
    def refuse(asked: Asked) -> Refusal | None:
        conditional = {"if-none-match", "if-match"} & asked.headers.keys()
        return (501, "NotImplemented", "A header implies functionality", {}) if conditional else None

    quirky_s3.refuse = refuse
    with pytest.raises(StorageRefused, match="no conditional writes") as refusal:
        open_store(URL).write("lease.json", b"x", mode="create")
    assert (refusal.value.exit_code, isinstance(refusal.value, AccessDenied)) == (2, False)
    assert len(quirky_s3.seen) == 1
