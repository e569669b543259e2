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
from jobs.search import Choice, SearchSpec
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

    def __init__(self, store: Store, spec: SearchSpec, name: Callable[[Choice], str]) -> None:
        self._store, self._spec, self._name = store, spec, name
        self._there = {info.key for info in store.list(PREFIX)}

    def read_or_write(self, number: int, propose: Callable[[], Batch]) -> Batch:
        """The batch that lies there, or else the proposed one, which is written."""
        key = f"{PREFIX}{number:06d}.json"
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
        batch = read_document(self._store, key, _batch, REMEDY)
        for choice in (*(each.choice for each in batch.proposals), *(each.choice for each in batch.promotions)):
            if not self._spec.space.admits(choice):
                raise CorruptData(
                    f"{self._store.url}/{key}: {list(choice)} is not a point of this search; remove the run"
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
                    "name": self._name(proposal.choice),
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
                {"name": self._name(promotion.choice), "choice": list(promotion.choice), "items": promotion.items}
                for promotion in batch.promotions
            ],
        }


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


def mergeable(plan: Plan) -> Callable[[Choice], bool]:
    """Whether the recipe of the job can be planned for a point of its search: some weights sum to zero, say."""
    searched = plan.job.searched
    assert searched is not None, "a job with a search has its recipe"

    @cache
    def planned(choice: Choice) -> bool:
        try:
            plan.planner.afresh()([searched.point(choice)])
        except BadInput:
            return False
        return True

    return planned


def make_search(plan: Plan, asked: Questions, spec: SearchSpec, name: Callable[[Choice], str]) -> Search:
    """The search that a job asks, at its beginning. Every point answers the same number of items of each cell.

    `BadInput` for items that are less than a haystack, or a budget of tokens that is less than the first batch.
    """
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
        mergeable=mergeable(plan),
    )
    least = (1 + len(parents)) * search.rungs[0] * sum(planned.tokens for planned in sets.values())
    if spec.budget.tokens is not None and spec.budget.tokens < least:
        raise BadInput(
            f"{spec.place}: one point and the parents read {least} tokens in the first batch, more than the budget of"
            f" {spec.budget.tokens}; give `tokens: {least}` or more"
        )
    return search
