"""Files as memory: what is in the page cache is used where it lies, while `pread` takes 0.5 ns to copy a byte.

A process that reads a mapped file dies by SIGBUS where another process has cut the file short, or its disk fails. Here
such a read finds zeros, and so does each later one of the rest of the file; `Mapping.broken_at` says from where on.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import mmap
import os
import resource
import signal
import sys
import threading
import weakref
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

CAN_MAP = sys.platform == "linux" and os.uname().machine in ("x86_64", "aarch64") and sys.maxsize > 1 << 32
"""Elsewhere the structures of signals are others: a load that fails ends the process, and merges read files."""

RELEASED_BYTES = 32 << 20
"""To let go of memory, every core must be asked: so it is done for several reads at once."""

MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000 if sys.platform == "linux" else 0
SA_SIGINFO, SA_RESETHAND = 4, -0x80000000
CODE_IN_SIGINFO, ADDRESS_IN_SIGINFO = 8, 16
RWF_NOWAIT = getattr(os, "RWF_NOWAIT", None)
OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")


class Mapping:
    """All `size` bytes of an open file, more than zero. They are unmapped with the last view of a `part`.

    What is written to it stays in this process. Raises OSError where the system cannot map the file or would count all
    of it as memory, and ValueError if the file has become shorter.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        if counts_as_memory():
            raise OSError(errno.ENOMEM, "a mapped file counts as memory here")
        self._descriptor = descriptor
        self._pages = mmap.mmap(
            descriptor, size, flags=mmap.MAP_PRIVATE | MAP_NORESERVE, prot=mmap.PROT_READ | mmap.PROT_WRITE
        )
        self._released, self._first, self._end = 0, size, 0
        first = ctypes.addressof(ctypes.c_char.from_buffer(self._pages))
        self._range = _Range(first, first - (-size // mmap.PAGESIZE) * mmap.PAGESIZE)
        number = next(_NUMBERS)
        _MAPPED[number] = self._range
        weakref.finalize(self._pages, _MAPPED.pop, number).atexit = False

    def part(self, start: int, length: int) -> memoryview:
        """Bytes `[start, start + length)`. To load one that cannot be read does not end the process from now on."""
        _mind_bus_errors()
        return memoryview(self._pages)[start : start + length]

    @property
    def broken_at(self) -> int | None:
        """The first byte that could not be read: from its page on, all bytes have become zeros."""
        return self._range.broken_at

    def is_cached(self, place: int) -> bool:
        """Whether a byte is in the page cache; False where the system does not say so, as on a network or in tmpfs."""
        if RWF_NOWAIT is None or not CAN_MAP:
            return False
        try:
            return os.preadv(self._descriptor, [bytearray(1)], place, RWF_NOWAIT) == 1
        except (OSError, NotImplementedError):  # not cached; or the file system, or Python's libc, lacks the flag
            return False

    def release(self, start: int, length: int) -> None:
        """Counts bytes that are no longer used. Now and then the process lets go of them, which the cache may keep.

        Else they would count as its memory. Who uses others between them finds those in the cache again.
        """
        first, end = min(self._first, start), max(self._end, start + length)
        self._released += length
        if self._released < RELEASED_BYTES:
            self._first, self._end = first, end
            return
        self._released, self._first, self._end = 0, len(self._pages), 0
        page = first - first % mmap.PAGESIZE
        _libc().madvise(self._range.first + page, end - page, mmap.MADV_DONTNEED)  # `mmap.madvise` keeps Python's lock


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc


def counts_as_memory() -> bool:
    """Whether a limit (`ulimit -v`, `ulimit -d`) or the system's strict accounting has no room for addresses alone."""
    limits = (resource.getrlimit(each)[0] for each in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    with suppress(OSError):
        return OVERCOMMIT.read_text().strip() == "2"
    return False


@dataclass(slots=True)
class _Range:
    """Addresses `[first, end)` of whole pages."""

    first: int
    end: int
    broken_at: int | None = None


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


class _BusErrors:
    """The handler of SIGBUS, in Python, on the thread whose load failed.

    Compiled loops, which have given up Python's lock, load from a mapping, and so do copies and digests. None of them
    holds a lock that the handler needs. A failed load elsewhere is left to the earlier handler, and ends the process if
    that does not; so does a SIGBUS that a program sends.
    """

    def __init__(self) -> None:
        self._libc = _libc()
        kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
        self._function = kind(self._on_error)
        self._ours = _Action(handler=ctypes.cast(self._function, ctypes.c_void_p), flags=SA_SIGINFO)
        self._earlier = _Action()

    def install(self) -> None:
        """Handles SIGBUS from now on, unless it does so already."""
        found = _Action()
        self._libc.sigaction(signal.SIGBUS, None, ctypes.byref(found))
        if found.handler != self._ours.handler:
            self._earlier = found
            self._act_by(self._ours)

    def _act_by(self, action: _Action) -> None:
        self._libc.sigaction(signal.SIGBUS, ctypes.byref(action), None)

    def _on_error(self, number: int, info: int, context: int) -> None:
        if ctypes.c_int.from_address(info + CODE_IN_SIGINFO).value <= 0:  # sent by a program, and not by a load
            self._act_by(_Action())
            signal.raise_signal(signal.SIGBUS)
        elif not self._became_zeros(ctypes.c_size_t.from_address(info + ADDRESS_IN_SIGINFO).value):
            once = self._earlier.flags | SA_RESETHAND  # the load fails again, and a third time by default
            self._act_by(_Action(self._earlier.handler, self._earlier.mask, once, self._earlier.restorer))

    def _became_zeros(self, address: int) -> bool:
        """Whether the address lies in a mapped file, whose rest has become zeros."""
        for each in reversed(list(_MAPPED.values())):  # one that was unmapped may be there still
            if each.first <= address < each.end:
                each.broken_at = address - each.first
                page = address // mmap.PAGESIZE * mmap.PAGESIZE
                flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE
                return self._libc.mmap(page, each.end - page, mmap.PROT_READ | mmap.PROT_WRITE, flags, -1, 0) == page
        return False


_BUS_ERRORS: list[_BusErrors] = []
_INSTALLING = threading.Lock()


def _mind_bus_errors() -> None:
    """Installs the one handler of this process, which lives as long as this does, or again where another took over."""
    if not CAN_MAP:
        return
    with _INSTALLING:
        if not _BUS_ERRORS:
            _BUS_ERRORS.append(_BusErrors())
        _BUS_ERRORS[0].install()
