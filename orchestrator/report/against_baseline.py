"""Paired differences from a baseline: of every point, overall, at each length and in each task."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.errors import BadInput
from jobs.evaluation_tasks import ScoreRow
from orchestrator.evaluating.pairing import pairs
from orchestrator.judging.estimates import macro_difference
from orchestrator.judging.samples import CellSample
from orchestrator.judging.significance import Tested, benjamini_hochberg, difference_test, paired_test
from orchestrator.judging.simultaneous import simultaneous

SURE = 0.05
"""A difference with a p value up to this is called sure."""


@dataclass(frozen=True, slots=True)
class BaselineComparison:
    """One model against another on the questions that both answered; differences new − old in points out of 100.

    `p` is two-sided, by the rule that also gave the interval: of several points, for all of them at once. `guarded`
    says that p is that of losses too rare to be seen, because they could explain what the observed spread would not.
    """

    new: str
    old: str
    difference: float
    low: float
    high: float
    p: float
    guarded: bool
    items: int

    @property
    def sure(self) -> bool:
        """Whether the difference is significant at 5 %."""
        return self.p <= SURE

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "new": self.new,
            "old": self.old,
            "difference": round(self.difference, 3),
            "low": round(self.low, 3) if self.low > -1e9 else None,
            "high": round(self.high, 3) if self.high < 1e9 else None,
            "p": float(f"{self.p:.4g}"),
            "rare_losses_decide": self.guarded,
            "items": self.items,
        }


@dataclass(frozen=True, slots=True)
class ComparedCell:
    """A point's difference from the baseline in one cell of a map, in points; `sure` after Benjamini and Hochberg."""

    difference: float
    p: float
    sure: bool


@dataclass(frozen=True, slots=True)
class BaselineComparisons:
    """Every point against one baseline.

    `overall` holds for all points at once, see `judging.simultaneous`. `by_length` and `by_task` are adjusted by
    Benjamini and Hochberg over all cells of that map. Points that have no question in common with the baseline are
    missing.
    """

    baseline: str
    overall: Mapping[str, BaselineComparison]
    by_length: Mapping[tuple[str, int], ComparedCell]
    by_task: Mapping[tuple[str, str], ComparedCell]


def compare(rows: Mapping[str, Sequence[ScoreRow]], new: str, old: str) -> BaselineComparison | None:
    """One model against another by the macro score; None where they share no question."""
    samples = _samples(rows, new, old)
    return _comparison(new, old, paired_test(samples)) if samples else None


def best_of(
    rows: Mapping[str, Sequence[ScoreRow]], leader: str, rivals: Sequence[str]
) -> dict[str, BaselineComparison]:
    """The leader against each rival, the least sure first: it is the best of all if the first p is at most 5 %.

    Hung & Fithian 2019 (rank verification): no correction is needed, as the two-sided p of the closest rival counts.
    """
    found = {rival: compare(rows, leader, rival) for rival in rivals}
    known = [(rival, against) for rival, against in found.items() if against is not None]
    return dict(sorted(known, key=lambda entry: (-entry[1].p, entry[1].difference, entry[0])))


def compare_overall(
    rows: Mapping[str, Sequence[ScoreRow]], points: Sequence[str], baseline: str
) -> dict[str, BaselineComparison]:
    """Every one of these points against the baseline by the macro score, for all of them at once."""
    return _overall(_all_samples(rows, points, baseline), baseline)


def compare_all(rows: Mapping[str, Sequence[ScoreRow]], points: Sequence[str], baseline: str) -> BaselineComparisons:
    """Every one of these points against the baseline, by length and by task too."""
    samples = _all_samples(rows, points, baseline)
    overall = _overall(samples, baseline)
    by_length: dict[tuple[str, int], list[CellSample]] = defaultdict(list)
    by_task: dict[tuple[str, str], list[CellSample]] = defaultdict(list)
    for name, found in samples.items():
        for sample in found:
            by_length[name, sample.cell.length].append(sample)
            by_task[name, sample.cell.task].append(sample)
    return BaselineComparisons(baseline, overall, cells(by_length), cells(by_task))


def cells(samples: Mapping[Any, Sequence[CellSample]]) -> dict[Any, ComparedCell]:
    """The difference in each cell of a map, and whether it is sure once all of them are tested."""
    estimates = {place: macro_difference(found) for place, found in samples.items()}
    p_values = [difference_test(estimate) for estimate in estimates.values()]
    return {
        place: ComparedCell(100 * estimate.mean, p, bool(adjusted <= SURE))
        for (place, estimate), p, adjusted in zip(
            estimates.items(), p_values, benjamini_hochberg(p_values), strict=True
        )
    }


def _all_samples(
    rows: Mapping[str, Sequence[ScoreRow]], points: Sequence[str], baseline: str
) -> dict[str, list[CellSample]]:
    samples = {name: _samples(rows, name, baseline) for name in points if name != baseline}
    return {name: found for name, found in samples.items() if found}


def _overall(samples: Mapping[str, Sequence[CellSample]], baseline: str) -> dict[str, BaselineComparison]:
    return {name: _comparison(name, baseline, found) for name, found in simultaneous(samples).items()}


def _samples(rows: Mapping[str, Sequence[ScoreRow]], new: str, old: str) -> list[CellSample]:
    try:
        return pairs(rows.get(new, ()), rows.get(old, ()))
    except BadInput:
        return []


def _comparison(new: str, old: str, found: Tested) -> BaselineComparison:
    guarded = found.p <= SURE < found.rare
    return BaselineComparison(
        new=new,
        old=old,
        difference=100 * found.estimate.mean,
        low=100 * found.estimate.low,
        high=100 * found.estimate.high,
        p=found.rare if guarded else found.p,
        guarded=guarded,
        items=found.estimate.items,
    )
