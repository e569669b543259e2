"""JSON of other people's files and servers: its depth is bounded, and its texts can be written as UTF-8."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import chain
from typing import Any

MOST_LEVELS = 100
_SURROGATE = re.compile("[\ud800-\udfff]")


def load_json(
    text: bytes,
    *,
    object_pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None,
    parse_constant: Callable[[str], Any] | None = None,
) -> Any:
    """The value of a JSON text in UTF-8; the hooks are those of `json.loads`.

    `ValueError` if it is not JSON, has more than 100 levels, or holds half of a surrogate pair, which no UTF-8 has.
    """
    try:
        value = json.loads(text.decode(), object_pairs_hook=object_pairs_hook, parse_constant=parse_constant)
    except RecursionError:
        raise ValueError(f"more than {MOST_LEVELS} levels") from None
    level: list[Any] = [[value]]
    for _ in range(MOST_LEVELS + 1):
        level = _below(level)
        if not level:
            return value
    raise ValueError(f"more than {MOST_LEVELS} levels")


def is_text(value: object) -> bool:
    """Whether it is a text that UTF-8 has; half of a surrogate pair is a character to Python, and none there."""
    return isinstance(value, str) and (value.isascii() or not _SURROGATE.search(value))


def _below(level: list[Any]) -> list[Any]:
    """The mappings and lists in those of one level; a loop of few steps, as a header may have millions of entries."""
    found: list[Any] = []
    for outer in level:
        for entry in chain(outer, outer.values()) if isinstance(outer, dict) else outer:
            if isinstance(entry, str):
                if not is_text(entry):
                    raise ValueError("half of a surrogate pair")
            elif entry and isinstance(entry, dict | list):
                found.append(entry)
    return found
