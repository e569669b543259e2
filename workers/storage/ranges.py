"""One long read as many short ones at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

RANGE_BYTES = 16 << 20
RANGES_AT_ONCE = 16  # of the whole process


def read_in_ranges(length: int, read_range: Callable[[int, int], None]) -> None:
    """Call `read_range(start, stop)` for all pieces of `length` bytes, several at once.

    After a failure no more are started; it is raised once no thread writes to the caller's buffer any longer.
    """
    pieces = [(start, min(start + RANGE_BYTES, length)) for start in range(0, length, RANGE_BYTES)]
    if len(pieces) == 1:
        read_range(*pieces[0])
    else:
        _all_or_none([_readers().submit(read_range, start, stop) for start, stop in pieces])


def _all_or_none(futures: list[Future[None]]) -> None:
    try:
        for future in futures:
            future.result()
    finally:
        for future in futures:
            future.cancel()
        wait(futures)


@functools.cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(RANGES_AT_ONCE, "mergeyard-read")
