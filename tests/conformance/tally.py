"""How near mergeyard's elements came to the formulas and to mergekit, over all merges of a session of pytest."""

from __future__ import annotations

from collections import Counter

VERDICTS = ("exact", "1 ulp", "noise", "tied", "replayed")
COMPARISONS = ("formula", "float32", "bf16")
_counts: dict[tuple[str, str], Counter[str]] = {}
_merges: Counter[tuple[str, str]] = Counter()


def add(method: str, comparison: str, counts: Counter[str]) -> None:
    """Adds the elements of one merge."""
    _counts.setdefault((method, comparison), Counter()).update(counts)
    _merges[method, comparison] += 1


def table() -> list[str]:
    """A line for each method and comparison: merges, elements, and the share of each verdict in percent."""
    if not _counts:
        return []
    lines = [
        f"{'method':<17}{'compared with':<22}{'merges':>7}{'elements':>11}" + "".join(f"{v:>10}" for v in VERDICTS)
    ]
    names = {"formula": "formula, float64", "float32": "mergekit, float32", "bf16": "mergekit, bf16"}
    for method, comparison in sorted(_counts, key=lambda row: (row[0], COMPARISONS.index(row[1]))):
        counts = _counts[method, comparison]
        total = counts.total()
        shares = "".join(f"{100 * counts[v] / total:>10.3f}" if counts[v] else f"{'':>10}" for v in VERDICTS)
        merges = _merges[method, comparison]
        lines.append(f"{method:<17}{names[comparison]:<22}{merges:>7}{total:>11}{shares}")
    return lines
