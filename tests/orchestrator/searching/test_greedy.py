from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from jobs.search import Budget, Choice, SearchSpec, Space
from orchestrator.judging.pairing import Pairing
from orchestrator.searching import greedy
from orchestrator.searching.findings import Findings, findings
from orchestrator.searching.search import Batch, Search
from tests.orchestrator.searching.worlds import CELLS, numbers

MODELS = ("bad", "good", "same", "wide")
NAMES = tuple(f"soup.{model}" for model in MODELS)
SPACE = Space(tuple(numbers(name, 1) for name in NAMES), subsets={"soup": NAMES})
ITEMS = 320
BAD, GOOD, SAME, WIDE = range(4)


def answers(choice: Choice) -> np.ndarray:
    """Of all items [cells, items]: `good` answers 60 % of them, `wide` more, `same` the same ones, `bad` few."""
    items = np.tile(np.random.default_rng(5).permutation(np.arange(ITEMS) / ITEMS), (len(CELLS), 1))
    chance = 0.6 + 0.1 * choice[WIDE] - 0.2 * choice[BAD]
    alone = {(0, 0, 1, 0): 0.59, (0, 0, 0, 1): 0.55, (1, 0, 0, 0): 0.3}
    return (items < alone.get(choice, chance)).astype(float)


def brewed(*, batch: int = 8, points: int = 20, limit: float | None = None, written: Sequence[Batch] = ()) -> Search:
    spec = SearchSpec(space=SPACE, by="greedy", budget=Budget(points=points), batch=batch)
    search = Search(spec, CELLS, items=ITEMS, seed=1, costs=dict.fromkeys(CELLS, 1.0), limit=limit)
    while not search.finished:
        while (number := search.due) is not None:
            search.add(written[number] if number < len(written) else search.propose())
        for block in search.next_blocks():
            scores = answers(search.choices[block.point])[CELLS.index(block.cell)]
            search.record(block.point, block.cell, block.items, scores[block.items.start : block.items.stop])
        search.close()
    return search


def test_a_model_stays_that_helps_or_costs_nothing_and_a_bad_one_leaves():
    search = brewed()
    soup = search.soup(search.closed - 1)
    assert soup.choice == (0, 1, 1, 1) and soup.tried is None
    assert [(each.model, each.stays) for each in soup.ingredients] == [
        ("good", True), ("same", True), ("wide", True), ("bad", False)
    ]  # fmt: skip
    assert search.standing()[0].choice == soup.choice
    assert len(search.choices) == 2 * len(MODELS) - 1
    bad = soup.ingredients[-1]
    assert bad.reason.startswith("surely worse with it: -") and bad.items < ITEMS


def test_batches_of_two_decide_the_same():
    whole, small = brewed(), brewed(batch=2)
    assert small.soup(small.closed - 1) == whole.soup(whole.closed - 1)


def test_a_search_goes_on_from_its_batches():
    whole = brewed()
    assert brewed(written=whole.batches[:4]).batches == whole.batches


def test_a_limit_is_kept():
    search = brewed(limit=4000.0)
    assert search.committed <= 4000
    assert search.soup(search.closed - 1).tried is not None, "not all models were tried"


def test_a_model_that_changes_few_answers_is_not_sure_to_be_harmless():
    """40 items of three cells at 60 %: one answer more or less is 0.8 points, and 1 may be lost."""
    random = np.random.default_rng(6)
    without = (random.random((len(CELLS), 40)) < 0.6).astype(float)
    flipped = np.where(random.random(without.shape) < 0.1, 1 - without, without)
    scores = dict.fromkeys(greedy.singles(SPACE), without) | {(1, 1, 0, 0): flipped}
    found = greedy.soup(SPACE, scores, Pairing(CELLS), (10, 20, 40), haystack=1)
    verdict = found.ingredients[1]
    assert not verdict.stays and verdict.reason.startswith("not sure: ")
    assert verdict.gain == pytest.approx(100 * (flipped - without).mean(axis=1) @ Pairing(CELLS).weights)


def test_the_wrong_verdicts_are_as_rare_as_the_level():
    """A model that costs the margin stays in at most 5 % of 200 draws; at this margin each loss costs 1 of 100."""
    random, stayed = np.random.default_rng(7), 0
    for _ in range(200):
        without = (random.random((len(CELLS), 160)) < 0.7).astype(float)
        lost = np.where(random.random(without.shape) < 0.01 / 0.7, 0.0, without)
        scores = dict.fromkeys(greedy.singles(SPACE), without) | {(1, 1, 0, 0): lost}
        stayed += greedy.soup(SPACE, scores, Pairing(CELLS), (40, 80, 160), haystack=1).ingredients[-1].stays
    assert stayed <= 10


def test_the_ingredients_are_among_the_findings():
    search = brewed()
    found = findings(search, 1)
    assert found is not None
    assert found.ingredients == search.soup(search.closed - 1).ingredients
    assert found.steps[-1].best == search.standing()[0].point
    assert Findings.read(found.document()) == found
    assert Findings.read({**found.document(), "ingredients": ()}) == replace(found, ingredients=())
