"""Writing the rest of a file past the page cache, from aligned memory to the disk.

Fresh memory for the cache can cost more than the disk does: a virtual machine may have to ask its host for every page.
"""

from __future__ import annotations

import fcntl
import os
from errno import EFAULT, EINVAL
from functools import partial
from mmap import MAP_ANONYMOUS, MAP_PRIVATE, mmap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK = 4096
"""Bytes of which addresses, places and sizes are multiples; where a disk wants more, the cache gets the bytes."""

PIECE_BYTES = 1 << 20

_O_DIRECT = getattr(os, "O_DIRECT", 0)


def can_write_directly(descriptor: int) -> bool:
    """Whether a file lies on a block device: networks, memory, btrfs and overlays have no major number."""
    return bool(_O_DIRECT) and os.major(os.fstat(descriptor).st_dev) != 0


class DirectWriter:
    """Takes the bytes of a file from a multiple of `BLOCK` on; the caller closes the file.

    `write` and `finish` raise `OSError`, and again that of an earlier write.
    """

    def __init__(self, descriptor: int, position: int) -> None:
        assert position % BLOCK == 0
        import numpy as np  # a folder is opened without it

        self._descriptor, self._position = descriptor, position
        self._array = partial(np.frombuffer, dtype=np.uint8)
        self._piece = self._array(mmap(-1, PIECE_BYTES, flags=MAP_PRIVATE | MAP_ANONYMOUS))
        self._filled = 0
        self._error: OSError | None = None
        _switch(descriptor, on=True)

    def write(self, data: memoryview) -> None:
        """The next bytes. Of those that have the place in a block that they have in the file, few are copied."""
        taken = self._array(data)
        if (taken.__array_interface__["data"][0] - self._position - self._filled) % BLOCK == 0:
            first = min(len(taken), -self._filled % BLOCK)
            end = first + (len(taken) - first) // BLOCK * BLOCK
            if first < end:
                self._copy(taken[:first])
                self._put(self._piece[: self._filled])
                self._filled = 0
                self._put(taken[first:end])
                taken = taken[end:]
        self._copy(taken)

    def _copy(self, taken: NDArray[np.uint8]) -> None:
        done = 0
        while done < len(taken):
            part = taken[done : done + PIECE_BYTES - self._filled]
            self._piece[self._filled : self._filled + len(part)] = part  # NumPy gives up Python's lock meanwhile
            self._filled += len(part)
            done += len(part)
            if self._filled == PIECE_BYTES:
                self._put(self._piece)
                self._filled = 0

    def finish(self) -> None:
        """Writes the last bytes, which fill no block, through the cache."""
        _switch(self._descriptor, on=False)
        self._put(self._piece[: self._filled])

    def _put(self, some: NDArray[np.uint8]) -> None:
        if self._error is not None:
            raise self._error
        try:
            _write(self._descriptor, some.data, self._position)
        except OSError as error:
            self._error = error
            raise
        self._position += len(some)


def _write(descriptor: int, data: memoryview, position: int) -> None:
    done = 0
    while done < len(data):
        try:
            done += os.pwrite(descriptor, data[done:], position + done)
        except OSError as error:
            # refused for its place, or for memory that a driver has mapped; what else is wrong, the cache says too
            if error.errno not in (EFAULT, EINVAL) or not fcntl.fcntl(descriptor, fcntl.F_GETFL) & _O_DIRECT:
                raise
            _switch(descriptor, on=False)


def _switch(descriptor: int, *, on: bool) -> None:
    """Sends writes past the cache, or through it; a file system that cannot send them past it leaves it so."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT if on else flags & ~_O_DIRECT)
    except OSError as error:
        if error.errno != EINVAL:
            raise
