"""The batches of a search in the store: `search/000003.json` says what batch 3 asks, before anything of it is asked.

A file is written once. The listing of these files and of the scores is the whole state of a search.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from typing import Any

from jobs.errors import BadInput, CorruptData, ObjectExists
from jobs.expressions import format_number
from jobs.merge_tasks import FORMAT
from jobs.sealing import sealed
from jobs.search import Choice, SearchedRecipe, SearchSpec
from jobs.yaml_nodes import quoted
from orchestrator.evaluating.subjects import Questions, Sets
from orchestrator.planning.plan import Plan
from orchestrator.records.documents import read_document, text_of
from orchestrator.searching.proposing import Proposal
from orchestrator.searching.search import RUNGS, Batch, Promotion, Search
from workers.benchmarks.registry import BENCHMARKS
from workers.storage import Store

PREFIX = "search/"
REMEDY = "remove it; it is proposed again from the scores"


class BatchFiles:
    """The batch files of a run."""

    def __init__(self, store: Store, spec: SearchSpec, searched: SearchedRecipe) -> None:
        self._store, self._spec, self._searched = store, spec, searched
        self._there = {info.key for info in store.list(PREFIX)}

    def read_or_write(self, number: int, propose: Callable[[], Batch]) -> Batch:
        """The batch that lies there, or else the proposed one, which is written."""
        key = key_of(number)
        if key not in self._there:
            batch = propose()
            try:
                self._store.write(key, sealed(self._document(batch), lines=True), mode="create")
                return batch
            except ObjectExists:
                pass  # an earlier write of ours whose answer never came
        return self._read(key)

    def written(self) -> Iterator[Batch]:
        """The batches that lie there, in their order."""
        return map(self._read, sorted(self._there))

    def _read(self, key: str) -> Batch:
        batch, names = read_document(self._store, key, lambda document: (_batch(document), _names(document)), REMEDY)
        for choice, name in names:
            if not self._spec.space.admits(choice):
                raise CorruptData(
                    f"{self._store.url}/{key}: {list(choice)} is not a point of this search; remove the run"
                )
            if not self._searched.named(choice, name):
                raise CorruptData(
                    f"{self._store.url}/{key}: {list(choice)} and {quoted(name)} stand for other points already;"
                    " remove the run"
                )
        return batch

    def _document(self, batch: Batch) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "number": batch.number,
            "seen": batch.seen,
            "items": batch.items,
            "proposals": [
                {
                    "name": self._searched.point(proposal.choice).name,
                    "bindings": {
                        axis: format_number(value) if isinstance(value, Fraction) else value
                        for axis, value in self._spec.space.bindings(proposal.choice).items()
                    },
                    "choice": list(proposal.choice),
                    "reason": proposal.reason,
                }
                for proposal in batch.proposals
            ],
            "promotions": [
                {
                    "name": self._searched.point(promotion.choice).name,
                    "choice": list(promotion.choice),
                    "items": promotion.items,
                }
                for promotion in batch.promotions
            ],
        }


def key_of(number: int) -> str:
    """The file of a batch."""
    return f"{PREFIX}{number:06d}.json"


def asked_points(store: Store) -> list[str]:
    """The names of the points that the search of a run has asked so far, in their order; none without a search."""
    keys = sorted(info.key for info in store.list(PREFIX))
    batches = (read_document(store, key, lambda batch: batch["proposals"], REMEDY) for key in keys)
    return [text_of(entry, "name") for proposals in batches for entry in proposals]


def _batch(document: dict[str, Any]) -> Batch:
    return Batch(
        number=int(document["number"]),
        proposals=tuple(
            Proposal(tuple(map(int, entry["choice"])), text_of(entry, "reason")) for entry in document["proposals"]
        ),
        promotions=tuple(
            Promotion(tuple(map(int, entry["choice"])), int(entry["items"])) for entry in document["promotions"]
        ),
        seen=text_of(document, "seen"),
        items=None if document.get("items") is None else int(document["items"]),
    )


def _names(document: dict[str, Any]) -> list[tuple[Choice, str]]:
    entries = [*document["proposals"], *document["promotions"]]
    return [(tuple(map(int, entry["choice"])), text_of(entry, "name")) for entry in entries]


def searched_cells(asked: Questions, spec: SearchSpec) -> Sets:
    """The sets that every point answers: those that rank points, and those that a figure of the search names.

    `BadInput` for a figure of items that points cannot be raced on.
    """
    named = [each.metric for each in spec.maximize] + [each.metric for each in spec.at_least]
    benchmarks = {*asked.ranked, *(name.partition("@")[0] for name in named)} & BENCHMARKS.keys()
    for name in sorted(benchmarks):
        key = BENCHMARKS[name].searched
        whole = [planned for planned in asked.sets.values() if planned.benchmark == name and not planned.length]
        if key and whole:
            raise BadInput(
                f"{whole[0].place}: points are searched on items that they answer one by one; name the metric that"
                f" counts, as `{key}: {{{whole[0].task}: acc}}`"
            )
        if not key and BENCHMARKS[name].raced is None:
            titles = ", ".join(row for row in BENCHMARKS if BENCHMARKS[row].raced is not None)
            raise BadInput(
                f"{spec.place}: points are searched on items that they answer in small blocks, those of {titles};"
                f" add one, or name one under `maximize:` in place of {name}"
            )
    return {cell: planned for cell, planned in asked.sets.items() if planned.benchmark in benchmarks}


def refusals(plan: Plan) -> Callable[[Choice], str]:
    """Why the recipe of the job makes no merge at a point of its search, as weights that sum to zero; empty if it does.

    Nor is a point asked of a kind that the plan has no point of. An answer takes half a millisecond, more where merges
    feed others, and is kept.
    """
    job, searched = plan.job, plan.job.searched
    assert job.search is not None and searched is not None, "a job with a search has its recipe"
    space = job.search.space
    layouts = {planned.layout for planned in plan.points}

    @cache
    def refusal(choice: Choice) -> str:
        try:
            (planned,) = plan.planner.afresh()([searched.unnamed(choice)])
        except BadInput as error:
            return str(error)
        if planned.layout not in layouts:
            return (
                f"{job.place_of('recipe')}: {space.described(choice)} is of a kind of which no point could be merged"
                " when the search was planned"
            )
        return ""

    return refusal


def make_search(plan: Plan, asked: Questions, spec: SearchSpec, name: Callable[[Choice], str]) -> Search:
    """The search that a job asks, at its beginning. Every point answers the same number of items of each cell.

    `BadInput` for a point of `start` that cannot be merged, items that are less than a haystack, or a budget of tokens
    that is less than the first batch.
    """
    refusal = refusals(plan)
    for choice in spec.start:
        if why := refusal(choice):
            raise BadInput(f"{why}; `start:` asks this point, {spec.space.described(choice)}: take it out there")
    sets = searched_cells(asked, spec)
    share = math.lcm(*(planned.share for planned in sets.values()))
    items = min(planned.count for planned in sets.values()) // share * share
    if not items:
        raise BadInput(f"{spec.place}: a search asks whole haystacks of {share} questions; give at least {share} items")
    parents = [subject.label for subject in asked.parents.values()]
    search = Search(
        spec,
        [*sets],
        items=items,
        seed=asked.seed,
        parents=parents,
        ranked=asked.ranked,
        costs={cell: float(planned.tokens) for cell, planned in sets.items()},
        limit=None if spec.budget.tokens is None else float(spec.budget.tokens),
        name=name,
        rungs=[rung for rung in dict.fromkeys(-(-rung // share) * share for rung in RUNGS) if rung < items] + [items],
        items_per_haystack=1 if all(planned.questions == 1 for planned in sets.values()) else share,
        items_shared_across_lengths=True,
        mergeable=lambda choice: not refusal(choice),
    )
    least = (1 + len(parents)) * search.rungs[0] * sum(planned.tokens for planned in sets.values())
    if spec.budget.tokens is not None and spec.budget.tokens < least:
        raise BadInput(
            f"{spec.place}: one point and the parents read {least} tokens in the first batch, more than the budget of"
            f" {spec.budget.tokens}; give `tokens: {least}` or more"
        )
    return search
