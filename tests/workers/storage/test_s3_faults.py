"""What the S3 store survives, and what it says when it cannot: a real server behind a proxy that fails on order."""

from __future__ import annotations

import random
import time

import pytest

from jobs.errors import AccessDenied, BucketMissing, ObjectChanged, ObjectExists, ObjectMissing, StorageUnavailable
from tests.conftest import BUCKET
from tests.fault_proxy import FaultProxy
from tests.seaweedfs import SeaweedFS
from workers.storage import Store, open_store

MIB = 1 << 20
CONTENT = random.Random(3).randbytes(3 * MIB)


@pytest.fixture
def store(fault_proxy: FaultProxy, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "9")
    monkeypatch.setattr("workers.storage.s3.PART_BYTES", 5 * MIB)  # the least that S3 takes
    return open_store(s3_url)


def open_uploads(server: SeaweedFS, store: Store) -> list[str]:
    prefix = store.url.removeprefix(f"s3://{BUCKET}/")
    return [
        upload["Key"]
        for upload in server.client().list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    ]


@pytest.mark.parametrize("fault", ["busy", "reset", "truncate", "stall", "ignore_range", "other_etag", "lost_answer"])
def test_a_read_survives(store: Store, fault_proxy: FaultProxy, fault: str) -> None:
    etag = store.write("parent", CONTENT).etag
    fault_proxy.fail("GET", fault, times=1 if fault == "stall" else 2)
    assert bytes(store.read("parent", start=MIB, length=MIB, etag=etag)) == CONTENT[MIB : 2 * MIB]
    assert fault_proxy.broken == (1 if fault == "stall" else 2)


def test_every_range_of_a_large_read_survives_alone(store: Store, fault_proxy: FaultProxy) -> None:
    content = CONTENT * 14
    with store.upload("parent") as upload:
        upload.write(content)
        etag = upload.commit().etag
    for fault in ("busy", "truncate", "reset"):
        fault_proxy.fail("GET", fault)
    assert bytes(store.read("parent", etag=etag, start=0, length=len(content))) == content
    assert fault_proxy.broken == 3


@pytest.mark.serial
def test_a_service_that_stays_down_ends_in_one_line_within_the_patience(
    store: Store, fault_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "1")
    store.write("parent", CONTENT)
    fault_proxy.fail("GET", "busy", times=1000)
    began = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"parent: 503 SlowDown: .* \(tried \d+ times in \d s\); run again"):
        store.read("parent")
    assert time.monotonic() - began < 3


def test_an_object_replaced_between_two_ranges_is_noticed(store: Store, fault_proxy: FaultProxy) -> None:
    etag = store.write("parent", CONTENT).etag
    for method in ("GET", "HEAD"):
        fault_proxy.fail(method, "other_etag")
    with pytest.raises(ObjectChanged, match="parent changed"):
        store.read("parent", start=0, length=MIB, etag=etag)


def test_a_flipped_bit_passes_here_and_is_left_to_digests(store: Store, fault_proxy: FaultProxy) -> None:
    store.write("parent", CONTENT)
    fault_proxy.fail("GET", "flip")
    middle = len(CONTENT) // 2
    flipped = CONTENT[:middle] + bytes([CONTENT[middle] ^ 1]) + CONTENT[middle + 1 :]
    assert bytes(store.read("parent")) == flipped


@pytest.mark.parametrize("fault", ["busy", "reset", "lost_answer", "flip"])
def test_a_create_that_fails_on_its_way_still_wins(store: Store, fault_proxy: FaultProxy, fault: str) -> None:
    fault_proxy.fail("PUT", fault)
    written = store.write("receipt", b"mine", mode="create")
    assert (store.locate("receipt"), bytes(store.read("receipt"))) == (written, b"mine")
    with pytest.raises(ObjectExists):
        store.write("receipt", b"theirs", mode="create")


@pytest.mark.parametrize("fault", ["busy", "reset", "lost_answer", "flip"])
def test_a_swap_that_fails_on_its_way_still_wins(store: Store, fault_proxy: FaultProxy, fault: str) -> None:
    first = store.write("pointer", b"epoch 1 nonce a")
    fault_proxy.fail("PUT", fault)
    second = store.swap("pointer", b"epoch 2 nonce b", etag=first.etag)
    assert (store.locate("pointer"), bytes(store.read("pointer"))) == (second, b"epoch 2 nonce b")
    with pytest.raises(ObjectChanged):
        store.swap("pointer", b"epoch 2 nonce c", etag=first.etag)


def test_a_lost_answer_does_not_turn_anothers_create_into_ours(store: Store, fault_proxy: FaultProxy) -> None:
    store.write("receipt", b"theirs")
    fault_proxy.fail("PUT", "lost_answer")
    with pytest.raises(ObjectExists):
        store.write("receipt", b"mine", mode="create")


