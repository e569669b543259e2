"""What every writable store promises, on a folder with and without locks, in memory, on S3, Azure and GCS."""

from __future__ import annotations

import errno
import os
import random
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import pytest

from jobs.errors import BadInput, CorruptData, MergeyardError, ObjectChanged, ObjectExists, ObjectMissing
from workers.storage import ObjectInfo, Store, open_store

MIB = 1 << 20
RACERS = 6


def without_locks(*_: object) -> None:
    raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))


@pytest.fixture(params=["local", "local without flock", "memory", "s3", "azure", "gcs"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    if request.param.startswith("local"):
        if request.param != "local":
            monkeypatch.setattr("fcntl.flock", without_locks)
        return open_store(tmp_path / "store")
    if request.param == "memory":
        return open_store(f"memory://{uuid.uuid4().hex}")
    return open_store(request.getfixturevalue({"s3": "s3_url", "azure": "az_url", "gcs": "gs_url"}[request.param]))


def some_bytes(length: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(length)


def race(attempt: Callable[[int], ObjectInfo], losing: type[MergeyardError]) -> list[int]:
    """Which of the racers won, when all the others lost with the error `losing`."""

    def outcome(racer: int) -> bool:
        try:
            attempt(racer)
        except losing:
            return False
        return True

    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(outcome, range(RACERS)))
    return [racer for racer, did in enumerate(won) if did]


def test_read_returns_what_was_written(store: Store) -> None:
    written = store.write("folder/name.json", b'{"a": 1}')
    assert written.key == "folder/name.json"
    assert written.size == 8
    assert store.locate("folder/name.json") == written
    assert bytes(store.read("folder/name.json")) == b'{"a": 1}'


def test_a_store_is_found_writable_without_a_trace(store: Store) -> None:
    store.check_writable()
    assert list(store.list()) == []


def test_an_empty_object_is_an_object(store: Store) -> None:
    written = store.write("empty", b"")
    assert (written.size, bytes(store.read("empty")), store.locate("empty")) == (0, b"", written)
    assert bytes(store.read("empty", start=0, length=0)) == b""


@pytest.mark.parametrize(
    ("start", "length"), [(0, 1), (0, 1000), (999, 1), (10, 0), (1000, 0), (1000, None), (3, None), (500, 250)]
)
def test_a_range_has_exactly_its_bytes(store: Store, start: int, length: int | None) -> None:
    content = some_bytes(1000)
    etag = store.write("thousand", content).etag
    end = 1000 if length is None else start + length
    assert bytes(store.read("thousand", start=start, length=length)) == content[start:end]
    assert bytes(store.read("thousand", start=start, length=length, etag=etag)) == content[start:end]
    buffer = bytearray(end - start)
    store.read_into("thousand", memoryview(buffer), start=start, etag=etag)
    assert buffer == content[start:end]


@pytest.mark.parametrize(("start", "length"), [(0, 1001), (1000, 1), (2000, 1), (2000, None), (500, 2**40)])
def test_a_range_past_the_end_is_refused(store: Store, start: int, length: int | None) -> None:
    store.write("thousand", bytes(1000))
    with pytest.raises(CorruptData, match="1000 bytes"):
        store.read("thousand", start=start, length=length)


def test_a_buffer_longer_than_the_object_is_refused(store: Store) -> None:
    store.write("thousand", bytes(1000))
    with pytest.raises(CorruptData, match="1000 bytes"):
        store.read_into("thousand", memoryview(bytearray(1001)))


def test_an_upload_of_many_parts_reads_back_in_ranges(store: Store) -> None:
    content = some_bytes(37 * MIB + 5)
    with store.upload("large") as upload:
        for start in range(0, len(content), 7_000_001):
            piece = bytearray(content[start : start + 7_000_001])
            upload.write(piece)
            piece[:] = bytes(len(piece))  # the caller may reuse its buffer at once
        committed = upload.commit()
    assert committed.size == len(content)
    assert store.locate("large") == committed
    assert bytes(store.read("large")) == content
    buffer = bytearray(20 * MIB)
    store.read_into("large", memoryview(buffer), start=16 * MIB + 1, etag=committed.etag)
    assert buffer == content[16 * MIB + 1 : 36 * MIB + 1]
    assert bytes(store.read("large", start=5, length=33 * MIB)) == content[5 : 33 * MIB + 5]


def test_an_upload_is_invisible_until_commit(store: Store) -> None:
    with store.upload("folder/late") as upload:
        upload.write(bytes(20 * MIB))
        with pytest.raises(ObjectMissing):
            store.locate("folder/late")
        assert list(store.list()) == []
        upload.commit()
    assert [found.key for found in store.list()] == ["folder/late"]


@pytest.mark.parametrize("size", [0, 5, 40 * MIB])
def test_an_aborted_upload_leaves_nothing(store: Store, size: int) -> None:
    with pytest.raises(KeyError), store.upload("folder/never") as upload:
        upload.write(bytes(size))
        raise KeyError("the caller failed")
    upload.abort()
    assert list(store.list()) == []
    assert store.sweep() == 0
    with pytest.raises(ObjectMissing):
        store.read("folder/never")


def test_commit_replaces_the_object_and_changes_its_etag(store: Store) -> None:
    before = store.write("name", b"before")
    with store.upload("name") as upload:
        upload.write(b"after!")
        after = upload.commit()
        upload.abort()
    assert after.etag != before.etag
    assert bytes(store.read("name", etag=after.etag)) == b"after!"


def test_a_replaced_object_is_not_read_under_its_old_etag(store: Store) -> None:
    old = store.write("name", some_bytes(1000, seed=1))
    store.read("name", start=1, length=5, etag=old.etag)
    new = store.write("name", some_bytes(1000, seed=2))
    for start, length in [(0, None), (1, 5), (0, 0)]:
        with pytest.raises(ObjectChanged, match="name"):
            store.read("name", start=start, length=length, etag=old.etag)
    with pytest.raises(ObjectChanged, match="name"):
        store.read_into("name", memoryview(bytearray(10)), etag=old.etag)
    assert bytes(store.read("name", start=1, length=5, etag=new.etag)) == some_bytes(1000, seed=2)[1:6]


@pytest.mark.parametrize("size", [0, 10])
def test_an_object_replaced_by_a_shorter_one_has_changed(store: Store, size: int) -> None:
    old = store.write("name", some_bytes(1000, seed=1))
    store.read("name", start=500, length=5, etag=old.etag)
    store.write("name", some_bytes(size, seed=2))
    with pytest.raises(ObjectChanged, match="name changed while it was in use; run again"):
        store.read("name", start=500, length=5, etag=old.etag)
    with pytest.raises(ObjectChanged, match="name changed while it was in use; run again"):
        store.read_into("name", memoryview(bytearray(10)), start=500, etag=old.etag)


def test_create_refuses_an_object_that_is_there(store: Store) -> None:
    store.write("name", b"first", mode="create")
    with pytest.raises(ObjectExists, match="name"):
        store.write("name", b"second", mode="create")
    assert bytes(store.read("name")) == b"first"


def test_of_racing_creates_exactly_one_wins(store: Store) -> None:
    for lap in range(3):
        key = f"lap/{lap}"
        winners = race(lambda racer, key=key: store.write(key, b"racer %d" % racer, mode="create"), ObjectExists)
        assert len(winners) == 1
        assert bytes(store.read(key)) == b"racer %d" % winners[0]


@pytest.mark.parametrize("size", [1000, 17 * MIB])
def test_of_two_uploads_that_create_the_second_changes_nothing(store: Store, size: int) -> None:
    with store.upload("name", mode="create") as first, store.upload("name", mode="create") as second:
        for upload, byte in ((first, b"1"), (second, b"2")):
            upload.write(byte * size)
        first.commit()
        with pytest.raises(ObjectExists, match="name is already there"):
            second.commit()
    assert bytes(store.read("name")) == b"1" * size
    assert [info.key for info in store.list()] == ["name"]
    assert store.sweep() == 0


def test_swap_wants_the_current_version(store: Store) -> None:
    first = store.write("pointer", b"epoch 1")
    second = store.swap("pointer", b"epoch 2", etag=first.etag)
    with pytest.raises(ObjectChanged, match="pointer"):
        store.swap("pointer", b"epoch 3", etag=first.etag)
    assert bytes(store.read("pointer", etag=second.etag)) == b"epoch 2"
    store.delete("pointer")
    with pytest.raises(ObjectChanged, match="pointer"):
        store.swap("pointer", b"epoch 3", etag=second.etag)
    assert list(store.list()) == []


def test_of_racing_swaps_exactly_one_wins(store: Store) -> None:
    current = store.write("pointer", b"lap 0 racer 0")
    for lap in range(1, 5):
        etag = current.etag
        winners = race(lambda racer, lap=lap, etag=etag: swap_racer(store, lap, racer, etag), ObjectChanged)
        assert len(winners) == 1
        current = store.locate("pointer")
        assert bytes(store.read("pointer", etag=current.etag)) == b"lap %d racer %d" % (lap, winners[0])


def swap_racer(store: Store, lap: int, racer: int, etag: str) -> ObjectInfo:
    return store.swap("pointer", b"lap %d racer %d" % (lap, racer), etag=etag)


def test_swaps_of_equal_length_never_bring_an_etag_back(store: Store) -> None:
    seen = [store.write("pointer", b"%06d" % 0)]
    for step in range(1, 40):
        seen.append(store.swap("pointer", b"%06d" % step, etag=seen[-1].etag))
    assert all(before.etag != after.etag for before, after in pairwise(seen))
    assert len({info.etag for info in seen}) == 40


def test_list_finds_by_any_beginning_of_a_key(store: Store) -> None:
    keys = ["a", "a.json", "ab/c", "ab/cd/e", "b/a"]
    written = {store.write(key, key.encode()) for key in keys}
    assert set(store.list()) == written
    for prefix, found in {
        "a": ["a", "a.json", "ab/c", "ab/cd/e"],
        "ab/": ["ab/c", "ab/cd/e"],
        "ab/c": ["ab/c", "ab/cd/e"],
        "ab/cd/": ["ab/cd/e"],
        "c": [],
        "nowhere/": [],
    }.items():
        assert sorted(info.key for info in store.list(prefix)) == found


def test_list_is_whole_beyond_one_page(store: Store) -> None:
    keys = {f"receipts/{number % 7}/{number:04d}" for number in range(1100)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.write(key, b"x"), keys))
    found = [info.key for info in store.list("receipts/")]
    assert len(found) == 1100
    assert set(found) == keys


def test_delete_is_content_when_there_is_nothing(store: Store) -> None:
    store.write("folder/name", b"x")
    store.delete("folder/name")
    store.delete("folder/name")
    store.delete("other/name")
    assert list(store.list()) == []


def test_sweep_removes_what_dead_uploads_left_and_no_object(store: Store) -> None:
    kept = store.write("run/kept", b"x")
    for key in ("run/one", "run/two", "other/three"):
        upload = store.upload(key)
        upload.write(bytes(17 * MIB))
        forget_as_a_killed_process_would(upload)
    # Azure drops blocks without a blob by itself, after a week, and a lifecycle rule of GCS aborts uploads
    swept_by_the_service = store.url.startswith(("az://", "gs://"))
    assert store.sweep("run/") == (0 if swept_by_the_service else 2)
    assert store.sweep("run/") == 0
    assert store.sweep() == (0 if swept_by_the_service else 1)
    assert list(store.list()) == [kept]


def forget_as_a_killed_process_would(upload: object) -> None:
    partial = getattr(upload, "_file", None)
    if partial is not None:
        partial.detach().close()


@pytest.mark.parametrize(
    "key", ["", "/a", "a/", "a//b", "..", "../a", "a/../b", ".", "./a", "a\\b", "a\nb", "x" * 1025]
)
def test_a_bad_key_is_refused_everywhere(store: Store, key: str) -> None:
    for use in (store.locate, store.read, store.upload, store.delete, lambda bad: store.write(bad, b"")):
        with pytest.raises(BadInput, match="object key"):
            use(key)


@pytest.mark.parametrize("prefix", ["/", "../", "a/../b", "a//", ".."])
def test_a_bad_prefix_is_refused(store: Store, prefix: str) -> None:
    with pytest.raises(BadInput, match="object prefix"):
        list(store.list(prefix))
    with pytest.raises(BadInput, match="object prefix"):
        store.sweep(prefix)


def test_a_missing_object_is_named(store: Store) -> None:
    for use in (store.locate, store.read, lambda key: store.read_into(key, memoryview(bytearray(3)))):
        with pytest.raises(ObjectMissing, match="folder/absent does not exist"):
            use("folder/absent")


def test_many_threads_read_and_write_at_once(store: Store) -> None:
    contents = {f"object {number}": some_bytes(50_000, seed=number) for number in range(8)}

    def work(turn: int) -> bool:
        key = f"object {turn % 8}"
        if turn < 8:
            store.write(key, contents[key])
        else:
            store.write(f"copy {turn}", store.read(key))
        return bytes(store.read(key, start=turn, length=40_000)) == contents[key][turn : turn + 40_000]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(8)))
        assert all(pool.map(work, range(8, 48)))


def test_opening_the_url_again_gives_the_same_objects(store: Store) -> None:
    written = store.write("name", b"content")
    assert not store.url.endswith("/")
    assert open_store(store.url).locate("name") == written
    assert open_store(store.pinned_url).locate("name") == written
