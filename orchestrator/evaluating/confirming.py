"""The gate at work: which point is judged, on which items, and how many of them are asked until the verdict is known.

A point that was chosen as the best of several is judged on fresh items: the score that chose it
is too high by its luck (the winner's curse).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from jobs.errors import BadInput
from jobs.evaluation_tasks import ScoreRow
from jobs.job import GateSpec
from orchestrator.evaluating.pairing import pairs, tokens_of
from orchestrator.evaluating.pairing import samples as found_samples
from orchestrator.evaluating.results import ranked_rows
from orchestrator.evaluating.session import Session
from orchestrator.evaluating.subjects import Questions, Subject, limit_of_tokens
from orchestrator.judging.estimates import Estimate, macro_mean, macro_score
from orchestrator.judging.gate import GateRule, Verdict, doubted, judge, same_merge
from orchestrator.judging.guards import ruled_out, with_guards
from orchestrator.judging.samples import Cell, cell_of
from orchestrator.judging.significance import FlipRate
from orchestrator.judging.unanswered import Unanswered, unanswered
from workers.benchmarks.planned import PlannedSet

BUDGET = 4
"""How many times the items of the evaluation a gate may ask, where the job does not say."""


@dataclass(frozen=True, slots=True)
class Gated:
    """The verdicts of every look, the last one valid; `fresh` where no item was one that the point was chosen by.

    `chosen` where the point is the best of several by these very items, which cannot grow: luck is part of its score.
    `noise` is how often the leader of the evaluation answered otherwise when asked the same again. `unanswered` counts
    the questions without an answer, by the label of the model. `scores` are those on the items of the last look.
    """

    looks: tuple[Verdict, ...]
    fresh: bool
    chosen: bool
    noise: FlipRate | None = None
    unanswered: Mapping[str, Unanswered] = field(default_factory=dict[str, Unanswered])
    scores: Mapping[str, Estimate] = field(default_factory=dict[str, Estimate])

    @property
    def verdict(self) -> Verdict:
        """The verdict of the gate."""
        return self.looks[-1]

    def document(self) -> dict[str, Any]:
        """gate/verdict.json."""
        looks = [
            {"items": look.lines[0].items, "outcome": look.outcome, "difference": look.lines[0].difference}
            for look in self.looks
        ]
        said = json.loads(self.verdict.to_json())
        noise = None if self.noise is None else asdict(self.noise)
        lost = {name: found.document() for name, found in self.unanswered.items()}
        scores = {name: _score(found) for name, found in self.scores.items()}
        return {
            **said, "fresh": self.fresh, "chosen": self.chosen, "noise": noise, "looks": looks, "unanswered": lost,
            "scores": scores,
        }  # fmt: skip


def gate(session: Session, asked: Questions, spec: GateSpec, point: str, *, chosen: bool, verdicts: int = 1) -> Gated:
    """Judges a point; asks both models more items while the verdict is open and the budget lasts.

    A point that surely loses a guard fails without further questions. `chosen` says that the point is the best of
    several by the evaluation's items, which are then not used. `verdicts` is as in `GateRule`.
    """
    new, old = asked.subject(point), _baseline(asked, spec)
    fewer = spec.output_tokens
    rule = GateRule(
        margin=spec.margin,
        length_margin=spec.length_margin,
        alpha=spec.alpha,
        verdicts=verdicts,
        output_tokens=None if fewer is None else fewer.at_most,
    )
    if (new.model, new.planned.digest) == (old.model, old.planned.digest):
        return Gated((same_merge(rule, new=point, old=spec.baseline),), fresh=False, chosen=False)
    guarded = [found for found in session.guarded([new]) if found.model == new.label]
    if (lost_guard := ruled_out(guarded, rule, new=new.label, old=old.label)) is not None:
        return Gated((lost_guard,), fresh=False, chosen=False, noise=session.noise)
    items = _Items.of(new, old, asked, spec, chosen=chosen)
    looks: list[Verdict] = []
    growth = 1.0
    while True:
        wanted = items.ranges(growth)
        session.make((new, old), {cell: asked_for.stop for cell, asked_for in wanted.items()})
        session.ask((new, old), f"judging {new.label}", wanted)
        answered = {subject.label: _rows(session.rows(), subject.label, asked.ranked, wanted) for subject in (new, old)}
        samples = pairs(answered[new.label], answered[old.label])
        if not looks and items.can_grow(growth):
            rule = replace(rule, planned_haystacks=macro_mean(samples).clusters)
        given = session.answers()
        lost = {label: unanswered(_rows(given, label, asked.ranked, wanted)) for label in answered}
        tokens = None
        if fewer is not None:
            written = (_rows(given, subject.label, asked.ranked, wanted) for subject in (new, old))
            tokens = tokens_of(*written, most=fewer.at_most, limit=limit_of_tokens(asked, spec.place))
        verdict = judge(samples, rule, new=new.label, old=old.label, tokens=tokens)
        looks.append(with_guards(doubted(verdict, lost[new.label], lost[old.label]), guarded))
        if verdict.outcome != "inconclusive" or not items.can_grow(growth):
            scores = {label: macro_score(found_samples(rows)) for label, rows in answered.items()}
            return Gated(tuple(looks), items.fresh, chosen and not items.fresh, session.noise, lost, scores)
        growth = items.next(growth, verdict)


def _score(found: Estimate) -> dict[str, float | None]:
    """In points of 100; `half` is half of the 95 % interval, None with one haystack."""
    half = 50 * (found.high - found.low)
    return {"score": 100 * found.mean, "half": half if math.isfinite(half) else None}


def _baseline(asked: Questions, spec: GateSpec) -> Subject:
    try:
        return asked.subject(spec.baseline, "parent")
    except BadInput as error:
        raise BadInput(f"{spec.place}: {error}; name one as the gate's baseline") from None


@dataclass(frozen=True, slots=True)
class _Items:
    """Which items a gate asks of each set: from `start` on, `count` of them at the first look, `most` at the last."""

    sets: Mapping[Cell, PlannedSet]
    fresh: bool
    grows: bool
    budget: int | None

    @classmethod
    def of(cls, new: Subject, old: Subject, asked: Questions, spec: GateSpec, *, chosen: bool) -> _Items:
        """The sets that rank points; `BadInput` where the two models are not asked the same."""
        sets = {cell: planned for cell, planned in new.sets.items() if planned.benchmark in asked.ranked}
        if any(cell not in old.sets or old.sets[cell].digest != planned.digest for cell, planned in sets.items()):
            raise BadInput(
                f"{spec.place}: {new.label} and {old.label} have different tokenizers, so they are asked different"
                " items; take a baseline with the same tokenizer"
            )
        grows = all(planned.grows for planned in sets.values())
        return cls(sets, fresh=grows and chosen, grows=grows, budget=spec.budget)

    def ranges(self, growth: float) -> dict[Cell, range]:
        """The items of each set when there are `growth` times as many as at first, whole haystacks."""
        return {cell: self._range(planned, growth) for cell, planned in self.sets.items()}

    def can_grow(self, growth: float) -> bool:
        """Whether the budget allows more than that."""
        return any(self._most(planned) > len(self._range(planned, growth)) for planned in self.sets.values())

    def next(self, growth: float, verdict: Verdict) -> float:
        """The items that the weakest line needs, at most twice those of now; at least one more haystack of some set."""
        open_lines = [line for line in verdict.lines if line.outcome == "inconclusive"]
        lacking = max((line.items_needed / line.items if line.items_needed else 2.0) for line in open_lines)
        grown = growth * min(2.0, max(1.0, lacking))
        while self.ranges(grown) == self.ranges(growth):
            grown *= 1.1
        return grown

    def _range(self, planned: PlannedSet, growth: float) -> range:
        first = first_fresh(planned) if self.fresh else 0
        wanted = math.ceil(growth * planned.count / planned.share) * planned.share if growth > 1 else planned.count
        return range(first, first + min(wanted, self._most(planned)))

    def _most(self, planned: PlannedSet) -> int:
        if not self.grows:
            return planned.count
        return max(planned.count, BUDGET * planned.count if self.budget is None else self.budget)


def first_fresh(planned: PlannedSet) -> int:
    """The first item of a set that shares no haystack with those that points are chosen by."""
    return -(-planned.made // planned.share) * planned.share


def _rows(rows: list[ScoreRow], label: str, ranked: Sequence[str], wanted: Mapping[Cell, range]) -> list[ScoreRow]:
    """A model's answers to the wanted items; perplexity and the harness name their rows otherwise than their sets."""
    everything = range(sys.maxsize)
    return [
        row
        for row in ranked_rows(rows, ranked)
        if row.point == label and row.item in wanted.get(cell_of(row), everything)
    ]