@pytest.mark.parametrize(
    ("method", "fault", "key"),
    [
        ("POST", "busy", "uploads"),
        ("PUT", "busy", "partNumber=1"),
        ("PUT", "reset", "partNumber=2"),
        ("PUT", "lost_answer", "partNumber=1"),
        ("PUT", "flip", "partNumber=2"),
        ("POST", "error_in_200", "uploadId="),
        ("POST", "busy", "uploadId="),
        ("POST", "lost_answer", "uploadId="),
        ("HEAD", "busy", "shard"),
    ],
)
def test_an_upload_survives(
    store: Store, fault_proxy: FaultProxy, s3_server: SeaweedFS, method: str, fault: str, key: str
) -> None:
    content = CONTENT * 2
    fault_proxy.fail(method, fault, key=key)
    with store.upload("shard") as upload:
        upload.write(content)
        committed = upload.commit()
    assert fault_proxy.broken == 1
    assert bytes(open_store(store.url).read("shard", etag=committed.etag)) == content
    assert open_uploads(s3_server, store) == []


def test_a_completed_upload_is_known_by_its_mark_when_the_service_forgot_it(
    store: Store, fault_proxy: FaultProxy, s3_server: SeaweedFS
) -> None:
    """Amazon answers a second Complete with NoSuchUpload; SeaweedFS would repeat the first answer."""
    with store.upload("shard") as upload:
        upload.write(CONTENT * 2)
        fault_proxy.fail("POST", "lost_answer", key="uploadId=")
        fault_proxy.fail("POST", "no_such_upload", key="uploadId=")
        committed = upload.commit()
    assert fault_proxy.broken == 2
    assert committed == store.locate("shard")
    assert committed.size == 2 * len(CONTENT)


def test_an_upload_that_fails_for_good_leaves_nothing_open(
    store: Store, fault_proxy: FaultProxy, s3_server: SeaweedFS, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "1")
    fault_proxy.fail("PUT", "busy", times=1000, key="partNumber=2")
    with pytest.raises(StorageUnavailable, match="shard part 2: 503 SlowDown"), store.upload("shard") as upload:
        upload.write(CONTENT * 4)
        upload.commit()
    assert open_uploads(s3_server, store) == []
    with pytest.raises(ObjectMissing):
        store.locate("shard")


def test_list_goes_on_behind_the_last_page_it_got(store: Store, fault_proxy: FaultProxy) -> None:
    for number in range(5):
        store.write(f"receipts/{number}", b"x")
    fault_proxy.fail("GET", "busy", times=2, key="list-type")
    assert [info.key for info in store.list("receipts/")] == [f"receipts/{number}" for number in range(5)]


@pytest.mark.heavy  # SeaweedFS needs 18 s to come back after a SIGKILL
def test_a_server_that_comes_back_is_waited_for(
    s3_server: SeaweedFS, s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)
    written = store.write("parent", CONTENT)
    s3_server.kill()
    with pytest.raises(StorageUnavailable, match="parent"):
        monkeypatch.setenv("MERGEYARD_STORAGE_PATIENCE_SECONDS", "0.5")
        store.read("parent")
    monkeypatch.delenv("MERGEYARD_STORAGE_PATIENCE_SECONDS")
    s3_server.restart()
    assert bytes(store.read("parent", etag=written.etag)) == CONTENT


def test_a_missing_bucket_is_named(s3_url: str) -> None:
    store = open_store("s3://no-such-bucket/run")
    for use in (store.locate, store.read, lambda key: list(store.list(key)), store.sweep):
        with pytest.raises(BucketMissing, match="s3://no-such-bucket: there is no such bucket"):
            use("name")


def test_a_bucket_that_went_is_not_an_object_that_somebody_replaced(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = open_store(s3_url)

    def refused(*_: object, **__: object) -> None:
        raise FileNotFoundError("404 Not Found: <Code>NoSuchBucket</Code>")

    monkeypatch.setattr("obstore.put", refused)
    with pytest.raises(BucketMissing, match="there is no such bucket"):
        store.swap("name", b"new", etag="old")


def test_refused_credentials_name_the_place_and_the_remedy_and_no_secret(
    s3_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-wrong-secret")
    store = open_store(s3_url)
    for use in (
        store.locate,
        store.read,
        lambda key: list(store.list(key)),
        lambda key: store.write(key, b"x"),
        lambda key: store.upload(key).write(bytes(17 * MIB)),
        store.sweep,
    ):
        with pytest.raises(AccessDenied, match="AWS_PROFILE") as refusal:
            use("name")
        assert s3_url in str(refusal.value)
        assert "\n" not in str(refusal.value)
        assert "secret" not in str(refusal.value).lower().replace("aws_secret_access_key", "")
        assert "test " not in str(refusal.value)


def test_absent_credentials_are_said_before_anything_is_asked(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    monkeypatch.setenv("AWS_CONFIG_FILE", "/nonexistent")
    with pytest.raises(AccessDenied, match="no credentials found"):
        open_store(s3_url)


@pytest.mark.parametrize("when", ["between its parts", "before its end"])
def test_an_upload_that_another_driver_swept_away_is_to_be_begun_again(s3_url: str, when: str) -> None:
    store = open_store(s3_url)
    with store.upload("shard") as upload:
        upload.write(bytes(17 * MIB))
        while not store.sweep():
            time.sleep(0.05)
        with pytest.raises(StorageUnavailable, match="the upload was aborted by another writer; run again"):
            if when == "between its parts":
                upload.write(bytes(200 * MIB))
            upload.commit()
    assert list(store.list()) == []
