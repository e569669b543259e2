"""Uploads into a folder that go on past the page cache, because it takes bytes too slowly."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import tempfile
from mmap import mmap
from pathlib import Path

import pytest

from jobs.errors import StorageError
from workers.storage import direct, local, open_store
from workers.storage.direct import BLOCK, PIECE_BYTES, DirectWriter, can_write_directly

pytestmark = pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="this system has no O_DIRECT")

WRITEBACK = 3 * BLOCK + 100


@pytest.fixture(autouse=True)
def slow_cache(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cache is slow from the first writeback on; the positions from which files were written past it."""
    begun: list[int] = []

    class Noted(DirectWriter):
        def __init__(self, descriptor: int, position: int) -> None:
            begun.append(position)
            super().__init__(descriptor, position)

    monkeypatch.setattr(local, "FIRST_WRITEBACK_BYTES", WRITEBACK)
    monkeypatch.setattr(local, "WRITEBACK_BYTES", 2 * WRITEBACK)
    monkeypatch.setattr(local, "SLOW_WRITEBACK_SECONDS", 0)
    monkeypatch.setattr(local, "can_write_directly", lambda descriptor: True)
    monkeypatch.setattr(local, "DirectWriter", Noted)
    return begun


def placed(data: bytes, apart: int) -> memoryview:
    """The bytes in memory, so far from their place in a page: those of 0 are not copied, those of 8 are."""
    memory = mmap(-1, len(data) + apart)
    memory[apart:] = data
    return memoryview(memory)[apart:]


def written(folder: Path, data: bytes | memoryview, cuts: list[int]) -> bytes:
    """The file of an upload that is written in parts."""
    store = open_store(folder)
    with store.upload("model") as upload:
        for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
            upload.write(memoryview(data)[start:stop])
        info = upload.commit()
    assert info.size == len(data) and [each.name for each in folder.iterdir()] == ["model"]
    return bytes(store.read("model", etag=info.etag))


