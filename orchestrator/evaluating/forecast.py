"""The size of an evaluation, and the smallest difference that it can show: known before the first question.

Before the parents have answered, two models are taken to differ in `DISCORDANCE` of their right-or-wrong answers, and
questions that share a haystack to be correlated by `CORRELATION`. Answers about one haystack at several lengths may
agree or not: the figures are a range, from lengths that answer independently to lengths that all answer alike. Once the
parents have answered, their answers say all of this.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np

from jobs.errors import BadInput, CorruptData
from jobs.evaluate import GuardsSpec
from jobs.evaluation_tasks import ScoreRow
from jobs.job import GateSpec
from jobs.search import Choice, SearchSpec
from orchestrator.evaluating.batches import make_search, refusals, searched_cells
from orchestrator.evaluating.confirming import BUDGET
from orchestrator.evaluating.pairing import common_rows, sample_of
from orchestrator.evaluating.results import ranked_rows, read_results
from orchestrator.evaluating.subjects import Questions, RacePlan, Sets
from orchestrator.judging.estimates import macro_mean, macro_weights
from orchestrator.judging.gate import POWER
from orchestrator.judging.power import (
    Design,
    growth_to_pass,
    passing,
    smallest_difference,
    smallest_loss,
    smallest_margin,
)
from orchestrator.judging.race import RUNGS
from orchestrator.judging.samples import Cell, CellSample, cell_of
from orchestrator.judging.significance import design_effect
from orchestrator.planning.plan import Plan
from orchestrator.searching import greedy
from orchestrator.searching.encoding import all_choices, decoded
from orchestrator.searching.proposing import generator, sequence
from workers.benchmarks.planned import PlannedSet
from workers.benchmarks.registry import BENCHMARKS

DISCORDANCE = 0.1
CORRELATION = 0.1
LEVEL = 0.05
TRIED = 256
"""Points of a space that are tried, to say how many cannot be merged."""
LONG_ANSWERS = 0.25
"""Of the tokens of a length, those of answers that take most of the time: decoding one takes that of reading many."""


Pair = Sequence[CellSample]
"""The paired differences of two parents on the items that both answered."""


@dataclass(frozen=True, slots=True)
class _Score:
    """A macro score over some cells, of which two models will answer the same items; `parents` did so already.

    Parents that agree on everything measure nothing; at a length where they do, `otherwise` stands for it.
    """

    sets: Mapping[Cell, PlannedSet]
    parents: Sequence[Pair]
    otherwise: Sequence[tuple[float, float]] = ()

    @property
    def items(self) -> int:
        return sum(planned.count for planned in self.sets.values())

    @property
    def measured(self) -> Sequence[tuple[float, float]]:
        """`_measured` of each pair of parents that differ."""
        return [found for pair in self.parents if (found := _measured(pair)) is not None] or self.otherwise

    def designs(self) -> tuple[Design, Design]:
        """The hopeful and the careful one; they are the same if the parents' answers were measured."""
        weights = dict(zip(self.sets, macro_weights([*self.sets]).tolist(), strict=True))
        haystacks = {cell: -(-planned.count // planned.questions) for cell, planned in self.sets.items()}
        largest = max(weights[cell] / haystacks[cell] for cell in self.sets)
        tasks: dict[str, list[Cell]] = defaultdict(list)
        for cell in self.sets:
            tasks[cell.task].append(cell)
        total = sum(max(haystacks[cell] for cell in cells) for cells in tasks.values())
        cells = {"tasks": len(tasks), "lengths": round(len(self.sets) / len(tasks))}
        if measured := self.measured:
            discordance, units = (float(np.mean(values)) for values in zip(*measured, strict=True))
            design = Design(total, total * units, largest, discordance, **cells)
            return design, design
        per_haystack = {
            cell: design_effect(planned.questions, CORRELATION) / planned.questions
            for cell, planned in self.sets.items()
        }
        apart = sum(weights[cell] ** 2 * per_haystack[cell] / haystacks[cell] for cell in self.sets)
        alike = sum(
            sum(weights[cell] for cell in cells) ** 2 * max(per_haystack[cell] / haystacks[cell] for cell in cells)
            for cells in tasks.values()
        )
        hopeful = Design(total, 1 / apart, largest, DISCORDANCE, **cells)
        return hopeful, replace(hopeful, units=1 / alike)

    def at(self, length: int) -> _Score:
        sets = {cell: planned for cell, planned in self.sets.items() if cell.length == length}
        pairs = [[sample for sample in pair if sample.cell in sets] for pair in self.parents]
        return _Score(sets, pairs, self.measured)


def _measured(pair: Pair) -> tuple[float, float] | None:
    """The mean square of the differences of two parents, and the independent units that a haystack is worth."""
    if not pair:
        return None
    weights = macro_weights([sample.cell for sample in pair])
    square = float(sum(weight * np.mean(sample.values**2) for weight, sample in zip(weights, pair, strict=True)))
    found = macro_mean(pair)
    if square == 0 or not 0 < found.standard_error < math.inf:
        return None
    return square, max(1 / found.clusters, (square - found.mean**2) / found.standard_error**2 / found.clusters)


def parents_answers(run_url: str, asked: Questions) -> list[ScoreRow]:
    """What the parents have answered of the questions that are asked; empty before an evaluation.

    Damaged results are made again from the scores by the evaluation, so they count as none here.
    """
    try:
        rows = read_results(run_url, points=[subject.label for subject in asked.parents.values()]).rows
    except (BadInput, CorruptData):
        return []
    sets = {planned.digest for subject in asked.parents.values() for planned in subject.sets.values()}
    return [row for row in ranked_rows(rows, asked.ranked) if row.items in sets]


def evaluation_facts(plan: Plan, asked: Questions, answers: Sequence[ScoreRow] = ()) -> dict[str, Any]:
    """For `mergeyard plan`: items, tokens that are read at the most, and the smallest differences that show.

    `answers` are those of the parents, as far as they are known. Tokens count the room for thoughts and answers. The
    size of a task of lm-evaluation-harness is not known here.
    """
    job, subjects = plan.job, [*asked.points.values(), *asked.baselines]
    first, points = asked.sets, len(asked.points)
    if job.search is not None:
        points = _most_points(plan, job.search, asked)
    score = _ranked_score(asked, answers)
    slow = job.workers.gpus > 0 and job.engine.name == "transformers"
    decodes = _generated(first) > LONG_ANSWERS * _tokens(first) > 0
    facts: dict[str, Any] = {
        "points": points,
        "baselines": len(asked.baselines),
        "items_a_point": _items(first),
        "tokens_a_point": _tokens(first),
        "thinking": _thinking(first),
        "faster_engine": "vllm" if slow and (_thinking(first) or decodes) else None,
        "samples": max(planned.generation.samples for planned in first.values()),
        "generated_a_point": _generated(first),
        "generated": sum(_generated(subject.sets) for subject in subjects),
        "items": sum(_items(subject.sets) for subject in subjects),
        "tokens": sum(_tokens(subject.sets) for subject in subjects),
        "tasks_of_unknown_size": sorted(planned.task for planned in first.values() if not planned.length),
        "too_long": dict(sum((Counter({of.task: of.too_long}) for of in first.values()), Counter[str]())),
        "race": None if asked.race is None else {"least_tokens": _least_tokens(asked, asked.race)},
        "sees": None if score is None else _sees(score, points),
        "search": None if job.search is None else _search_facts(plan, job.search, asked, points, answers),
        "guards": None if asked.guards is None else _guards(asked.guards, len(asked.points)),
        "gate": None if score is None or job.gate is None else _gate(score, job.gate),
    }
    return facts


def _most_points(plan: Plan, spec: SearchSpec, asked: Questions) -> int:
    """The most points that a search can ask; hours limit nothing that is known beforehand."""
    search = make_search(plan, asked, spec, spec.space.described)
    limits = [2 * len(greedy.singles(spec.space)) - 1 if spec.by == "greedy" else spec.space.size]
    if spec.budget.points is not None:
        limits.append(spec.budget.points)
    if spec.budget.tokens is not None:
        first = search.rungs[0] * sum(planned.tokens for planned in searched_cells(asked, spec).values())
        limits.append(max(1, (spec.budget.tokens - len(search.parents) * first) // first))
    return min(limits)


def _search_facts(
    plan: Plan, spec: SearchSpec, asked: Questions, points: int, answers: Sequence[ScoreRow]
) -> dict[str, Any]:
    """The space, the first batch, and the cost of the search: at the least, and of the first batch with the parents.

    A point that is a parent costs nothing of its own. Hours are those of one worker; they are known once the parents
    have answered.
    """
    job = plan.job
    assert job.searched is not None, "a job with a search has its recipe"
    searched = job.searched.anew()  # the names of a run are those of its batches, which may differ from these
    search = make_search(plan, asked, spec, spec.space.described)
    item = sum(planned.tokens for planned in searched_cells(asked, spec).values())

    def parents_among(choices: Sequence[Choice]) -> int:
        found = asked.joined(plan.planner.afresh()(map(searched.point, choices)))
        return sum(subject.kind == "parent" for subject in found.points.values())

    first = [proposal.choice for proposal in search.propose().proposals]
    if not first:
        plan.planner.afresh()([searched.unnamed(spec.space.middle())])  # its refusal is that of all points
    opening = (len(first) - parents_among(first) + len(search.parents)) * search.rungs[0] * item
    whole = spec.budget.tokens
    if whole is None and spec.budget.points is not None:
        each = search.rungs[-1] if spec.by == "greedy" else 2 * search.rungs[0]
        known = greedy.singles(spec.space) if spec.by == "greedy" else first
        whole = (points - parents_among(known)) * each * item + len(search.parents) * search.rungs[-1] * item
    tokens, seconds = sum(row.tokens for row in answers), sum(row.seconds for row in answers)
    rate = seconds / tokens if tokens else None
    return {
        "axes": {axis.name: len(axis.values) for axis in spec.space.axes},
        "size": spec.space.size,
        "refused": _refused(plan, spec),
        "by": spec.by,
        "first_batch": [searched.point(choice).name for choice in first],
        "rungs": list(search.rungs),
        "tokens_of_first_batch": opening,
        "tokens": whole,
        "tokens_afterwards": (max(job.keep.count or 1, 1) + len(asked.baselines)) * _tokens(asked.sets),
        "hours": spec.budget.hours if whole is None else None if rate is None else round(whole * rate / 3600, 3),
    }


def _refused(plan: Plan, spec: SearchSpec) -> dict[str, Any] | None:
    """How many points of a sample cannot be merged, and why not one of them; None if all can. They are not asked."""
    space, refusal = spec.space, refusals(plan)
    drawn = all_choices(space) if space.size <= TRIED else decoded(space, sequence(space, generator(0, 0), TRIED))
    tried = [*dict.fromkeys(drawn)]
    found = [(choice, why) for choice in tried if (why := refusal(choice))]
    if not found:
        return None
    return {"points": len(found), "of": len(tried), "point": space.described(found[0][0]), "why": found[0][1]}


def _items(sets: Sets) -> int:
    return sum(planned.count for planned in sets.values() if planned.length)


def _tokens(sets: Sets) -> int:
    return sum(planned.count * planned.tokens for planned in sets.values())


def _generated(sets: Sets) -> int:
    """The most tokens of all thoughts and answers of a model."""
    return sum(planned.count * planned.generated for planned in sets.values())


def _thinking(sets: Sets) -> list[dict[str, Any]]:
    """The thoughts of each benchmark in front of its answers; none without one."""
    found = {planned.benchmark: planned.generation for planned in sets.values() if planned.generation.end}
    return [
        {"benchmark": name, "end": of.end, "budget": of.budget, "opened": of.opened, "found": of.found}
        for name, of in found.items()
    ]


def _least_tokens(asked: Questions, race: RacePlan) -> int:
    """The cost of the race if all points but the kept ones leave at the first look."""
    look = min(race.items, -(-RUNGS[0] // race.share) * race.share)
    sets = next(iter(asked.points.values())).sets
    raced = [planned.tokens for planned in sets.values() if planned.benchmark == race.benchmark]
    kept = min(race.spec.keep, len(asked.points))
    confirmed = kept * (race.items + race.fresh - look) * sum(raced)
    rest = kept * sum(
        planned.count * planned.tokens for planned in sets.values() if planned.benchmark != race.benchmark
    )
    baselines = sum(_tokens(subject.sets) for subject in asked.baselines)
    return len(asked.points) * look * sum(raced) + confirmed + rest + baselines


def _ranked_score(asked: Questions, answers: Sequence[ScoreRow]) -> _Score | None:
    """The score that points are ranked by, if it is one of right or wrong answers to a known number of questions."""
    ranked = {
        cell: planned
        for cell, planned in asked.sets.items()
        if planned.benchmark in asked.ranked and BENCHMARKS[planned.benchmark].retrieval
    }
    if not ranked:
        return None
    by_parent: dict[str, list[ScoreRow]] = defaultdict(list)
    for row in answers:
        if cell_of(row) in ranked:
            by_parent[row.point].append(row)
    pairs = [common_rows(one, other) for one, other in combinations(by_parent.values(), 2)]
    return _Score(ranked, [[sample_of(cell, found) for cell, found in pair.items()] for pair in pairs])


def _sees(score: _Score, comparisons: int) -> dict[str, Any]:
    """The smallest differences from a parent, in points, from the hopeful to the careful one; None if none shows."""
    _, careful = score.designs()
    lengths = sorted({cell.length for cell in score.sets})
    known = bool(score.measured)
    shared = max(planned.questions for planned in score.sets.values()) > 1
    return {
        "discordance": round(careful.discordance, 3),
        "measured": known,
        "correlation": CORRELATION if shared and not known else None,
        "comparisons": comparisons,
        "overall": _smallest(score, comparisons),
        "lengths": {str(length): _smallest(score.at(length), comparisons) for length in lengths},
    }


def _smallest(score: _Score, comparisons: int) -> list[float | None]:
    """At Holm's first step of so many comparisons."""
    found = [100 * smallest_difference(of, LEVEL / comparisons) for of in _each(score)]
    return [round(points, 2) if math.isfinite(points) else None for points in found]


def _each(score: _Score) -> list[Design]:
    hopeful, careful = score.designs()
    return [hopeful] if hopeful == careful else [hopeful, careful]


def _gate(score: _Score, spec: GateSpec) -> dict[str, Any]:
    """How many items the gate's verdict on equal models will take, and how many it may ask.

    `remedy` is None if the gate may ask enough even if the lengths answer alike. Its `margin` and `length_margin` help
    together; one that is None is reached by no margin.
    """
    grows = all(planned.grows for planned in score.sets.values())
    first = max(planned.count for planned in score.sets.values())
    most = max(first, spec.budget if spec.budget is not None else BUDGET * first) if grows else first
    scopes = [(score, spec.margin)]
    if spec.length_margin is not None:
        scopes += [(score.at(length), spec.length_margin) for length in sorted({cell.length for cell in score.sets})]
    allowed, anytime = most / first, most > first
    growths = [_growths(of, margin, spec.alpha, allowed, anytime=anytime) for of, margin in scopes]
    needed = [max(growth[end] for growth in growths) for end in (0, -1)]
    facts: dict[str, Any] = {
        "margin": spec.margin,
        "items_needed": [_whole(growth * score.items) for growth in growths[0]],
        "length_margin": spec.length_margin,
        "items_needed_a_length": None,
        "output_tokens": None if spec.output_tokens is None else spec.output_tokens.at_most,
        "items_at_first": first * len(score.sets),
        "items_at_most": most * len(score.sets),
        "remedy": None,
    }
    if spec.length_margin is not None:
        facts["items_needed_a_length"] = [
            _whole(max(growth[end] * of.items for growth, (of, _) in zip(growths[1:], scopes[1:], strict=True)))
            for end in (0, -1)[: max(len(growth) for growth in growths[1:])]
        ]
    if needed[-1] * first > most:
        looking = max(_growths(of, margin, spec.alpha, allowed, anytime=True)[-1] for of, margin in scopes)
        reached = [_reached(of, spec, allowed, anytime=anytime) for of, _ in scopes]
        facts["remedy"] = {
            "sure": needed[0] * first > most,
            "budget": _whole(looking * first) if grows else None,
            "margin": _least_of(spec.margin, reached[:1]),
            "length_margin": None if spec.length_margin is None else _least_of(spec.length_margin, reached[1:]),
        }
    return facts


def _guards(spec: GuardsSpec, points: int) -> dict[str, Any]:
    """What a guard of `limit` items sees, in points; without a limit the number of items is not known here.

    `loss` is the smallest one that rules a point out, `margin_reached` the smallest margin at which an equal model
    holds, `items_needed` the items for the job's margin.
    """
    facts: dict[str, Any] = {
        "tasks": list(spec.tasks),
        "margin": spec.margin,
        "discordance": DISCORDANCE,
        "items": spec.limit,
        "items_needed": _whole(100 * growth_to_pass(_guard(100), spec.margin / 100, spec.alpha, anytime=False)),
        "loss": None,
        "margin_reached": None,
    }
    if spec.limit is not None:
        loss = 100 * smallest_loss(_guard(spec.limit), spec.margin / 100, spec.alpha / (points * len(spec.tasks)))
        reached = 100 * smallest_margin(_guard(spec.limit), spec.alpha, None)
        facts["loss"] = round(loss, 1) if math.isfinite(loss) else None
        facts["margin_reached"] = math.ceil(10 * reached) / 10 if math.isfinite(reached) else None
    return facts


def _guard(items: int) -> Design:
    """Items that share no text."""
    return Design(items, items, 1 / items, DISCORDANCE)


def _growths(score: _Score, margin: float, alpha: float, allowed: float, *, anytime: bool) -> list[float]:
    """How many times the items an equal model needs; at most `allowed` where so many are enough.

    The power rises in steps, so that the least number that is found may lie above one that is enough.
    """
    found: list[float] = []
    for design in _each(score):
        growth = growth_to_pass(design, margin / 100, alpha, anytime=anytime)
        planned = design.haystacks if anytime else None
        if growth > allowed and passing(design.grown(allowed), margin / 100, alpha, planned) >= POWER:
            growth = allowed
        found.append(growth)
    return found


def _reached(score: _Score, spec: GateSpec, growth: float, *, anytime: bool) -> float | None:
    """The smallest margin, in points, that so many times the items decide; None if there is none."""
    design = score.designs()[-1]
    found = 100 * smallest_margin(design.grown(growth), spec.alpha, design.haystacks if anytime else None)
    return math.ceil(10 * found) / 10 if math.isfinite(found) else None


def _least_of(margin: float, reached: Sequence[float | None]) -> float | None:
    """The least margin, from the job's own up, that all of these scores reach; None if one reaches none."""
    known = [found for found in reached if found is not None]
    return max([margin, *known]) if len(known) == len(reached) else None


def _whole(number: float) -> int | None:
    return math.ceil(number) if math.isfinite(number) else None
