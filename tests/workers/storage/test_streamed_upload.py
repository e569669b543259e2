"""The upload of GCS and Azure, over a real S3 server: sizes around those of parts, and what is left behind."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from jobs.errors import AccessDenied, MergeyardError, ObjectMissing
from tests.conftest import BUCKET
from tests.fault_proxy import FaultProxy
from tests.seaweedfs import SeaweedFS
from workers.storage import cloud
from workers.storage.cloud import CloudStore, StreamedUpload

MIB = 1 << 18
"""A quarter of one, and so are the parts here."""
CONTENT = random.Random(9).randbytes(70 * MIB)


@pytest.fixture
def store(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> CloudStore:
    for name in ("LARGEST_SINGLE_PUT", "STREAMED_PART_BYTES"):
        monkeypatch.setattr(cloud, name, getattr(cloud, name) // 4)
    opened = cloud.open_cloud_store(s3_url)
    prefix = s3_url.removeprefix(f"s3://{BUCKET}/")
    return CloudStore(replace(opened._bucket, s3=None), prefix)


@pytest.mark.parametrize("size", [0, 3, 17 * MIB, 32 * MIB, 70 * MIB])
def test_what_is_streamed_reads_back(store: CloudStore, size: int) -> None:
    with store.upload("shard") as upload:
        assert isinstance(upload, StreamedUpload)
        for start in range(0, size, 1_300_000):
            upload.write(CONTENT[start : min(start + 1_300_000, size)])
        with pytest.raises(ObjectMissing):
            store.locate("shard")
        committed = upload.commit()
    assert committed == store.locate("shard")
    assert bytes(store.read("shard")) == CONTENT[:size]


@pytest.mark.parametrize("size", [0, 40 * MIB, 70 * MIB])
def test_an_aborted_stream_leaves_nothing(store: CloudStore, s3_server: SeaweedFS, size: int) -> None:
    with pytest.raises(KeyError), store.upload("shard") as upload:
        upload.write(CONTENT[:size])
        raise KeyError("the caller failed")
    assert list(store.list()) == []
    prefix = store.url.removeprefix(f"s3://{BUCKET}/")
    assert s3_server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", []) == []


def test_a_stream_that_is_refused_says_why(
    s3_url: str, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    refused = CloudStore(replace(cloud.open_cloud_store(s3_url)._bucket, s3=None), "x")
    with pytest.raises(MergeyardError) as refusal, refused.upload("shard") as upload:
        upload.write(CONTENT)
        upload.commit()
    assert isinstance(refusal.value, AccessDenied)
