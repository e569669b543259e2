"""The sentence on top: which merge to keep, and how sure that is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jobs.evaluation_tasks import ScoreRow
from orchestrator.evaluating.results import EvaluationResult
from orchestrator.judging.significance import FlipRate
from orchestrator.judging.unanswered import DOUBTED, Unanswered, unanswered
from orchestrator.report.against_baseline import BaselineComparison, compare, compare_overall
from orchestrator.report.leaderboard import Line
from orchestrator.words import shortlist

ROUNDING = 1e-9
"""Points of 100 by which two equal scores may differ."""

REMEDY = "Mend the cause, such as a model that reasons first, and evaluate under another `name:`."
"""Scores are kept, so that the same run would not ask again."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The leader, and its differences from the best parent and from the runner-up; None if there is none.

    Where the leader is a parent itself, `parent` is its label and `over_parent` None. `parent_name` is the best
    parent's name in sentences. `points` counts the points that took part. `tied` are the points with the leader's
    score on as many items; the leader is only the first of them by name. `gate` is the gate's verdict as it lies in the
    run, if there is one. `unanswered` counts the questions that each of these models did not answer; where the leader
    has too many of them, there is nothing to recommend.
    """

    best: Line
    tied: tuple[str, ...]
    parent: str | None
    parent_name: str
    over_parent: BaselineComparison | None
    over_runner_up: BaselineComparison | None
    points: int
    finished: bool
    confirmed: float | None
    gate: Mapping[str, Any] | None
    noise: FlipRate | None
    unanswered: Mapping[str, Unanswered]

    @property
    def sentence(self) -> str:
        """Plain text, one to five sentences."""
        return " ".join(filter(None, (self.headline, *self.grounds)))

    @property
    def headline(self) -> str:
        """The recommendation in one sentence."""
        return ("" if self.finished else "So far, with the evaluation unfinished: ") + self._keep()

    @property
    def grounds(self) -> list[str]:
        """The sentences after the first."""
        if self._refused:
            return [REMEDY]
        return [*filter(None, (self._doubts(), self._lead(), self._elsewhere(), self._floor()))]

    @property
    def _refused(self) -> bool:
        return self.unanswered[self.best.name].refused

    def _doubts(self) -> str:
        told = [found.words(name) for name, found in self.unanswered.items() if found.share > DOUBTED]
        return f"But {'; '.join(told)}. {REMEDY}" if told else ""

    def _keep(self) -> str:
        if self._refused:
            return f"No recommendation: {self.unanswered[self.best.name].words(self.best.name)}."
        score = f"{self.best.score:.1f} points{_spread(self.best)}"
        tie = f"{len(self.tied)} points share the first place" if len(self.tied) > 1 else ""
        if self.parent == self.best.name:
            others = f"; {tie}" if tie else ""
            return f"Keep the parent {self.parent_name}: {score}, and no merge scores more{others}."
        if self.over_parent is None:
            return f"{tie or f'Keep {self.best.name}'}: {score}."
        found = self.over_parent
        certainty = _certainty(found, self.points)
        told = f"{_points(found.difference)} the best parent, {self.parent_name} ({certainty})"
        if math.isclose(found.difference, 0, abs_tol=ROUNDING):
            if self.parent in self.tied:
                return f"{tie}, the parent {self.parent_name} among them: {score} ({certainty})."
            who = f"{len(self.tied)} points" if tie else self.best.name
            return f"{who} and the best parent, {self.parent_name}, share the first place: {score} ({certainty})."
        if found.sure and found.difference < 0:
            merges = f"of the merges, {tie} with" if tie else f"the best merge, {self.best.name}, has"
            return f"Keep the parent {self.parent_name}: {merges} {score}, {told}."
        if found.sure:
            return f"{tie or f'Keep {self.best.name}'}: {score}, {told}."
        leads = f"{tie} with {score}, but are" if tie else f"{self.best.name} leads with {score}, but is"
        return f"{leads} not surely better than {'the' if tie else 'its'} parents: {told}."

    def _lead(self) -> str:
        if len(self.tied) > 1:
            return f"By name they are {shortlist(self.tied)}: any will do, or ask more items."
        found = self.over_runner_up
        if found is None:
            return ""
        told = f"{found.old}, is {_plain(found.difference)} ({_certainty(found, 1)})"
        if found.sure:
            return f"Its lead over the runner-up, {told}."
        return f"Its lead over the runner-up, {told}: not sure, either will do, or ask more items."

    def _elsewhere(self) -> str:
        if self.gate is not None and self.gate.get("new") == self.best.name:
            where = " on items that no point was chosen by" if self.gate.get("fresh") else ""
            line = self.gate["lines"][0]
            return f"The gate says {self.gate['outcome']}{where}: {line['difference']:+.1f} against {self.gate['old']}."
        if self.confirmed is not None:
            who = self.best.name if len(self.tied) > 1 else "it"
            return f"On fresh items, that no point was chosen by, {who} scores {100 * self.confirmed:.1f}."
        return ""

    def _floor(self) -> str:
        """How much of any of these differences the same weights may show against themselves."""
        words = "" if self.noise is None else self.noise.words
        return f"{words[:1].upper()}{words[1:]}." if words else ""

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "sentence": self.sentence,
            "keep": None if self._refused else self.best.name,
            "tied": list(self.tied),
            "over_best_parent": None if self.over_parent is None else self.over_parent.document(),
            "over_runner_up": None if self.over_runner_up is None else self.over_runner_up.document(),
        }


def rows_by_point(rows: Sequence[ScoreRow]) -> dict[str, list[ScoreRow]]:
    """The rows of each point."""
    found: dict[str, list[ScoreRow]] = defaultdict(list)
    for row in rows:
        found[row.point].append(row)
    return found


def recommend(
    result: EvaluationResult,
    lines: Sequence[Line],
    gate: Mapping[str, Any] | None,
    against_parent: Mapping[str, BaselineComparison] | None = None,
) -> Recommendation | None:
    """The recommendation, by the leaderboard's lines; None while there is no score.

    `against_parent` saves comparing all points with the best parent again.
    """
    if not lines:
        return None
    rows = rows_by_point(result.ranked_rows())
    best = lines[0]
    parent = best_parent(result, lines)
    points = [line.name for line in lines if line.name not in result.baselines]
    if parent is not None and parent != best.name and against_parent is None:
        against_parent = compare_overall(rows, points, parent)
    runner_up = next((name for name in points if name not in (best.name, parent)), None)
    standing = next((entry for entry in result.standing if entry.point == best.name), None)
    left = {departure.point for departure in result.departures}
    level = [line for line in lines if line.items == best.items and line.name in points and line.name not in left]
    return Recommendation(
        best=best,
        tied=tuple(line.name for line in level if math.isclose(line.score, best.score, abs_tol=ROUNDING)),
        parent=parent,
        parent_name="" if parent is None else result.parent_name(parent),
        over_parent=None if against_parent is None else against_parent.get(best.name),
        over_runner_up=None if runner_up is None else compare(rows, best.name, runner_up),
        points=sum(name != parent for name in points),
        finished=result.finished,
        confirmed=None if standing is None else standing.confirmed,
        gate=gate,
        noise=result.noise,
        unanswered={
            name: unanswered(rows[name]) for name in dict.fromkeys((best.name, parent, runner_up)) if name is not None
        },
    )


def best_parent(result: EvaluationResult, lines: Sequence[Line]) -> str | None:
    """The label of the parent with the highest score; None where no parent was asked."""
    parents = [line for line in lines if line.name in result.parent_labels]
    return max(parents, key=lambda line: line.score).name if parents else None


def p_text(p: float) -> str:
    """`p = 0.03`, or `p < 0.0001`."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _certainty(comparison: BaselineComparison, points: int) -> str:
    p = p_text(comparison.p if comparison.adjusted is None else comparison.adjusted)
    corrected = f" after Holm over {points} points" if comparison.adjusted is not None and points > 1 else ""
    if not math.isfinite(comparison.low):
        return f"one haystack shows no spread, {comparison.items} items"
    return f"95 % interval {comparison.low:+.1f} to {comparison.high:+.1f}, {p}{corrected}"


def _points(difference: float) -> str:
    return f"{abs(difference):.1f} {'above' if difference >= 0 else 'below'}"


def _plain(difference: float) -> str:
    return f"{difference:.1f} points"


def _spread(line: Line) -> str:
    return f" ± {line.half_width:.1f}" if math.isfinite(line.half_width) else ""