@pytest.mark.parametrize(
    "size", [0, WRITEBACK, 4 * BLOCK, 4 * BLOCK + 1, 4 * BLOCK + PIECE_BYTES, 12 * PIECE_BYTES + 77]
)
@pytest.mark.parametrize("seed", range(3))
def test_the_file_has_the_bytes_however_they_are_cut(
    tmp_path: Path, slow_cache: list[int], size: int, seed: int
) -> None:
    numbers = random.Random(seed)
    data = numbers.randbytes(size)
    cuts = sorted(numbers.randint(0, size) for _ in range(8))
    assert written(tmp_path, data, cuts) == data
    cut = sorted({0, *cuts, size})
    reached = next((end for end in cut if end >= WRITEBACK), size)
    assert slow_cache == (
        [-(-reached // BLOCK) * BLOCK] if size > reached and size >= -(-reached // BLOCK) * BLOCK else []
    )


@pytest.mark.parametrize("apart", [0, 8, BLOCK // 2])
def test_whole_blocks_at_their_place_are_not_copied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: int
) -> None:
    """A file begins at a block; its bytes here do so too, or lie apart from that."""
    pwrite, sizes = os.pwrite, list[int]()

    def noted(descriptor: int, data: memoryview, position: int) -> int:
        sizes.append(len(data))
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(direct.os, "pwrite", noted)
    data = placed(random.Random(3).randbytes(5 * PIECE_BYTES + 77), apart)
    assert written(tmp_path, data, [4 * BLOCK, 4 * BLOCK + 99, 3 * PIECE_BYTES + 5]) == data
    assert (max(sizes) > PIECE_BYTES) is (apart == 0)
    assert sum(sizes) == len(data) - 4 * BLOCK


def test_a_fast_cache_has_all_of_the_file(
    tmp_path: Path, slow_cache: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "SLOW_WRITEBACK_SECONDS", 60)
    data = random.Random(0).randbytes(20 * BLOCK)
    assert written(tmp_path, data, [7 * BLOCK]) == data and not slow_cache


def test_the_first_writeback_comes_sooner_than_the_others(
    tmp_path: Path, slow_cache: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "SLOW_WRITEBACK_SECONDS", 60)
    begun: list[tuple[int, int]] = []
    monkeypatch.setattr(local.os, "posix_fadvise", lambda file, start, length, advice: begun.append((start, length)))
    written(tmp_path, bytes(20 * BLOCK), [block * BLOCK for block in range(1, 20)])
    assert begun == [(0, 4 * BLOCK), (4 * BLOCK, 7 * BLOCK), (11 * BLOCK, 7 * BLOCK)]


@pytest.mark.parametrize("apart", [0, 8])
@pytest.mark.parametrize("refuses", ["the writes", "the memory", "the flag"])
def test_a_file_system_that_refuses_gets_the_bytes_through_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuses: str, apart: int
) -> None:
    pwrite, control = os.pwrite, fcntl.fcntl

    def refused_write(descriptor: int, data: memoryview, position: int) -> int:
        if control(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL if refuses == "the writes" else errno.EFAULT, "refused")
        return pwrite(descriptor, data, position)

    def refused_flag(descriptor: int, command: int, flags: int = 0) -> int:
        if command == fcntl.F_SETFL and flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return control(descriptor, command, flags)

    if refuses != "the flag":
        monkeypatch.setattr(direct.os, "pwrite", refused_write)
    else:
        monkeypatch.setattr(direct.fcntl, "fcntl", refused_flag)
    data = placed(random.Random(1).randbytes(3 * PIECE_BYTES + 5), apart)
    assert written(tmp_path, data, [4 * BLOCK]) == data


@pytest.mark.parametrize("apart", [0, 8])
def test_a_part_of_a_write_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, apart: int) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(direct.os, "pwrite", lambda file, data, at: pwrite(file, data[: 3 * BLOCK], at))
    data = placed(random.Random(2).randbytes(3 * PIECE_BYTES + 5), apart)
    assert written(tmp_path, data, [4 * BLOCK]) == data


@pytest.mark.parametrize("apart", [0, 8])
@pytest.mark.parametrize("again", ["write", "commit"])
def test_a_full_disk_is_said_as_often_as_it_is_asked_and_nothing_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str, apart: int
) -> None:
    def full(descriptor: int, data: memoryview, position: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    upload = open_store(tmp_path).upload("model")
    upload.write(bytes(4 * BLOCK))
    with monkeypatch.context() as patch:
        patch.setattr(direct.os, "pwrite", full)
        with pytest.raises(StorageError, match="no room left on this disk"):
            upload.write(placed(bytes(PIECE_BYTES), apart))
    with pytest.raises(StorageError, match="no room left on this disk"), upload:
        upload.write(placed(bytes(PIECE_BYTES), apart)) if again == "write" else upload.commit()
    assert not [*tmp_path.iterdir()]


def test_an_upload_that_is_given_up_leaves_nothing_and_takes_no_more(tmp_path: Path) -> None:
    with open_store(tmp_path).upload("model") as upload:
        for _ in range(3):
            upload.write(bytes(PIECE_BYTES))
    assert not [*tmp_path.iterdir()]
    with pytest.raises(ValueError, match="the upload has ended"):
        upload.write(b"more")


def test_whole_pieces_pass_the_cache_and_the_rest_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite, passed = os.pwrite, list[tuple[int, bool]]()

    def noted(descriptor: int, data: memoryview, position: int) -> int:
        passed.append((len(data), bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT)))
        return pwrite(descriptor, data, position)

    monkeypatch.setattr(direct.os, "pwrite", noted)
    with (tmp_path / "probe").open("wb") as file:
        if not can_write_directly(file.fileno()):
            pytest.skip("the temporary folder is on no block device")
    (tmp_path / "probe").unlink()
    assert written(tmp_path, placed(bytes(4 * BLOCK + 2 * PIECE_BYTES + 7), 8), [4 * BLOCK])
    assert passed == [(PIECE_BYTES, True), (PIECE_BYTES, True), (7, False)]


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="no file system in memory here")
def test_a_file_in_memory_is_not_on_a_block_device() -> None:
    with tempfile.TemporaryFile(dir="/dev/shm") as file:
        assert not can_write_directly(file.fileno())
