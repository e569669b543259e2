"""The sentence on top: which merge to keep, and how sure that is."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from jobs.evaluation_tasks import ScoreRow
from orchestrator.evaluating.results import EvaluationResult, ranked_rows
from orchestrator.judging.effective_length import RELATIVE_SHARE
from orchestrator.judging.gate import TOKENS
from orchestrator.judging.guards import Guarded
from orchestrator.judging.significance import FlipRate
from orchestrator.judging.unanswered import DOUBTED, Unanswered, unanswered
from orchestrator.report.against_baseline import BaselineComparison, best_of, compare_overall
from orchestrator.report.leaderboard import Line
from orchestrator.words import short_length, shortlist

ROUNDING = 1e-9
"""Points of 100 by which two equal scores may differ."""

REMEDY = "Mend the cause, such as a model that reasons first, and evaluate under another `name:`."
LONGER = "Give `thinking:` a larger `budget:`, or take `thinking: off`, and evaluate under another `name:`."
"""Scores are kept, so that the same run would not ask again."""


@dataclass(frozen=True, slots=True)
class Recommendation:
    """The leader, its difference from the best parent, and from each rival, the least sure first.

    Where the leader is a parent itself, `parent` is its label and `over_parent` None. `parent_name` is the best
    parent's name in sentences. `points` counts the points that were compared with it. `tied` are the points with the
    leader's score on as many items; the leader is only the first of them by name. `gate` is the gate's verdict as it
    lies in the run, if there is one. `unanswered` counts the questions that each of these models did not answer; where
    the leader has too many of them, there is nothing to recommend. While the evaluation is not `finished`, nothing is
    compared: a p value holds for a number of items that was fixed beforehand. `guards` are the findings on the leader,
    and on the points with a higher score that surely lost a guard; where the leader is one of these, none is left.
    """

    best: Line
    tied: tuple[str, ...]
    parent: str | None
    parent_name: str
    over_parent: BaselineComparison | None
    over_rivals: Mapping[str, BaselineComparison]
    points: int
    finished: bool
    confirmed: float | None
    gate: Mapping[str, Any] | None
    noise: FlipRate | None
    unanswered: Mapping[str, Unanswered]
    guards: Sequence[Guarded] = ()
    higher: Line | None = None
    """The merge with the highest score, if it is above the leader's: a search ranks by more than the score."""
    infeasible: bool = False
    """Whether the leader likely breaks the constraints of a search, as then each other merge does."""

    @property
    def sentence(self) -> str:
        """Which merge to keep, its rank, the lengths where it fails, and a warning if answers are missing."""
        if self._refused:
            return f"{self._keep()} {_remedy([self.unanswered[self.best.name]])}"
        if not self.finished:
            return " ".join(filter(None, (self._so_far(), self._doubts())))
        of_best = (self._rank(), self._fails()) if self._kept == self.best.name else ()
        return " ".join(filter(None, (self._keep(), *of_best, self._guarded(), self._doubts())))

    @property
    def why(self) -> list[str]:
        """The sentences behind it: p values, the rule that decided, the gate, the noise floor."""
        if self._refused:
            return []
        return [*filter(None, (self._parents_p(), self._closest(), self._elsewhere(), self._floor()))]

    @property
    def _refused(self) -> bool:
        return self.unanswered[self.best.name].refused

    @property
    def _fresh(self) -> Mapping[str, Any] | None:
        """The gate's line on the leader against the best parent, on items that no point was chosen by."""
        gate = self.gate
        if gate is None or not gate.get("fresh") or (gate.get("new"), gate.get("old")) != (self.best.name, self.parent):
            return None
        line = gate["lines"][0]
        return line if line.get("low") is not None and line.get("high") is not None and "rule" in gate else None

    @property
    def _sure(self) -> int:
        """1 where the leader is surely better than the best parent, −1 where it is surely worse, else 0.

        The interval of fresh questions decides where there is one, as it is the one in the sentence.
        """
        fresh, found = self._fresh, self.over_parent
        if fresh is not None:
            return int(fresh["low"] > 0) - int(fresh["high"] < 0)
        if found is None or not found.sure or math.isclose(found.difference, 0, abs_tol=ROUNDING):
            return 0
        return 1 if found.difference > 0 else -1

    @property
    def _kept(self) -> str | None:
        if self._refused:
            return None
        return self.parent if self._sure < 0 or self._out or self.infeasible else self.best.name

    @property
    def _out(self) -> bool:
        """Whether the leader surely lost a guard, as then each merge that was left did."""
        return any(found.model == self.best.name and found.outcome == "broken" for found in self.guards)

    def _guarded(self) -> str:
        """The points that are out in spite of their score, and the guards that are not decided for the leader."""
        lost: dict[str, list[str]] = defaultdict(list)
        for found in self.guards:
            if found.outcome == "broken":
                lost[found.model].append(found.words)
        told = [f"{name} is out: {'; '.join(reasons)}." for name, reasons in lost.items()]
        unsure = [found for found in self.guards if found.model == self.best.name and found.outcome == "undecided"]
        if unsure and self._kept == self.best.name:
            told.append(f"Guards that are not decided: {'; '.join(found.words for found in unsure)}.")
        return " ".join(told)

    def _doubts(self) -> str:
        doubted = {name: found for name, found in self.unanswered.items() if found.share > DOUBTED}
        told = [found.words(name) for name, found in doubted.items()]
        return f"But {'; '.join(told)}. {_remedy(doubted.values())}" if told else ""

    def _so_far(self) -> str:
        who = f"{len(self.tied)} points share the first place" if len(self.tied) > 1 else f"{self.best.name} leads"
        return f"So far, with the evaluation unfinished, {who} with {self.best.score:.1f}."

    def _keep(self) -> str:
        if self._refused:
            return f"No recommendation: {self.unanswered[self.best.name].words(self.best.name)}."
        if self._out:
            keep = f"Keep the parent {self.parent_name}" if self.parent else "No recommendation"
            return f"{keep}: each merge that was left surely loses at a guard."
        if self.infeasible:
            keep = f"Keep the parent {self.parent_name}" if self.parent else "No recommendation"
            return f"{keep}: no merge is likely to keep the constraints of the search."
        score = _score(self.best)
        tie = f"{len(self.tied)} points share the first place" if len(self.tied) > 1 and self._fresh is None else ""
        if self.parent == self.best.name:
            others = f"; {tie}" if tie else ""
            if self.higher is not None:
                other = f"{self.higher.name} has {_score(self.higher)}"
                rank = "but the order counts items and the figures of the search too"
                return f"Keep the parent {self.parent_name}: {score}. {other}, {rank}."
            return f"Keep the parent {self.parent_name}: {score}, and no merge scores more{others}."
        if self.over_parent is None:
            return f"{tie or f'Keep {self.best.name}'}: {score}."
        told = self._over_parent(self.over_parent)
        if self._sure < 0:
            merges = f"of the merges, {tie} with" if tie else f"the best merge, {self.best.name}, has"
            return f"Keep the parent {self.parent_name}: {merges} {score}, {told}."
        if self._sure > 0:
            return f"{tie or f'Keep {self.best.name}'}: {score}, {told}."
        if self._fresh is None and math.isclose(self.over_parent.difference, 0, abs_tol=ROUNDING):
            if self.parent in self.tied:
                return f"{tie}, the parent {self.parent_name} among them: {score}."
            who = f"{len(self.tied)} points" if tie else self.best.name
            return f"{who} and the best parent, {self.parent_name}, share the first place: {score}."
        leads = f"{tie} with {score}, but are" if tie else f"{self.best.name} leads with {score}, but is"
        return f"{leads} not surely better than {'the' if tie else 'its'} parents: {told}."

    def _over_parent(self, found: BaselineComparison) -> str:
        """The difference from the best parent with its interval; on fresh items if a gate asked them."""
        fresh = self._fresh
        if self.gate is not None and fresh is not None:
            level = 100 * (1 - 2 * self.gate["rule"]["alpha"])
            bounds = f"{level:g} % {fresh['low']:+.1f} to {fresh['high']:+.1f}"
            return f"{_over(fresh['difference'])} the best parent, {self.parent_name}, on fresh questions ({bounds})"
        return f"{_over(found.difference)} the best parent, {self.parent_name} ({_bounds(found)})"

    def _rank(self) -> str:
        if len(self.tied) > 1:
            they = "By name they are" if self._fresh is None else f"{len(self.tied)} points share the first place:"
            return f"{they} {shortlist(self.tied)}: more items may tell them apart."
        if not self.over_rivals:
            return ""
        count, unsure = len(self.over_rivals), self._unsure
        if not unsure:
            return f"Best of {count + 1}: sure against {count} of {count}."
        return (
            f"Not surely the best of {count + 1}: {shortlist(unsure)} may be as good; more items may show a difference."
        )

    @property
    def _unsure(self) -> list[str]:
        """The rivals that may be as good.

        Only their absence is a finding. Each p alone has no correction for the choice of the leader, so that the
        number of the other rivals is not that of the points that are worse.
        """
        return [name for name, found in self.over_rivals.items() if not found.sure or found.difference <= 0]

    def _fails(self) -> str:
        """The lengths at which the leader loses more than 15 % of its score at the shortest (as Modarressi 2025)."""
        by_length = self.best.by_length
        if len(by_length) < 2:
            return ""
        bar = RELATIVE_SHARE * by_length[min(by_length)]
        found = {length: score for length, score in sorted(by_length.items()) if score < bar}
        if not found:
            return ""
        lengths, scores = [short_length(length) for length in found], [f"{score:.0f}" for score in found.values()]
        return f"{self.best.name} fails at {', '.join(lengths)}: {', '.join(scores)}."

    def _parents_p(self) -> str:
        found = self.over_parent
        if found is None:
            return ""
        at_once = f", for {self.points} points at once" if self.points > 1 else ""
        told = f"Against {self.parent_name}: {_p(found)}{at_once}{_guard(found)}."
        if self._fresh is None:
            return told
        return told.replace(":", f", on the items that chose it: {found.difference:+.1f} ({_bounds(found)}),", 1)

    def _closest(self) -> str:
        if len(self.tied) > 1 or not self.over_rivals:
            return ""
        rival, found = next(iter(self.over_rivals.items()))
        largest = f", the largest p of {len(self.over_rivals)} rivals" if len(self.over_rivals) > 1 else ""
        return f"{found.difference:+.1f} over the closest rival, {rival}: {_p(found)}{largest}{_guard(found)}."

    def _elsewhere(self) -> str:
        if self.gate is not None and self.gate.get("new") == self.best.name:
            where = " on items that no point was chosen by" if self.gate.get("fresh") else ""
            line = self.gate["lines"][0]
            tokens = "".join(f"; {of['reason']}" for of in self.gate["lines"] if of.get("scope") == TOKENS)
            found = f"{line['difference']:+.1f} against {self.gate['old']}{tokens}"
            return f"The gate says {self.gate['outcome']}{where}: {found}."
        if self.confirmed is not None:
            who = self.best.name if len(self.tied) > 1 else "it"
            return f"On fresh items, that no point was chosen by, {who} scores {100 * self.confirmed:.1f}."
        return ""

    def _floor(self) -> str:
        """How much of any of these differences the same weights may show against themselves."""
        words = "" if self.noise is None else self.noise.words
        return f"{words[:1].upper()}{words[1:]}." if words else ""

    def document(self) -> dict[str, Any]:
        """For `--json`; `closest_rival` is the one with the largest p."""
        closest = next(iter(self.over_rivals.values()), None)
        return {
            "sentence": self.sentence,
            "why": self.why,
            "keep": self._kept,
            "tied": list(self.tied),
            "over_best_parent": None if self.over_parent is None else self.over_parent.document(),
            "closest_rival": None if closest is None else closest.document(),
            "rivals": len(self.over_rivals),
            "guards": [asdict(found) for found in self.guards],
            "best_of_all": bool(self.over_rivals) and len(self.tied) == 1 and not self._unsure,
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
    answers = rows_by_point(ranked_rows(result.common_answers(), result.ranked))
    best = lines[0]
    parent = best_parent(result, lines)
    out = result.broken - {best.name}
    points = [line.name for line in lines if line.name not in result.baselines and line.name not in out]
    if not result.finished or parent is None or parent == best.name:
        against_parent = None
    elif against_parent is None:
        against_parent = compare_overall(rows, points, parent)
    over_rivals = best_of(rows, best.name, [name for name in points if name != best.name]) if result.finished else {}
    standing = next((entry for entry in result.standing if entry.point == best.name), None)
    scores = {line.name: line.score for line in lines}
    left = {departure.point for departure in result.departures}
    level = [line for line in lines if line.items == best.items and line.name in points and line.name not in left]
    doubted = (best.name, parent, next(iter(over_rivals), None))
    merges = [line for line in lines if line.name in points and line.name not in result.parent_labels]
    highest = max(merges, key=lambda line: line.score, default=best)
    return Recommendation(
        best=best,
        higher=highest if highest.score > best.score + ROUNDING else None,
        tied=tuple(line.name for line in level if math.isclose(line.score, best.score, abs_tol=ROUNDING)),
        parent=parent,
        parent_name="" if parent is None else result.parent_name(parent),
        over_parent=None if against_parent is None else against_parent.get(best.name),
        over_rivals=over_rivals,
        points=sum(name != parent for name in points),
        finished=result.finished,
        infeasible=best.name in result.infeasible and best.name != parent,
        confirmed=None if standing is None else standing.confirmed,
        gate=gate,
        noise=result.noise,
        guards=[
            found
            for found in result.guards
            if found.model == best.name or (found.outcome == "broken" and scores[found.model] > best.score)
        ],
        unanswered={name: unanswered(answers[name]) for name in dict.fromkeys(doubted) if name is not None},
    )


def best_parent(result: EvaluationResult, lines: Sequence[Line]) -> str | None:
    """The label of the parent with the highest score; None where no parent was asked."""
    parents = [line for line in lines if line.name in result.parent_labels]
    return max(parents, key=lambda line: line.score).name if parents else None


def p_text(p: float) -> str:
    """`p = 0.03`, or `p < 0.0001`."""
    return "p < 0.0001" if p < 1e-4 else f"p = {p:.2g}"


def _p(comparison: BaselineComparison) -> str:
    if not math.isfinite(comparison.low):
        return f"one haystack shows no spread, {comparison.items} items"
    return p_text(comparison.p)


def _remedy(lost: Iterable[Unanswered]) -> str:
    return LONGER if all(2 * found.unended > found.count for found in lost) else REMEDY


def _guard(comparison: BaselineComparison) -> str:
    """Says that losses too rare to be seen decided, and not the observed spread."""
    if not comparison.guarded:
        return ""
    return ". Losses that are too rare to be seen in so few haystacks could explain it; the observed spread could not"


def _bounds(comparison: BaselineComparison) -> str:
    if not math.isfinite(comparison.low):
        return f"one haystack shows no spread, {comparison.items} items"
    return f"95 % {comparison.low:+.1f} to {comparison.high:+.1f}"


def _over(difference: float) -> str:
    return f"{difference:+.1f} {'over' if difference >= 0 else 'against'}"


def _score(line: Line) -> str:
    """The score with its 95 % interval."""
    if not math.isfinite(line.half_width):
        return f"{line.score:.1f}"
    low, high = max(0.0, line.score - line.half_width), min(100.0, line.score + line.half_width)
    return f"{line.score:.1f} ({low:.1f} to {high:.1f})"
