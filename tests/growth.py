"""Limits of time that a slow machine keeps: a work is compared with the same work at another size."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

TRIES = 3
"""Other work on the machine slows one measurement, seldom three."""


def growth(work: Callable[[int], object], small: int, large: int, at_most: float) -> float:
    """CPU seconds of `work(large)` over those of `work(small)`: each the least of up to TRIES measurements.

    Ends with the first ratio that is not above `at_most`. Garbage is collected before each measurement, not in it: a
    collection costs what all earlier tests left in memory.
    """
    least = {small: float("inf"), large: float("inf")}
    for _ in range(TRIES):
        for size in least:
            least[size] = min(least[size], _seconds(work, size))
        if least[large] <= at_most * least[small]:
            break
    return least[large] / least[small]


def _seconds(work: Callable[[int], object], size: int) -> float:
    gc.collect()
    gc.disable()
    try:
        started = time.process_time()
        work(size)
        return time.process_time() - started
    finally:
        gc.enable()
