"""Files as memory: what is in the page cache is used where it lies, while `pread` takes 0.5 ns to copy a byte.

A process that reads a mapped file dies by SIGBUS where another process has cut the file short, or its disk fails. Here
such a read finds zeros instead, and `Mapping.broken` is true.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import signal
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from typing import Any

CAN_MAP = sys.platform == "linux" and sys.maxsize > 1 << 32
"""Elsewhere the structures of signals are others: files are read."""

RELEASED_BYTES = 32 << 20
"""To let go of memory, every core must be asked: so it is done for several reads at once."""

MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
SA_SIGINFO = 4
ADDRESS_IN_SIGINFO = 16


class Mapping:
    """All `size` bytes of an open file as `data`; more than zero. They are unmapped with the last view.

    What is written to it stays in this process. Raises OSError where the system cannot map the file.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        _mind_bus_errors()
        self._descriptor = descriptor
        self._pages = mmap.mmap(
            descriptor, size, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self.data = memoryview(self._pages)
        self._released = 0
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self._range = _Range(first, first - (-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        number = next(_NUMBERS)
        _MAPPED[number] = self._range
        weakref.finalize(self._pages, _MAPPED.pop, number).atexit = False

    @property
    def broken(self) -> bool:
        """Whether a part of it could not be read and has become zeros."""
        return self._range.broken

    def fetch(self, start: int, length: int) -> None:
        """Begins to read bytes that are not in the page cache: at their first use, few pages would come at a time."""
        try:
            os.preadv(self._descriptor, [bytearray(1)], start + length - 1, os.RWF_NOWAIT)
        except OSError:
            self._advise(mmap.MADV_WILLNEED, start, length)

    def release(self, length: int) -> None:
        """Counts bytes that are no longer used. Now and then the process lets go of all, which the cache may keep.

        Else they would count as its memory. Who uses others meanwhile finds them in the cache again.
        """
        self._released += length
        if self._released >= RELEASED_BYTES:
            self._released = 0
            self._advise(mmap.MADV_DONTNEED, 0, len(self.data))

    def _advise(self, advice: int, start: int, length: int) -> None:
        page = start - start % mmap.PAGESIZE
        with suppress(OSError):
            self._pages.madvise(advice, page, start + length - page)


@dataclass(slots=True)
class _Range:
    """Addresses `[first, end)` of whole pages."""

    first: int
    end: int
    broken: bool = False


_NUMBERS = itertools.count()
_MAPPED: dict[int, _Range] = {}


class _Action(ctypes.Structure):
    """`struct sigaction` of glibc and musl."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_ubyte * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@cache
def _mind_bus_errors() -> Any:
    """Handles SIGBUS from now on; what it returns lives as long as the process.

    The handler is Python, on the thread whose load failed. That is safe: compiled loops, which have given up Python's
    lock, load from a mapping, and so do copies and digests; none holds a lock that the handler needs.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    earlier = _Action()

    def on_bus_error(number: int, info: int, context: int) -> None:
        try:
            address = ctypes.c_size_t.from_address(info + ADDRESS_IN_SIGINFO).value
            (range_,) = [each for each in list(_MAPPED.values()) if each.first <= address < each.end]
            range_.broken = True
            page = address // mmap.PAGESIZE * mmap.PAGESIZE
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED
            if libc.mmap(page, range_.end - page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) != page:
                raise MemoryError
        except BaseException:  # another's memory: the load fails again, and the earlier handler has it
            libc.sigaction(signal.SIGBUS, ctypes.byref(earlier), None)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)(on_bus_error)
    action = _Action(handler=ctypes.cast(handler, ctypes.c_void_p), flags=SA_SIGINFO)
    libc.sigaction(signal.SIGBUS, ctypes.byref(action), ctypes.byref(earlier))
    return handler
