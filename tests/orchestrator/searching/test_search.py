from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest

from jobs.errors import CorruptData
from jobs.search import Axis, Budget, Choice, Constraint, Objective, SearchSpec, Space
from orchestrator.searching import proposing
from orchestrator.searching.figures import Figures
from orchestrator.searching.proposing import Evidence, judge, propose, resolved
from orchestrator.searching.search import RUNGS, Batch, Search
from tests.orchestrator.searching.worlds import CELLS, ITEMS, LINE, MIXED, TRIANGLE, World, numbers, run

COSTS = dict.fromkeys(CELLS, 1.0)
HILL = World(LINE, lambda place: 1.5 - 12 * float((place[0] - 0.7) ** 2))


def search(
    space: Space = LINE,
    *,
    limit: float | None = 3000.0,
    seed: int = 1,
    parents: tuple[str, ...] = (),
    rungs: Sequence[int] = RUNGS,
    mergeable: Callable[[Choice], bool] = lambda choice: True,
    **more,
) -> Search:
    spec = SearchSpec(space=space, **({"by": "gp", "budget": Budget()} | more))
    given = {"costs": COSTS, "limit": limit, "parents": parents, "rungs": rungs, "mergeable": mergeable}
    return Search(spec, CELLS, items=ITEMS, seed=seed, **given)


@pytest.mark.heavy
def test_the_order_of_the_answers_changes_nothing():
    plain = run(search(), HILL)
    for seed in (1, 2):
        other = run(search(), HILL, shuffled=np.random.default_rng(seed))
        assert other.batches == plain.batches
        assert other.standing() == plain.standing()
        assert other.departures == plain.departures


def test_a_search_goes_on_from_its_batches_and_scores():
    whole = run(search(), HILL)
    again = run(search(), HILL, written=whole.batches[:3])
    assert again.batches == whole.batches


def test_points_of_batches_that_do_not_say_it_have_answered_ten_items():
    """Such batches are of a version whose rungs began at ten. The search goes on from them."""
    before = run(search(rungs=RUNGS[1:]), HILL).batches[:4]
    written = [replace(batch, items=None) for batch in before]
    made = run(search(), HILL, written=written)
    assert made.batches[:4] == written and len(made.batches) > 4
    answered = [made._scores[made._name(batch.proposals[-1].choice)].shape[1] for batch in made.batches[:5]]
    assert min(answered[:4]) == 10 and answered[4] == 5


def test_a_batch_made_from_other_scores_is_refused():
    whole = run(search(), HILL)
    other = World(LINE, lambda place: float(place[0]))
    with pytest.raises(CorruptData, match="batch 2: made from other scores"):
        run(search(), other, written=whole.batches)


def test_a_batch_made_from_other_numbers_of_tokens_is_refused():
    batches: list[Batch] = []
    for tokens in (5.0, 6.0):
        made = search(maximize=(Objective("output_tokens", -1),), by="sobol")
        for _ in range(2):
            made.add(made.propose())
        for block in made.next_blocks():
            count = len(block.items)
            made.record(block.point, block.cell, block.items, [1.0] * count, [tokens] * count)
        made.close()
        batches.append(made.propose())
    with pytest.raises(CorruptData, match="batch 2: made from other scores"):
        made.add(batches[0])


def test_two_batches_are_open_and_the_third_waits_for_the_first():
    made = search()
    for number in (0, 1):
        assert made.due == number
        made.add(made.propose())
    assert made.due is None
    first = {block.point for block in made.next_blocks()[:1]}
    assert first <= {LINE.described(proposal.choice) for proposal in made.batches[0].proposals}
    for block in made.next_blocks():
        if made.choices[block.point] in [proposal.choice for proposal in made.batches[0].proposals]:
            made.record(block.point, block.cell, block.items, np.ones(len(block.items)))
    made.close()
    assert made.due == 2


@pytest.mark.parametrize("by", ["gp", "sobol", "random"])
@pytest.mark.parametrize("parents", [(), ("long", "fmt")])
def test_the_limit_is_kept_and_nearly_used(by: str, parents: tuple[str, ...]):
    made = run(search(by=by, parents=parents), HILL, parents={"long": (100,), "fmt": (0,)})
    asked = sum(scores.size for scores in made._scores.values())
    assert asked == made.committed <= 3000
    assert made.committed > 2500


def test_the_last_quarter_of_a_limit_asks_no_new_point():
    made = run(search(), HILL)
    new = len(made.choices) * made.rungs[0] * len(CELLS)
    last = max(batch.number for batch in made.batches if batch.proposals)
    later = [promotion for batch in made.batches[last + 1 :] for promotion in batch.promotions]
    assert new <= 0.75 * 3000
    assert later and made.standing()[0].items >= 40


