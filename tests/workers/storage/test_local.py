"""What only a folder can do or suffer."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from jobs.errors import (
    AccessDenied,
    BadInput,
    ObjectChanged,
    ObjectExists,
    ObjectMissing,
    StorageError,
    StorageUnavailable,
)
from workers.storage import open_store

MIB = 1 << 20

NO_FLOCK = """
import errno, fcntl
def flock(*_): raise OSError(errno.ENOSYS, "Function not implemented")
fcntl.flock = flock
"""


def without_flock(*_: object, number: int = errno.ENOSYS) -> None:
    raise OSError(number, os.strerror(number))


def test_a_file_changed_in_place_is_noticed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    etag = store.write("parent", bytes(1000)).etag
    store.read("parent", etag=etag)
    with (tmp_path / "parent").open("r+b") as file:
        file.write(b"changed")
    with pytest.raises(ObjectChanged, match="parent changed"):
        store.read("parent", start=0, length=10, etag=etag)


def test_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    etag = store.write("parent", bytes(1000)).etag
    store.read("parent", etag=etag)
    os.truncate(tmp_path / "parent", 500)
    with pytest.raises(ObjectChanged, match="parent changed"):
        store.read("parent", start=0, length=400, etag=etag)


def test_reads_never_mix_two_versions_while_the_file_is_replaced(tmp_path: Path) -> None:
    store, writer = open_store(tmp_path), open_store(tmp_path)
    store.write("name", bytes([0]) * MIB)
    stop = threading.Event()

    def replace() -> None:
        for version in range(1, 200):
            writer.write("name", bytes([version]) * MIB)
        stop.set()

    thread = threading.Thread(target=replace)
    thread.start()
    buffer = bytearray(MIB)
    while not stop.is_set():
        store.read_into("name", memoryview(buffer))
        assert buffer.count(buffer[0]) == MIB
    thread.join()


def test_no_more_files_stay_open_than_the_cache_holds(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for number in range(100):
        store.write(f"{number}", b"x")
    before = open_descriptors()
    for number in range(100):
        store.read(f"{number}")
    assert open_descriptors() <= before + 33
    del store
    assert open_descriptors() <= before


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def test_an_upload_lies_hidden_beside_its_name_and_survives_a_sweep_while_it_lives(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    with store.upload("folder/shard") as upload:
        upload.write(bytes(2 * MIB))
        (unfinished,) = (tmp_path / "folder").iterdir()
        assert unfinished.name.startswith(".shard.")
        assert unfinished.name.endswith(".partial")
        assert store.sweep() == 0
        upload.commit()
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["shard"]


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    program = (
        "import os, sys; from workers.storage import open_store\n"
        "upload = open_store(sys.argv[1]).upload('run/shard'); upload.write(bytes(3 << 20))\n"
        "os.kill(os.getpid(), 9)"
    )
    killed = subprocess.run([sys.executable, "-c", program, tmp_path], timeout=60, check=False)
    assert killed.returncode == -9
    store = open_store(tmp_path)
    assert len(list((tmp_path / "run").iterdir())) == 1
    assert list(store.list()) == []
    assert store.sweep("run/sha") == 1
    assert list((tmp_path / "run").iterdir()) == []


@pytest.mark.parametrize("first", ["", NO_FLOCK], ids=["flock", "without flock"])
def test_of_racing_processes_exactly_one_creates_and_one_swaps(tmp_path: Path, first: str) -> None:
    program = first + (
        "import sys; from jobs.errors import StorageError; from workers.storage import open_store\n"
        "folder, etag, racer = sys.argv[1:]; store = open_store(folder); won = []\n"
        "sys.stdin.read(1)\n"
        "for name, act in (('create', lambda: store.write('new', racer.encode(), mode='create')),\n"
        "                  ('swap', lambda: store.swap('pointer', racer.encode(), etag=etag))):\n"
        "    try: act(); won.append(name)\n"
        "    except StorageError: pass\n"
        "print(*won)"
    )
    store = open_store(tmp_path)
    etag = store.write("pointer", b"first").etag
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", program, tmp_path, etag, str(number)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for number in range(4)
    ]  # fmt: skip
    won = [racer.communicate("g", timeout=60)[0].split() for racer in racers]
    assert sorted(word for words in won for word in words) == ["create", "swap"]
    creator = next(number for number, words in enumerate(won) if "create" in words)
    assert bytes(store.read("new")) == b"%d" % creator


def test_a_lock_that_a_killed_process_left_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fcntl.flock", without_flock)
    monkeypatch.setattr("workers.storage.local.HELD_SECONDS", 0.3)
    store = open_store(tmp_path)
    etag = store.write("pointer", b"first").etag
    (tmp_path / ".pointer.held.lock").touch()
    began = time.monotonic()
    assert bytes(store.read("pointer", etag=store.swap("pointer", b"second", etag=etag).etag)) == b"second"
    assert time.monotonic() - began >= 0.3
    assert [info.key for info in store.list()] == ["pointer"]
    assert not (tmp_path / ".pointer.held.lock").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_without_locks_a_living_upload_that_is_swept_has_to_begin_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr("fcntl.flock", partial(without_flock, number=number))
    store = open_store(tmp_path)
    with store.upload("shard") as upload:
        upload.write(bytes(MIB))
        assert store.sweep() == 1
        with pytest.raises(StorageUnavailable, match="the upload was aborted by another writer; run again"):
            upload.commit()
    with store.upload("shard") as upload:
        upload.write(bytes(MIB))
        upload.commit()
    assert [info.size for info in store.list()] == [MIB]


def test_create_works_where_there_are_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*paths: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    store = open_store(tmp_path)
    store.write("name", b"first", mode="create")
    with pytest.raises(ObjectExists):
        store.write("name", b"second", mode="create")
    assert bytes(store.read("name")) == b"first"
    assert [info.key for info in store.list()] == ["name"]


def test_a_full_disk_is_said_in_one_line_and_leaves_nothing(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], capture_output=True, check=False
    ).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        store = open_store(disk)
        with pytest.raises(StorageError, match="no room left on this disk; free some"), store.upload("shard") as upload:
            upload.write(bytes(9 * MIB))
        assert list(disk.iterdir()) == []
        assert store.free_bytes() == 4 * MIB
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        with pytest.raises(AccessDenied, match="read-only file system"):
            store.write("name", b"x")
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)
    with pytest.raises(AccessDenied, match="closed"):
        open_store(closed).write("name", b"x")


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    with pytest.raises(BadInput, match="a part of this path is a file"):
        open_store(tmp_path / "file").write("name", b"x")
    with pytest.raises(BadInput, match="is a file, not a folder"):
        list(open_store(tmp_path / "file").list())


def test_a_folder_in_the_place_of_an_object_is_named(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    store = open_store(tmp_path)
    with pytest.raises(ObjectMissing, match="folder is not a file"):
        store.read("folder")
    with pytest.raises(BadInput, match="is a folder, not a file"):
        store.write("folder", b"x")


def test_links_to_files_are_read_as_files(tmp_path: Path) -> None:
    """The hub's cache folders are made of them."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "blobs" / "abc").write_bytes(b"weights")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/abc")
    store = open_store(tmp_path / "snapshot")
    assert [(info.key, info.size) for info in store.list()] == [("model.safetensors", 7)]
    assert bytes(store.read("model.safetensors")) == b"weights"


def test_pipes_and_links_in_a_circle_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    (tmp_path / "lost").symlink_to("nowhere")
    (tmp_path / "file").write_bytes(b"x")
    assert [info.key for info in open_store(tmp_path).list()] == ["file"]


def test_names_of_unfinished_files_are_kept_for_them(tmp_path: Path) -> None:
    for key in ("folder/.name.123.partial", ".name.lock"):
        with pytest.raises(BadInput, match="kept for unfinished files"):
            open_store(tmp_path).write(key, b"x")


def test_the_room_left_is_that_of_the_disk_even_before_the_folder_exists(tmp_path: Path) -> None:
    room = open_store(tmp_path / "not" / "yet").free_bytes()
    assert room is not None
    assert room > 0
