"""Writing the rest of a file past the page cache: from aligned memory to the disk, by threads beside the caller's.

Memory for the cache can cost more than the disk does. A virtual machine may ask its host for every fresh page, at 4 s a
GiB, and a kernel with many unwritten pages makes each writer wait. The disk then takes 1 GB/s for a tenth of the CPU
time.
"""

from __future__ import annotations

import fcntl
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor, wait
from errno import EINVAL
from functools import cache
from mmap import mmap

import numpy as np

BLOCK = 4096
"""Bytes of which addresses, places and sizes are multiples: no disk and no file system in use asks for more."""

PIECE_BYTES = 1 << 20
THREADS = 2
MOST_UNDER_WAY = 8
"""Pieces of all files that are being written: enough for a disk, and beside one piece a file all the memory."""

_O_DIRECT = getattr(os, "O_DIRECT", 0)
_room = threading.BoundedSemaphore(MOST_UNDER_WAY)
_free: deque[mmap] = deque()


def can_write_directly(descriptor: int) -> bool:
    """Whether a file is on a disk of this machine: network and memory file systems have no device with a number."""
    return bool(_O_DIRECT) and os.major(os.fstat(descriptor).st_dev) != 0


class DirectWriter:
    """Takes the bytes of a file from a multiple of `BLOCK` on; `finish` or `abandon` it before the file is closed.

    Any method but `abandon` raises the `OSError` of an earlier write.
    """

    def __init__(self, descriptor: int, position: int) -> None:
        assert position % BLOCK == 0
        self._descriptor, self._position = descriptor, position
        self._piece, self._filled = _memory(), 0
        self._under_way: deque[Future[None]] = deque()
        _switch(descriptor, on=True)

    def write(self, data: memoryview) -> None:
        """The next bytes, which are copied."""
        done = 0
        while done < len(data):
            part = data[done : done + PIECE_BYTES - self._filled]
            into = np.frombuffer(self._piece, np.uint8)[self._filled : self._filled + len(part)]
            into[:] = np.frombuffer(part, np.uint8)  # without Python's lock, unlike a memoryview
            self._filled += len(part)
            done += len(part)
            if self._filled == PIECE_BYTES:
                self._send()

    def finish(self) -> None:
        """Waits until all is written; the last bytes, which fill no block, go through the cache."""
        self._wait()
        _switch(self._descriptor, on=False)
        _write(self._descriptor, memoryview(self._piece)[: self._filled], self._position)
        _free.append(self._piece)

    def abandon(self) -> None:
        """Waits until nothing writes to the file any more."""
        wait(self._under_way)

    def _send(self) -> None:
        while self._under_way and self._under_way[0].done():
            self._under_way.popleft().result()
        _room.acquire()
        self._under_way.append(_threads().submit(_write_piece, self._descriptor, self._piece, self._position))
        self._position += PIECE_BYTES
        self._piece, self._filled = _memory(), 0

    def _wait(self) -> None:
        while self._under_way:
            self._under_way.popleft().result()


def _write_piece(descriptor: int, piece: mmap, position: int) -> None:
    try:
        _write(descriptor, memoryview(piece), position)
    finally:
        _free.append(piece)
        _room.release()


def _write(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:], position + done)
        except OSError as error:
            if error.errno != EINVAL or not fcntl.fcntl(descriptor, fcntl.F_GETFL) & _O_DIRECT:
                raise
            _switch(descriptor, on=False)  # this file system wants it otherwise: through the cache, then


def _switch(descriptor: int, *, on: bool) -> None:
    """Sends writes past the cache, or through it; a file system that cannot send them past it leaves it so."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT if on else flags & ~_O_DIRECT)
    except OSError as error:
        if error.errno != EINVAL:
            raise


def _memory() -> mmap:
    """A piece of memory that begins at a page."""
    try:
        return _free.popleft()
    except IndexError:
        return mmap(-1, PIECE_BYTES)


@cache
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(THREADS, "past the cache")
