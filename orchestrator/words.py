"""How numbers are written for people: 3.1 GB, 128K tokens, 12 min."""

from __future__ import annotations

import math
import re
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from os.path import commonprefix
from typing import Any

from jobs.errors import printable
from jobs.merge_tasks import Receipt


def finite_or_none(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def short_length(length: int) -> str:
    """A length in tokens: 512, 4K, 128K."""
    return f"{length // 1024}K" if length >= 1024 and length % 1024 == 0 else str(length)


def token_count(length: Any) -> str:
    return f"{length:,} tokens" if isinstance(length, int) else "not stated"


def count(number: float) -> str:
    """A count in decimal units: 1.2 M."""
    for unit in ("", " k", " M", " G"):
        if number < 999.5:
            return f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g} T"


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 point", "2,000 points"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def size(count_bytes: float) -> str:
    """Bytes in decimal units: 3.1 GB."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if count_bytes < 999.5 or unit == "TB":
            return f"{count_bytes:.0f} {unit}" if unit == "B" else f"{count_bytes:.3g} {unit}"
        count_bytes /= 1000
    raise AssertionError("unreachable")


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return time.strftime("%H:%M h", time.gmtime(seconds)) if seconds >= 5400 else f"{round(seconds / 60)} min"


def shortlist(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" … {names[-1]}" if len(names) > 3 else "")


def shortened(names: Sequence[str], most: int) -> list[str]:
    """The names in at most `most` characters, or as many more as keep different names different.

    From the long names go the parts that all of them share, and then the middle.
    """
    long = [name for name in names if len(name) > most]
    head = len(_shared(long))
    tail = len(_shared([name[head:][::-1] for name in long]))
    found = [
        "…" * bool(head) + name[head : len(name) - tail] + "…" * bool(tail) if len(name) > most else name
        for name in names
    ]
    while len({*(cut := [_without_middle(name, most) for name in found])}) < len({*names}):
        most += 1
    return cut


def _shared(names: Sequence[str]) -> str:
    """The beginning that different names share, up to a separator; empty where it is too short to leave out."""
    begun = commonprefix(names) if len({*names}) > 1 else ""  # noqa: RUF071 - these are no paths
    end = 1 + max(begun.rfind(separator) for separator in "_-, /")
    return begun[:end] if end > 2 else ""


def _without_middle(name: str, most: int) -> str:
    if len(name) <= most:
        return name
    head = (most - 1) // 2
    return f"{name[:head]}…{name[len(name) - (most - 1 - head) :]}"


def code(text: str) -> str:
    """Text from a file as a span of code in Markdown, in a table too: no markup, HTML or link of its own."""
    shown = printable(text).replace("|", r"\x7c")  # a table would take \| for the end of a cell where a \ precedes
    fence = "`" * (1 + max(map(len, re.findall("`+", shown)), default=0))
    blank = " " if len(fence) > 1 else ""
    return f"{fence}{blank}{shown}{blank}{fence}" if shown.strip() else "–"


def print_rows(rows: Sequence[tuple[str, str]]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"  {printable(name):<{width}}  {printable(value)}")


class Collapses:
    """Merges that are not: those that their method gave up, and those that equal a parent, from receipts."""

    def __init__(self) -> None:
        self._merged: Counter[str] = Counter()
        self._collapsed: dict[str, Counter[str]] = defaultdict(Counter)
        self._alike: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, receipt: Receipt) -> None:
        """Counts the tensors of one shard of a point."""
        self._merged[receipt.point] += receipt.merged
        for reason, tensors in receipt.collapsed.items():
            self._collapsed[reason][receipt.point] += tensors
        for parent, tensors in receipt.alike.items():
            self._alike[parent][receipt.point] += tensors

    def lines(self) -> tuple[str, ...]:
        """One line for each reason, with its points: `w0.5: model_stock returned the base … (28 of 290 tensors)`."""
        lines: list[str] = []
        for reason, points in self._collapsed.items():
            most = max(points, key=lambda point: points[point])
            tensors = f"{'up to ' if len(points) > 1 else ''}{points[most]:,} of {self._merged[most]:,} tensors"
            lines.append(f"{shortlist(sorted(points))}: {reason} ({tensors})")
        for parent, points in self._alike.items():
            if whole := sorted(point for point, tensors in points.items() if tensors == self._merged[point]):
                lines.append(f"{shortlist(whole)}: the merge equals {parent}, bit for bit")
        return tuple(lines)


def benchmark_words(weights: Mapping[str, float]) -> str:
    """Benchmarks, and those weights that are not 1: `ruler × 2 and needle`."""
    return " and ".join(name if weight == 1 else f"{name} × {weight:g}" for name, weight in weights.items())