def test_the_best_of_equal_points_is_not_shown_with_the_luckiest_mean():
    space = Space((numbers("w", 9),))
    scores = np.array([0.9, 0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.2, 0.2, 0.1])
    figures = Figures(scores, 0.01 * np.eye(10))
    found = judge(space, Evidence(tuple((index,) for index in range(10)), (figures,)), by="sobol", seed=1)
    assert found.best[0] < 0.6 and np.all(found.best[1:5] > 0.05)
    assert found.shown[0] == pytest.approx(found.best @ found.mean) and found.shown[0] < found.mean[0]
    assert found.shown[5:] == pytest.approx(found.mean[5:])
    smooth = judge(space, Evidence(tuple((index,) for index in range(10)), (figures,)), by="gp", seed=1)
    assert smooth.shown.max() < smooth.best @ smooth.mean  # more points are taken for likely winners than are so


def test_points_are_counted_and_then_the_likely_ones_are_asked_more():
    made = run(search(limit=None, budget=Budget(points=20)), HILL)
    assert len(made.choices) == 20
    assert made.standing()[0].items > 40


@pytest.mark.heavy
def test_the_search_finds_the_hill_and_asks_most_near_it():
    places = [run(search(seed=seed), HILL).standing()[0].choice[0] / 100 for seed in range(4)]
    assert all(abs(place - 0.7) < 0.12 for place in places)
    asked = np.array([choice[0] / 100 for choice in run(search(limit=1500.0), HILL).choices.values()])
    assert np.mean(np.abs(asked - 0.7) < 0.2) > 0.5


def test_the_points_of_start_come_first():
    made = search(start=((0,), (50,), (100,)))
    batch = made.propose()
    assert [proposal.choice for proposal in batch.proposals[:3]] == [(0,), (50,), (100,)]
    assert len({proposal.choice for proposal in batch.proposals}) == 8


def test_without_start_the_middle_of_the_space_comes_first():
    assert search().propose().proposals[0].choice == (50,)


def test_each_parent_alone_follows_the_middle_of_a_simplex():
    proposals = search(TRIANGLE).propose().proposals
    assert [each.choice for each in proposals[:4]] == [(6, 7, 7), (20, 0, 0), (0, 20, 0), (0, 0, 20)]
    assert [each.reason for each in proposals[1:4]] == ["a alone", "b alone", "c alone"]


def test_the_ends_follow_the_middle_of_a_space_without_simplexes():
    """There the parents of a mixture by layers lie; an axis of words stays at its first word."""
    proposals = (
        search(Space((numbers("a", 4), numbers("b", 10), Axis("m", ("x", "y"), "words", "")))).propose().proposals
    )
    assert [each.choice for each in proposals[:3]] == [(2, 5, 0), (0, 0, 0), (4, 10, 0)]
    assert [each.reason for each in proposals[1:3]] == ["the least of every axis", "the greatest of every axis"]


@pytest.mark.parametrize(("axes", "covering"), [(4, 4), (2, 0)])
def test_half_of_the_new_points_of_a_large_space_covers_it(axes: int, covering: int):
    """441 points of two axes are looked at whole. The points around one hill promise nothing elsewhere."""
    space = Space(tuple(numbers(f"a{index}", 20) for index in range(axes)))
    choices = np.unique(np.random.Generator(np.random.Philox(key=6)).integers(4, 9, (24, axes)), axis=0)
    means = 0.6 - 0.3 * np.sum((choices / 20 - 0.3) ** 2, axis=1)
    evidence = Evidence(tuple(map(tuple, choices.tolist())), (Figures(means, 1e-4 * np.eye(len(means))),))
    found = propose(space, evidence, (), by="gp", count=8, number=2, seed=1, first=Objective("score"))
    assert len({each.choice for each in found}) == 8
    assert [each.reason.startswith("covers the space") for each in found] == [False] * (8 - covering) + [
        True
    ] * covering


@pytest.mark.parametrize("by", ["gp", "sobol", "random", "cma-es"])
def test_no_point_is_asked_that_cannot_be_merged(by: str):
    """Neither an end of the space, nor the points that promise most; `start` asks what it names."""
    made = run(search(by=by, mergeable=lambda choice: 10 <= choice[0] < 60), HILL)
    assert len(made.choices) > 5 and all(10 <= choice[0] < 60 for choice in made.choices.values())
    started = search(by=by, start=((0,),), mergeable=lambda choice: choice[0] > 0)
    assert started.propose().proposals[0].choice == (0,)


