"""Bytes of a file that are used where they lie: what they are, and what ends their use."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jobs.errors import CorruptData, ObjectChanged, StorageError
from workers.storage.local import LocalStore
from workers.storage.mapping import CAN_MAP

pytestmark = pytest.mark.skipif(not CAN_MAP, reason="files are mapped on 64-bit Linux")

SIZE = 300_000
PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    (tmp_path / "parent").write_bytes(np.random.default_rng(8).bytes(SIZE))
    return LocalStore(tmp_path)


@pytest.mark.parametrize(("start", "length"), [(0, SIZE), (0, 1), (SIZE - 1, 1), (PAGE, PAGE), (PAGE + 3, 2 * PAGE)])
def test_the_bytes_are_those_that_a_read_copies(store: LocalStore, start: int, length: int) -> None:
    mapped = store.mapped("parent", start=start, length=length, etag=store.locate("parent").etag)
    assert mapped is not None
    assert bytes(mapped.data) == bytes(store.read("parent", start=start, length=length))
    mapped.release()


def test_what_is_written_to_them_stays_in_this_process(store: LocalStore, tmp_path: Path) -> None:
    before = (tmp_path / "parent").read_bytes()
    mapped = store.mapped("parent", start=0, length=SIZE)
    assert mapped is not None
    mapped.data[:10] = bytes(10)
    assert (tmp_path / "parent").read_bytes() == before


def test_a_file_that_is_another_version_or_too_short_is_not_mapped(store: LocalStore) -> None:
    with pytest.raises(ObjectChanged, match="parent changed"):
        store.mapped("parent", start=0, length=10, etag="another")
    with pytest.raises(CorruptData, match="parent has 300000 bytes"):
        store.mapped("parent", start=SIZE - 5, length=10)
    assert store.mapped("parent", start=0, length=0) is None


def test_a_replaced_file_stays_as_it_was_for_those_who_use_it(store: LocalStore) -> None:
    before = bytes(store.read("parent"))
    mapped = store.mapped("parent", start=0, length=SIZE)
    assert mapped is not None
    store.write("parent", b"new")
    assert bytes(mapped.data) == before
    mapped.release()


def test_a_file_that_is_cut_short_reads_as_zeros_from_there_and_is_refused(store: LocalStore, tmp_path: Path) -> None:
    before = bytes(store.read("parent"))
    first = store.mapped("parent", start=0, length=SIZE)
    second = store.mapped("parent", start=5 * PAGE, length=9)
    assert first is not None and second is not None
    os.truncate(tmp_path / "parent", 2 * PAGE)
    found = np.frombuffer(first.data, np.uint8)
    assert found[: 2 * PAGE].tobytes() == before[: 2 * PAGE]
    assert int(found.sum(dtype=np.int64)) == sum(before[: 2 * PAGE])
    assert bytes(second.data) == bytes(9)
    for mapped in (first, second):
        with pytest.raises(ObjectChanged, match="parent changed while it was in use; run again to pin"):
            mapped.release()


def test_a_disk_that_fails_is_named(store: LocalStore, tmp_path: Path) -> None:
    """A file that is whole again and has its old time stands for a disk that could not be read meanwhile."""
    mapped = store.mapped("parent", start=0, length=SIZE)
    assert mapped is not None
    times = (tmp_path / "parent").stat()
    os.truncate(tmp_path / "parent", 0)
    assert bytes(mapped.data[:10]) == bytes(10)
    os.truncate(tmp_path / "parent", SIZE)
    os.utime(tmp_path / "parent", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(StorageError, match="parent: a part of it cannot be read; check this disk and run again"):
        mapped.release()


def test_released_bytes_are_not_memory_of_the_process_for_long(store: LocalStore, tmp_path: Path) -> None:
    def of_files() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("RssFile:")[2].split()[0]) << 10

    size = 64 << 20
    (tmp_path / "large").write_bytes(b"\1" * size)
    before = of_files()
    for start in range(0, size, size // 16):
        mapped = store.mapped("large", start=start, length=size // 16)
        assert mapped is not None and mapped.data[0] == 1 and bytes(mapped.data).count(1) == size // 16
        mapped.release()
        assert of_files() - before <= (32 << 20) + (size // 16)
    assert of_files() - before < 1 << 20


def test_a_read_of_other_memory_that_has_no_file_still_ends_the_process(tmp_path: Path) -> None:
    program = (
        "import mmap, os, sys; from pathlib import Path; from workers.storage.local import LocalStore\n"
        "path = sys.argv[1] + '/parent'; open(path, 'wb').write(bytes(9000))\n"
        "assert LocalStore(Path(sys.argv[1])).mapped('parent', start=0, length=10).data[0] == 0\n"
        "other = mmap.mmap(os.open(path, os.O_RDONLY), 9000, prot=mmap.PROT_READ)\n"
        "os.truncate(path, 0); print(other[5000])"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGBUS, b"")


def test_a_file_system_without_maps_is_read(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, size: int) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr("workers.storage.local.Mapping", refuse)
    assert store.mapped("parent", start=0, length=10) is None
