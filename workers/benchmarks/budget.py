"""How much haystack fits: the most units whose exact token count stays within the budget.

RULER draws a fresh prompt for every probe of its search and never stops when nothing fits. Here the prompt grows
monotonically with the number of units, a forecast (token counts of the units, each encoded once) says where to look,
and one or two exact encodings settle it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput


class TooShort(BadInput):
    """Not even the smallest prompt fits; positional arguments: task, wanted length, smallest length that fits."""

    def __str__(self) -> str:
        task, length, smallest = self.args
        return f"{task}: no prompt fits in {length} tokens; the smallest length that does is {smallest}"


def most_units(count: Callable[[int], int], forecast: NDArray[np.int64], budget: int) -> int:
    """The largest u with `count(u) <= budget`, or −1 if there is none.

    `forecast[u]` guesses `count(u)`, up to a constant and a small slope; it never falls, and its last entry bounds
    the search.
    """
    fits, fails = -1, len(forecast)
    guess = _last_within(forecast, budget)
    while fits + 1 < fails:
        guess = min(max(guess, fits + 1), fails - 1)
        tokens = count(guess)
        if tokens <= budget:
            fits = guess
        else:
            fails = guess
        guess = _last_within(forecast, int(forecast[guess]) + budget - tokens)
        if guess == fits:  # the corrected forecast says that one unit more would be too much
            break
    return fits


def _last_within(forecast: NDArray[np.int64], limit: int) -> int:
    return int(np.searchsorted(forecast, limit, side="right")) - 1