@pytest.mark.parametrize("batch", [1, 3])
def test_gp_looks_beside_the_points_that_promise_most_but_cannot_be_merged(batch: int):
    """The score rises towards a + b > 20, where nothing can be merged; half of the points are of Sobol's sequence."""
    space = Space((numbers("a", 41), numbers("b", 41)))
    rising = World(space, lambda place: 3 * float(place.sum()) - 2)
    made = search(space, limit=None, batch=batch, budget=Budget(points=24), mergeable=lambda choice: sum(choice) <= 20)
    run(made, rising)
    reasons = [proposal.reason for each in made.batches for proposal in each.proposals]
    assert len(reasons) == 24 and sum(reason.startswith("expected") for reason in reasons) >= 4
    assert max(sum(choice) for choice in made.choices.values()) == 20


@pytest.mark.parametrize("by", ["gp", "sobol"])
def test_promotions_go_on_where_hardly_a_point_of_a_large_space_can_be_merged(by: str):
    space = Space((numbers("a", 60), numbers("b", 60)))
    rising = World(space, lambda place: float(place[1]))
    made = run(
        search(space, by=by, limit=None, budget=Budget(points=60), mergeable=lambda choice: choice[0] == 7), rising
    )
    assert made.finished and made.standing()[0].items == ITEMS


def test_promotions_go_on_where_the_rest_of_a_small_space_cannot_be_merged():
    space = Space((numbers("w", 20),))
    flat = World(space, lambda place: 0.5)
    made = run(search(space, limit=None, mergeable=lambda choice: 12 <= choice[0] <= 18), flat)
    assert len(made.choices) == 7
    likely = [found for found in made.standing() if found.best >= 0.05 and found.left is None]
    assert len(likely) > 1 and all(found.items == ITEMS for found in likely)


def test_the_middle_is_called_the_middle_where_it_is_an_end_too():
    made = search(Space((numbers("a", 2), numbers("b", 2))))
    assert made.propose().proposals[0].reason == "the middle of the space"


def test_a_small_space_is_asked_whole_and_the_search_ends():
    made = run(search(Space((numbers("w", 4),)), limit=None, budget=Budget(points=50)), World(LINE, lambda place: 0.0))
    assert len(made.choices) == 5


@pytest.mark.parametrize("space", [TRIANGLE, MIXED])
def test_every_point_that_is_asked_is_admitted_once(space: Space):
    made = run(search(space), World(space, lambda place: float(place[0])))
    asked = [proposal.choice for batch in made.batches for proposal in batch.proposals]
    assert len(asked) == len({*asked}) > 16
    assert all(space.admits(choice) for choice in asked)


@pytest.mark.heavy
def test_a_constraint_keeps_the_winner_where_the_parent_is_met():
    """The score rises with w, and the needle falls from w = 0.5 on."""

    class Falling(World):
        def chances(self, choice: tuple[int, ...]) -> np.ndarray:
            w = choice[0] / 100
            return np.broadcast_to(np.array([[0.3 + 0.6 * w], [0.3 + 0.6 * w], [0.9 if w < 0.5 else 0.2]]), (3, ITEMS))

    made = run(
        search(
            limit=6000.0,
            parents=("fmt",),
            maximize=(Objective("ruler"),),
            at_least=(Constraint("needle", "fmt", 10.0),),
        ),
        Falling(LINE, lambda place: 0.0),
        parents={"fmt": (0,)},
    )
    assert 0.3 <= made.standing()[0].choice[0] / 100 < 0.5
    assert made.standing()[0].feasible > 0.5


@pytest.mark.heavy
def test_two_objectives_make_a_front():
    """One benchmark rises along the line and the other one falls: every point is on the front."""

    class Against(World):
        def chances(self, choice: tuple[int, ...]) -> np.ndarray:
            w = choice[0] / 100
            return np.broadcast_to(np.array([[0.1 + 0.8 * w], [0.1 + 0.8 * w], [0.9 - 0.8 * w]]), (3, ITEMS))

    made = run(search(maximize=(Objective("ruler"), Objective("needle"))), Against(LINE, lambda place: 0.0))
    front = [row.choice[0] for row in made.front()]
    assert min(front) < 25
    assert max(front) > 75
    assert len(front) > 10
    assert made.departures == []


def test_few_of_equal_points_leave():
    """With α = 5 %, a departure of the best point is rare; of points that are all equal, none is below another."""
    gone = 0
    for seed in range(10):
        flat = World(LINE, lambda place: 0.0, seed=seed)
        made = run(search(seed=seed, by="sobol"), flat)
        gone += bool(made.departures)
        assert not made.sure
    assert gone <= 2


