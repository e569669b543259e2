"""The guards of an evaluation: their sets of items, the baseline, and each model's findings."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from jobs.evaluate import GuardsSpec
from jobs.evaluation_tasks import ScoreRow
from orchestrator.evaluating.pairing import common_rows, sample_of, samples
from orchestrator.evaluating.results import ranked_rows
from orchestrator.evaluating.subjects import Questions, Subject
from orchestrator.judging.estimates import macro_mean
from orchestrator.judging.guards import Comparison, Guarded, compare
from workers.benchmarks.planned import PlannedSet
from workers.benchmarks.registry import BENCHMARKS

GUARDS = frozenset(name for name, of in BENCHMARKS.items() if of.guard)
"""The benchmarks that rank no point, but rule some out."""


def guard_sets(subject: Subject) -> list[PlannedSet]:
    """The sets of items that guard a subject."""
    return [planned for planned in subject.sets.values() if planned.benchmark in GUARDS]


def judged(spec: GuardsSpec, asked: Questions, baseline: Subject, rows: Sequence[ScoreRow]) -> list[Guarded]:
    """The findings on all models that have answered guards: points first, each against the baseline."""
    by_set = _by_set(rows)
    found: list[Guarded] = []
    tests = len(asked.points) * len(guard_sets(baseline))
    for subject in (*asked.points.values(), *asked.baselines):
        for planned in guard_sets(subject):
            own = by_set.get((subject.label, planned.digest), [])
            if not own:
                continue
            against: Comparison | None = None
            theirs = by_set.get((baseline.label, planned.digest), [])
            if subject.kind == "point" and subject.label != baseline.label and theirs:
                common = common_rows(own, theirs)
                paired = [sample_of(cell, both) for cell, both in common.items()]
                against = compare(paired, baseline.label, margin=spec.margin, alpha=spec.alpha, tests=tests)
            score = 100 * macro_mean(samples(own)).mean
            found.append(Guarded(subject.label, planned.task, score, len(own), against))
    return found


def _by_set(rows: Sequence[ScoreRow]) -> Mapping[tuple[str, str], list[ScoreRow]]:
    """The scores of guards by model and set; a group of the harness is one set of many tasks."""
    found: dict[tuple[str, str], list[ScoreRow]] = defaultdict(list)
    for row in ranked_rows(rows, [*GUARDS]):
        found[row.point, row.items].append(row)
    return found
