"""Guards: tasks that no kept point may lose against a baseline, on the same items. README.md here has the formulas."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from orchestrator.judging.gate import GateRule, Outcome, Verdict, VerdictLine, joint_outcome, judge
from orchestrator.judging.samples import CellSample

GuardOutcome = Literal["held", "broken", "undecided"]

OUTCOMES: dict[Outcome, GuardOutcome] = {"pass": "held", "fail": "broken", "inconclusive": "undecided"}


@dataclass(frozen=True, slots=True)
class Comparison:
    """A point against the baseline on one guard, in points: new − old, and its bounds.

    `low` is a bound at alpha, `high` one at alpha over all points and guards: broken where `high` is below −margin,
    held where `low` is above it, else undecided.
    """

    baseline: str
    margin: float
    outcome: GuardOutcome
    difference: float
    low: float
    high: float
    p_pass: float
    p_fail: float
    haystacks: int


@dataclass(frozen=True, slots=True)
class Guarded:
    """A model's score on one guard (0 to 100) over `items` scores; `against` is None for a model that is not judged."""

    model: str
    guard: str
    score: float
    items: int
    against: Comparison | None

    @property
    def outcome(self) -> GuardOutcome | None:
        """The finding, None where nothing is judged."""
        return None if self.against is None else self.against.outcome

    @property
    def words(self) -> str:
        """`gsm8k −12.3 (−15.0 to −9.1) against fmt, more than the margin of 1`."""
        found = self.against
        if found is None:
            return f"{self.guard} {self.score:.1f}"
        told = {
            "held": f"not worse by {found.margin:g} or more",
            "broken": f"worse by more than the margin of {found.margin:g}",
            "undecided": f"not sure whether worse by {found.margin:g}",
        }
        bounds = f"{found.low:+.1f} to {found.high:+.1f}"
        return f"{self.guard} {found.difference:+.1f} ({bounds}) against {found.baseline}, {told[found.outcome]}"


def compare(samples: Sequence[CellSample], baseline: str, *, margin: float, alpha: float, tests: int) -> Comparison:
    """The comparison on paired differences point − baseline; `tests` is the number of points times guards.

    A wrong "broken" of any of them has a chance of at most alpha (Bonferroni), in whatever order they are asked. A
    wrong "held" has one of alpha for each point, as it needs no choice among points by these items.
    """
    line = judge(samples, GateRule(margin=margin, alpha=alpha, verdicts=tests)).lines[0]
    at_once = judge(samples, GateRule(margin=margin, alpha=alpha / tests)).lines[0]
    return Comparison(
        baseline=baseline,
        margin=margin,
        outcome=OUTCOMES[line.outcome],
        difference=line.difference,
        low=max(-100.0, line.low),  # one haystack has no spread, and no bounds
        high=min(100.0, at_once.high),
        p_pass=line.p_pass,
        p_fail=line.p_fail,
        haystacks=line.haystacks,
    )


def broken(found: Iterable[Guarded]) -> frozenset[str]:
    """The models that surely lost a guard."""
    return frozenset(guarded.model for guarded in found if guarded.outcome == "broken")


def ruled_out(found: Sequence[Guarded], rule: GateRule, *, new: str, old: str) -> Verdict | None:
    """A gate's failed verdict on a model that surely lost a guard; None if it lost none."""
    lines = tuple(line for line in map(_line, found) if line is not None and line.outcome == "fail")
    return Verdict("fail", new, old, rule, lines, None) if lines else None


def with_guards(verdict: Verdict, found: Sequence[Guarded]) -> Verdict:
    """The verdict with a line for each guard that held; an undecided one is a reservation of the first line."""
    held = tuple(line for line in map(_line, found) if line is not None and line.outcome == "pass")
    first, *others = verdict.lines
    for guarded in found:
        if guarded.outcome == "undecided":
            first = replace(first, reason=f"{first.reason}; but {guarded.words}")
    lines = (first, *others, *held)
    return replace(verdict, outcome=joint_outcome(line.outcome for line in lines), lines=lines)


def _line(guarded: Guarded) -> VerdictLine | None:
    found = guarded.against
    if found is None:
        return None
    return VerdictLine(
        scope=guarded.guard,
        outcome=next(outcome for outcome, name in OUTCOMES.items() if name == found.outcome),
        difference=found.difference,
        low=found.low,
        high=found.high,
        standard_error=float("nan"),
        margin=found.margin,
        p_pass=found.p_pass,
        p_fail=found.p_fail,
        items=guarded.items,
        haystacks=found.haystacks,
        items_needed=None,
        reason=f"guard {guarded.words}",
    )
