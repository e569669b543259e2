"""The size of an evaluation, and the smallest difference that it can show: known before the first question.

Two models are taken to differ in `DISCORDANCE` of their right-or-wrong answers, as often for better as for worse, and
questions that share a haystack to be correlated by `CORRELATION`. Items of different haystacks, and of different
lengths, are taken to be independent.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobs.job import GateSpec, Job
from orchestrator.evaluating.confirming import BUDGET
from orchestrator.evaluating.subjects import Questions, RacePlan, Sets
from orchestrator.judging.estimates import macro_weights
from orchestrator.judging.gate import POWER
from orchestrator.judging.race import RUNGS
from orchestrator.judging.samples import Cell, normal_quantile
from orchestrator.judging.significance import anytime_multiplier, design_effect, minimum_detectable_effect
from workers.benchmarks.planned import PlannedSet
from workers.benchmarks.registry import BENCHMARKS

DISCORDANCE = 0.1
CORRELATION = 0.1


@dataclass(frozen=True, slots=True)
class _Score:
    """A macro score over some cells, of which two models will answer the same items."""

    sets: Mapping[Cell, PlannedSet]

    @property
    def items(self) -> int:
        return sum(planned.count for planned in self.sets.values())

    def error(self, discordance: float) -> float:
        """The standard error that its paired difference will have."""
        weights = macro_weights([*self.sets])
        return math.sqrt(
            sum(
                weight**2 * discordance * design_effect(planned.questions, CORRELATION) / planned.count
                for weight, planned in zip(weights.tolist(), self.sets.values(), strict=True)
            )
        )

    @property
    def detectable(self) -> float:
        """In points of 100."""
        return 100 * minimum_detectable_effect(1, deviation=self.error(DISCORDANCE))

    def at(self, length: int) -> _Score:
        return _Score({cell: planned for cell, planned in self.sets.items() if cell.length == length})

    @property
    def haystacks(self) -> int:
        """Of all tasks together; every length asks about the same ones."""
        at_length: Counter[int] = Counter()
        for cell, planned in self.sets.items():
            at_length[cell.length] += -(-planned.count // planned.questions)
        return max(at_length.values())


def evaluation_facts(job: Job, asked: Questions) -> dict[str, Any]:
    """For `mergeyard plan`: items, tokens that are read at the most, and the smallest differences that show.

    Tokens count the room for the answers. The size of a task of lm-evaluation-harness is not known here.
    """
    subjects = [*asked.points.values(), *asked.baselines]
    first = subjects[0].sets
    score = _ranked_score(asked)
    facts: dict[str, Any] = {
        "points": len(asked.points),
        "baselines": len(asked.baselines),
        "items_a_point": _items(first),
        "tokens_a_point": _tokens(first),
        "items": sum(_items(subject.sets) for subject in subjects),
        "tokens": sum(_tokens(subject.sets) for subject in subjects),
        "tasks_of_unknown_size": sorted(planned.task for planned in first.values() if not planned.length),
        "race": None if asked.race is None else {"least_tokens": _least_tokens(asked, asked.race)},
        "sees": None if score is None else _sees(score),
        "gate": None if score is None or job.gate is None else _gate(score, job.gate),
    }
    return facts


def _items(sets: Sets) -> int:
    return sum(planned.count for planned in sets.values() if planned.length)


def _tokens(sets: Sets) -> int:
    return sum(planned.count * planned.length for planned in sets.values())


def _least_tokens(asked: Questions, race: RacePlan) -> int:
    """The cost of the race if all points but the kept ones leave at the first look."""
    look = min(race.items, -(-RUNGS[0] // race.share) * race.share)
    sets = next(iter(asked.points.values())).sets
    raced = [planned.length for planned in sets.values() if planned.benchmark == race.benchmark]
    kept = min(race.spec.keep, len(asked.points))
    confirmed = kept * (race.items + race.fresh - look) * sum(raced)
    rest = kept * sum(
        planned.count * planned.length for planned in sets.values() if planned.benchmark != race.benchmark
    )
    baselines = sum(_tokens(subject.sets) for subject in asked.baselines)
    return len(asked.points) * look * sum(raced) + confirmed + rest + baselines


def _ranked_score(asked: Questions) -> _Score | None:
    """The score that points are ranked by, if it is one of right or wrong answers to a known number of questions."""
    ranked = {
        cell: planned
        for cell, planned in next(iter(asked.points.values())).sets.items()
        if planned.benchmark in asked.ranked and BENCHMARKS[planned.benchmark].retrieval
    }
    if not ranked:
        return None
    return _Score(ranked)


def _sees(score: _Score) -> dict[str, Any]:
    lengths = sorted({cell.length for cell in score.sets})
    return {
        "discordance": DISCORDANCE,
        "correlation": CORRELATION if max(planned.questions for planned in score.sets.values()) > 1 else None,
        "overall": round(score.detectable, 2),
        "lengths": {str(length): round(score.at(length).detectable, 2) for length in lengths},
    }


def _gate(score: _Score, spec: GateSpec) -> dict[str, Any]:
    """How many items the gate's verdict on equal models will take, and how many it may ask."""
    grows = all(planned.grows for planned in score.sets.values())
    first = max(planned.count for planned in score.sets.values())
    most = max(first, spec.budget if spec.budget is not None else BUDGET * first) if grows else first
    anytime = most > first
    lengths = sorted({cell.length for cell in score.sets})
    shortest = {length: _items_for(score.at(length), spec.length_margin, spec.alpha, anytime) for length in lengths}
    return {
        "margin": spec.margin,
        "items_needed": _items_for(score, spec.margin, spec.alpha, anytime),
        "length_margin": spec.length_margin,
        "items_needed_a_length": None if spec.length_margin is None else max(shortest.values()),
        "items_at_first": first * len(score.sets),
        "items_at_most": most * len(score.sets),
    }


def _items_for(score: _Score, margin: float | None, alpha: float, anytime: bool) -> int:
    """Items of the score with which equal models pass with probability `POWER`; 0 without a margin."""
    if margin is None:
        return 0
    share = margin / 100
    error = score.error(max(DISCORDANCE, share * (1 - share)))  # the gate takes no smaller spread
    growth = 1.0
    for _ in range(50):  # the anytime multiplier grows with the logarithm of the items, so this settles at once
        seen = max(1, math.ceil(score.haystacks * growth))
        bound = anytime_multiplier(seen, score.haystacks, alpha) if anytime else normal_quantile(1 - alpha)
        growth = ((bound + normal_quantile(POWER)) * error / share) ** 2
    return math.ceil(score.items * growth)
