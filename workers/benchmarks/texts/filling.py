"""How much haystack fits: the most units whose exact token count stays within the budget.

RULER draws a fresh prompt for every probe of its search and never stops when nothing fits. Here the prompt grows
monotonically with the number of units, a forecast (token counts of the units, each encoded once) says where to look,
and one or two exact counts settle it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput
from workers.benchmarks.items import Asked, Item
from workers.benchmarks.texts.tokenizer import Tokenizer

Group = TypeVar("Group")


class TooShort(BadInput):
    """Not even the smallest prompt fits; positional arguments: task, wanted length, smallest length that fits."""

    def __str__(self) -> str:
        task, length, smallest = self.args
        return f"{task}: no prompt fits in {length} tokens; the smallest length that does is {smallest}"


def most_units(count: Callable[[int], int], forecast: NDArray[np.int64], budget: int) -> tuple[int, int]:
    """The largest u with `count(u) <= budget`, and its count; (−1, 0) if there is none.

    `forecast[u]` guesses `count(u)` up to a constant and a small slope; it never falls, and its last entry bounds the
    search. The rest of the budget is smaller than the forecast of the next unit.
    """
    fits, fitting, fails = -1, 0, len(forecast)
    guess = _last_within(forecast, budget)
    while fits + 1 < fails:
        guess = min(max(guess, fits + 1), fails - 1)
        tokens = count(guess)
        if tokens <= budget:
            fits, fitting = guess, tokens
        else:
            fails = guess
        guess = _last_within(forecast, int(forecast[guess]) + budget - tokens)
        if guess == fits >= 0:  # the corrected forecast says that one unit more would be too much
            break
    return fits, fitting


def _last_within(forecast: NDArray[np.int64], limit: int) -> int:
    return int(np.searchsorted(forecast, limit, side="right")) - 1


def fill(
    tokenizer: Tokenizer,
    asked: Asked,
    text: Callable[[int], str],
    forecast: Callable[[int], NDArray[np.int64]],
) -> tuple[int, int]:
    """The most units with which `text(units)`, plus the generated tokens, fits in the length; its exact count.

    `forecast(budget)` gives the tokens that 0, 1, 2 … units add, to beyond the budget or as far as there are units.
    `TooShort` if not even `text(0)` fits; `BadInput` if there are too few units to fill the length but for one unit.
    """
    smallest = tokenizer.count(text(0))
    if smallest > asked.budget:
        raise TooShort(asked.task, asked.length, smallest + asked.max_new_tokens)
    totals = forecast(asked.budget - smallest) + smallest
    units, tokens = most_units(lambda units: tokenizer.count(text(units)), totals, asked.budget)
    exhausted = units == len(totals) - 1 and totals[-1] <= asked.budget
    if exhausted and asked.budget - tokens > np.diff(totals).max(initial=0):
        raise BadInput(
            f"{asked.task}: all there is to read makes {tokens} tokens, too few for a length of {asked.length};"
            " give more of it, or ask at shorter lengths"
        )
    return units, tokens


def running_total(
    tokenizer: Tokenizer, units: Callable[[int, int], list[str]], budget: int, block: int = 64
) -> NDArray[np.int64]:
    """Tokens of 0, 1, 2 … units until more than `budget`, or until there are no more.

    `units(first, last)` gives the texts of units first … last − 1, fewer when they run out; they are encoded in blocks.
    """
    totals = [0]
    while totals[-1] <= budget:
        known = len(totals) - 1
        texts = units(known, known + block)
        for tokens in tokenizer.count_each(texts, special_tokens=False):
            totals.append(totals[-1] + tokens)
        if len(texts) < block:
            break
    return np.asarray(totals, dtype=np.int64)


def build_groups(
    tokenizer: Tokenizer,
    asked: Asked,
    groups: Sequence[Group],
    build: Callable[[Group], list[Item]],
    indices: Sequence[int],
) -> list[Item]:
    """The items with these indices out of all groups, which are built in threads: encoding needs no interpreter.

    If some do not fit, `TooShort` names the smallest length at which all of them do. Of one item the tokens are counted
    by one encoding of the whole, too; should they be others, all are built again without counting by pieces.
    """

    def attempt(group: Group) -> list[Item] | TooShort:
        try:
            return build(group)
        except TooShort as error:
            return error

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as threads:
        built = list(threads.map(attempt, groups))
    too_short = [int(result.args[2]) for result in built if isinstance(result, TooShort)]
    if too_short:
        raise TooShort(asked.task, asked.length, max(too_short))
    found = {
        item.index: replace(item, bare=tokenizer.bare)
        for result in built
        if not isinstance(result, TooShort)
        for item in result
    }
    items = [found[index] for index in indices]
    if items and tokenizer.count_whole(items[-1].text) != items[-1].tokens:
        tokenizer.stop_counting_pieces()
        return build_groups(tokenizer, asked, groups, build, indices)
    return items
