"""The gate at work: which point is judged, on which items, and how many of them are asked until the verdict is known.

A point that was chosen as the best of several is judged on items that nobody was chosen by: the score it was chosen
for is too high by what luck gave it (the winner's curse).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from jobs.errors import BadInput
from jobs.job import GateSpec
from orchestrator.comparing import pairs
from orchestrator.evaluation import Session
from orchestrator.gate import GateRule, Verdict, judge
from orchestrator.questions import Questions, Subject
from orchestrator.results import ranked_rows
from orchestrator.statistics import Cell

BUDGET = 4
"""How many times the items of the evaluation a gate may ask, where the job does not say."""


@dataclass(frozen=True, slots=True)
class Look:
    """What a gate saw at one look: items a task and length, and the verdict."""

    items: int
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Gated:
    """A verdict and the looks that led to it; `fresh` where the items were none that the point was chosen by."""

    verdict: Verdict
    looks: tuple[Look, ...]
    fresh: bool

    def document(self) -> dict[str, Any]:
        """gate/verdict.json."""
        looks = [
            {"items": look.items, "outcome": look.verdict.outcome, "difference": look.verdict.lines[0].difference}
            for look in self.looks
        ]
        return {**json.loads(self.verdict.to_json()), "fresh": self.fresh, "looks": looks}


def gate(session: Session, asked: Questions, spec: GateSpec, point: str, *, chosen: bool) -> Gated:
    """Judges a point; asks both models more items while the verdict is open and the budget lasts.

    `chosen` says that the point is the best of several by the evaluation's items, which are then not used.
    """
    new, old = asked.subject(point), _baseline(asked, spec)
    plan = _Items.of(new, old, asked, spec, chosen=chosen)
    rule = GateRule(margin=spec.margin, length_margin=spec.length_margin, alpha=spec.alpha)
    looks: list[Look] = []
    items = plan.first
    while True:
        ranges = plan.ranges(items)
        session.make((new, old), {cell: wanted.stop for cell, wanted in ranges.items()})
        session.ask((new, old), f"judging {new.name} on {items} items a task and length", ranges)
        verdict = _judged(session, new, old, asked.ranked, plan.ranges(items), rule)
        if not looks and plan.most > plan.first:
            rule = replace(rule, planned_haystacks=verdict.lines[0].haystacks)
            verdict = _judged(session, new, old, asked.ranked, plan.ranges(items), rule)
        looks.append(Look(items, verdict))
        if verdict.outcome != "inconclusive" or items >= plan.most:
            return Gated(verdict, tuple(looks), fresh=plan.fresh)
        items = plan.after(items, verdict)


def _baseline(asked: Questions, spec: GateSpec) -> Subject:
    try:
        return asked.subject(spec.baseline)
    except BadInput as error:
        raise BadInput(f"{spec.place}: {error}; name one as the gate's baseline") from None


@dataclass(frozen=True, slots=True)
class _Items:
    """Which items a gate asks: of each cell those from `start`, `first` at the first look, `most` at the last."""

    start: Mapping[Cell, int]
    share: int
    first: int
    most: int
    fresh: bool

    @classmethod
    def of(cls, new: Subject, old: Subject, asked: Questions, spec: GateSpec, *, chosen: bool) -> _Items:
        sets = {cell: planned for cell, planned in new.sets.items() if planned.benchmark in asked.ranked}
        if any(cell not in old.sets or old.sets[cell].digest != planned.digest for cell, planned in sets.items()):
            raise BadInput(
                f"{spec.place}: {new.name} and {old.name} have different tokenizers, so they are asked different items;"
                " take a baseline with the same tokenizer"
            )
        grows = all(planned.grows for planned in sets.values())
        fresh = grows and chosen
        share = max(planned.share for planned in sets.values())
        first = max(planned.count for planned in sets.values())
        most = max(first, spec.budget if spec.budget is not None else BUDGET * first) if grows else first
        return cls({cell: planned.made if fresh else 0 for cell, planned in sets.items()}, share, first, most, fresh)

    def ranges(self, items: int) -> dict[Cell, range]:
        """The items of each cell, so many."""
        return {cell: range(start, start + items) for cell, start in self.start.items()}

    def after(self, items: int, verdict: Verdict) -> int:
        """How many to look at next: what the verdict asks for, but at most twice as many, in whole haystacks."""
        seen = verdict.lines[0].items
        asked_for = items * (verdict.items_needed or 2 * seen) / seen
        wanted = min(2 * items, self.most, max(items + self.share, round(asked_for)))
        return min(self.most, -(-wanted // self.share) * self.share)


def _judged(
    session: Session, new: Subject, old: Subject, ranked: tuple[str, ...], ranges: Mapping[Cell, range], rule: GateRule
) -> Verdict:
    rows = ranked_rows(session.rows(), ranked)
    wanted = {
        name: [
            row
            for row in rows
            if row.point == name
            and (row.length == 0 or row.item in ranges.get(Cell(row.task, row.length), range(row.item, row.item + 1)))
        ]
        for name in (new.name, old.name)
    }
    return judge(pairs(wanted[new.name], wanted[old.name]), rule, new=new.name, old=old.name)