def test_a_far_worse_point_leaves():
    made = run(search(limit=6000.0, rungs=RUNGS[1:]), World(LINE, lambda place: 3.0 if place[0] > 0.5 else -3.0))
    assert {departure.point for departure in made.departures}
    assert all(made.choices[departure.point][0] <= 50 for departure in made.departures)


def test_a_score_that_should_be_small_leaves_by_a_gap_above_zero():
    world = World(LINE, lambda place: 3.0 if place[0] > 0.5 else -3.0)
    made = run(search(limit=6000.0, rungs=RUNGS[1:], maximize=(Objective("score", -1),)), world)
    assert made.departures
    assert all(re.match(r"\d", departure.reason) for departure in made.departures)


def test_scores_are_checked():
    made = search()
    made.add(made.propose())
    block = made.next_blocks()[0]
    with pytest.raises(CorruptData, match="between 0 and 1"):
        made.record(block.point, block.cell, block.items, [2.0] * len(block.items))
    with pytest.raises(CorruptData, match="was not asked"):
        made.record(block.point, block.cell, [ITEMS], [1.0])
    made.record(block.point, block.cell, block.items, [1.0] * len(block.items))
    with pytest.raises(CorruptData, match="two different scores"):
        made.record(block.point, block.cell, block.items, [0.0] * len(block.items))


def test_auto_is_gp_up_to_twelve_axes_of_numbers():
    many = tuple(numbers(f"a{index}", 10) for index in range(13))
    word = Axis("method", ("linear", "ties"), "words", "here")
    assert resolved(Space((*many[:12], word)), "auto") == "gp"
    assert resolved(Space(many), "auto") == "cma-es"
    assert resolved(Space((*many, word)), "auto") == "sobol"
    assert resolved(Space(many), "sobol") == "sobol"


@pytest.mark.serial
@pytest.mark.heavy
def test_a_batch_of_three_hundred_points_and_twelve_axes_takes_a_second():
    space = Space(tuple(numbers(f"a{index}", 20) for index in range(12)))
    random = np.random.Generator(np.random.Philox(key=5))
    choices = [tuple(row) for row in random.integers(0, 21, (300, 12)).tolist()]
    means = 0.1 * np.sin(np.array(choices)[:, 0] / 4) + random.normal(0, 0.02, 300)
    noise = np.full((300, 300), 0.01**2) + np.eye(300) * 0.02**2
    evidence = Evidence(tuple(choices), (Figures(means, noise),))
    times = []
    for number in range(3):
        began = time.perf_counter()
        found = propose(space, evidence, (), by="gp", count=8, number=number, seed=1, first=Objective("score"))
        times.append(time.perf_counter() - began)
    assert len({proposal.choice for proposal in found} - {*choices}) == 8
    assert min(times) < 1.0


def test_neighbours_of_the_best_of_a_pool_promise_more(monkeypatch: pytest.MonkeyPatch):
    """Of 40 points in eight axes around a hill, in points of 100 as the reason says them."""
    space = Space(tuple(numbers(f"a{index}", 20) for index in range(8)))
    choices = np.random.Generator(np.random.Philox(key=5)).integers(0, 21, (40, 8))
    means = 0.9 - 0.3 * np.sum((choices / 20 - 0.4) ** 2, axis=1)
    evidence = Evidence(tuple(map(tuple, choices.tolist())), (Figures(means, 1e-4 * np.eye(40)),))

    def promised(climbs: int) -> float:
        monkeypatch.setattr(proposing, "CLIMBS", climbs)
        [found] = propose(space, evidence, (), by="gp", count=1, number=2, seed=1, first=Objective("score"))
        return float(re.findall(r"by ([\d.]+)", found.reason)[0])

    assert promised(4) > 1.2 * promised(0)


@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_the_search_goes_on_while_a_likely_point_has_items_left(batch: int):
    """A batch that has nothing to ask before the scores of the last one does not end the search."""
    made = run(search(limit=None, budget=Budget(points=8), batch=batch, by="sobol"), HILL)
    assert len(made.choices) == 8
    assert made.standing()[0].items == ITEMS or made.sure
    assert not made.batches[-1].proposals
    assert not made.batches[-1].promotions


def test_reasons_have_the_unit_of_the_first_figure():
    evidence = Evidence(tuple((at,) for at in (0, 30, 60, 90)), (Figures(np.array([-9.0, -7, -8, -12]), np.eye(4)),))
    tokens = Objective("output_tokens", -1)
    [found] = propose(LINE, evidence, (), by="gp", count=1, number=2, seed=1, first=tokens)
    assert (foreseen := re.search(r"foreseen ([\d.]+) ± [\d.]+ tokens|foreseen ([\d.]+) tokens ±", found.reason))
    assert 6 < float(foreseen[1] or foreseen[2]) < 12
