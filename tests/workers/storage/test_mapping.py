"""Bytes of a file that are used where they lie: what they are, and what ends their use."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jobs.errors import CorruptData, ObjectChanged, StorageError, StorageUnavailable
from workers.storage.local import LocalStore
from workers.storage.mapping import CAN_MAP, Mapping, counts_as_memory

pytestmark = pytest.mark.skipif(
    not CAN_MAP or counts_as_memory(),
    reason="no files are mapped but on Linux (x86-64, ARM), without a limit of addresses",
)

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


def test_bytes_are_cached_once_they_were_read(store: LocalStore, tmp_path: Path) -> None:
    mapped = store.mapped("parent", start=0, length=SIZE)
    assert mapped is not None
    with (tmp_path / "parent").open("rb") as file:
        try:
            os.preadv(file.fileno(), [bytearray(1)], 0, os.RWF_NOWAIT)
        except BlockingIOError:
            pass
        except OSError:
            assert not mapped.are_cached()
            pytest.skip("this file system does not say what is in its cache")
        store.read("parent")
        assert mapped.are_cached()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if not mapped.are_cached():
        store.read("parent")
        assert mapped.are_cached()
    assert bytes(mapped.data) == (tmp_path / "parent").read_bytes()


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


def test_a_disk_that_fails_for_a_while_is_a_reason_to_try_again(store: LocalStore, tmp_path: Path) -> None:
    """A file that is whole again and has its old time stands for a disk that could not be read meanwhile."""
    mapped = store.mapped("parent", start=0, length=SIZE)
    assert mapped is not None
    times = (tmp_path / "parent").stat()
    os.truncate(tmp_path / "parent", 0)
    assert bytes(mapped.data[:10]) == bytes(10)
    os.truncate(tmp_path / "parent", SIZE)
    os.utime(tmp_path / "parent", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(StorageUnavailable, match="parent: a part of it could not be read for a while; run again"):
        mapped.release()


def test_a_disk_that_still_fails_is_named_with_its_own_error(
    store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reads that fail stand for a disk that does."""
    mapped = store.mapped("parent", start=0, length=SIZE)
    assert mapped is not None
    monkeypatch.setattr(Mapping, "broken_at", 5 * PAGE)

    def refuse(descriptor: int, buffers: list[memoryview], place: int) -> int:
        assert place == 5 * PAGE
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", refuse)
    with pytest.raises(StorageError, match="parent: Input/output error"):
        mapped.release()


def test_a_network_that_lost_the_file_is_a_reason_to_try_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The refusal stands for NFS, where another client has replaced the file."""
    mapped = store.mapped("parent", start=0, length=SIZE)
    assert mapped is not None

    def refuse(descriptor: int) -> os.stat_result:
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    with monkeypatch.context() as patch, pytest.raises(StorageUnavailable, match="parent: Stale file handle; run"):
        patch.setattr(os, "fstat", refuse)
        mapped.release()


def test_released_bytes_are_not_memory_of_the_process_for_long(store: LocalStore, tmp_path: Path) -> None:
    def of_files() -> int:
        status = Path("/proc/self/status").read_text()
        return sum(int(status.partition(f"{kind}:")[2].split()[0]) << 10 for kind in ("RssFile", "RssShmem"))

    size = 64 << 20
    (tmp_path / "large").write_bytes(b"\1" * size)
    before = of_files()
    for start in range(0, size, size // 16):
        mapped = store.mapped("large", start=start, length=size // 16)
        assert mapped is not None and mapped.data[0] == 1 and bytes(mapped.data).count(1) == size // 16
        mapped.release()
        assert of_files() - before <= (32 << 20) + (size // 16)
    assert of_files() - before < 8 << 20


def test_threads_release_bytes_at_once(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [store.mapped("parent", start=start, length=PAGE) for start in range(0, SIZE - PAGE, PAGE)]
    monkeypatch.setattr("workers.storage.mapping.RELEASED_BYTES", PAGE)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def release(first: int) -> None:
        for number in range(2000):
            part = parts[(first + number) % len(parts)]
            assert part is not None
            part.release()

    try:
        with ThreadPoolExecutor(8) as pool:
            assert [*pool.map(release, range(8))] == [None] * 8
    finally:
        sys.setswitchinterval(interval)


PROGRAM = """
import faulthandler, mmap, os, resource, signal, sys, threading
from pathlib import Path
from workers.storage.local import LocalStore

resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
path = Path(sys.argv[1], "parent")
path.write_bytes(bytes(9000))
other = mmap.mmap(os.open(path, os.O_RDONLY), 9000, prot=mmap.PROT_READ)
mapped = LocalStore(path.parent).mapped("parent", start=0, length=10)
"""


@pytest.mark.parametrize(
    "end",
    [
        "os.truncate(path, 0); print(other[5000])",
        "os.kill(os.getpid(), signal.SIGBUS); print(1)",
        "faulthandler.enable(); os.truncate(path, 0); print(other[5000])",
        "faulthandler.enable(); LocalStore(path.parent).mapped('parent', start=0, length=1); os.truncate(path, 0); "
        "print(other[5000])",
        "faulthandler.enable(); LocalStore(path.parent).mapped('parent', start=0, length=1); faulthandler.disable(); "
        "os.truncate(path, 0); print(other[5000])",
    ],
    ids=["read", "signal", "faulthandler", "faulthandler, then ours", "faulthandler no longer"],
)
def test_a_bus_error_elsewhere_still_ends_the_process(end: str, tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM + end, tmp_path], capture_output=True, timeout=60, check=False
    )
    assert (ended.returncode, ended.stdout) == (-signal.SIGBUS, b"")
    assert (b"Fatal Python error: Bus error" in ended.stderr) == ("enable" in end and "disable" not in end)


def test_files_are_mapped_by_many_threads_and_after_others_took_the_signal(tmp_path: Path) -> None:
    program = PROGRAM + (
        "faulthandler.enable()\n"
        "def work(n):\n"
        "    for i in range(50):\n"
        "        it = Path(sys.argv[1], f'{n}-{i}'); it.write_bytes(bytes(9000)); store = LocalStore(it.parent)\n"
        "        mapped = store.mapped(it.name, start=0, length=9000); os.truncate(it, 0)\n"
        "        assert bytes(mapped.data) == bytes(9000)\n"
        "threads = [threading.Thread(target=work, args=[n]) for n in range(4)]\n"
        "[each.start() for each in threads]; [each.join() for each in threads]; print('done')\n"
    )
    ended = subprocess.run([sys.executable, "-c", program, tmp_path], capture_output=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, b"done\n", b"")


def test_a_system_that_maps_no_files_reads_them(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, size: int) -> None:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))

    monkeypatch.setattr("workers.storage.local.Mapping", refuse)
    assert store.mapped("parent", start=0, length=10) is None


@pytest.mark.parametrize("limited", [resource.RLIMIT_AS, resource.RLIMIT_DATA, None])
def test_nothing_is_mapped_where_a_mapped_file_counts_as_memory(
    limited: int | None, store: LocalStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def limit(of: int) -> tuple[int, int]:
        return (1 << 40, 1 << 40) if of == limited else (resource.RLIM_INFINITY, resource.RLIM_INFINITY)

    (tmp_path / "overcommit").write_text("2\n" if limited is None else "0\n")
    monkeypatch.setattr("workers.storage.mapping.OVERCOMMIT", tmp_path / "overcommit")
    monkeypatch.setattr(resource, "getrlimit", limit)
    assert store.mapped("parent", start=0, length=10) is None


@pytest.mark.parametrize("missing", [None, 8])
def test_a_system_that_does_not_say_what_is_cached_reads_it(
    missing: int | None, store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python lacks the flag, or the function behind it."""

    def preadv(*_: object) -> int:
        raise NotImplementedError

    mapped = store.mapped("parent", start=0, length=10)
    assert mapped is not None
    monkeypatch.setattr("workers.storage.mapping.RWF_NOWAIT", missing)
    monkeypatch.setattr(os, "preadv", preadv)
    assert not mapped.are_cached()
