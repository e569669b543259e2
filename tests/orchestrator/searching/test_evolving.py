"""CMA-ES beyond twelve axes: made anew from the points that were asked, and drawn by keys."""

from __future__ import annotations

import time

import numpy as np
import pytest

from jobs.search import Budget, Objective, SearchSpec, Space
from orchestrator.searching.encoding import decoded
from orchestrator.searching.evolving import evolved, expected_weights, generation_size
from orchestrator.searching.figures import Figures
from orchestrator.searching.proposing import Evidence, propose
from orchestrator.searching.search import Search
from tests.orchestrator.searching.worlds import CELLS, ITEMS, TRIANGLE, World, numbers, run

SCORE = Objective("score")
MANY = Space(tuple(numbers(f"w{number}", 50) for number in range(16)))
TOP = np.linspace(0.35, 0.65, 16)
HILL = World(MANY, lambda place: 1.5 - 3 * float(np.sum((place - TOP) ** 2)))


def search(**more: object) -> Search:
    start = (tuple([50] * 16),)
    spec = SearchSpec(space=MANY, **({"budget": Budget(points=40), "batch": 8, "start": start} | more))
    return Search(spec, CELLS, items=ITEMS, seed=3, costs=dict.fromkeys(CELLS, 1.0), rungs=(10, 20, 40))


def test_batches_depend_neither_on_the_order_of_answers_nor_on_a_restart() -> None:
    plain = run(search(), HILL)
    assert [proposal.reason for proposal in plain.batches[4].proposals[:1]] == [
        "drawn by CMA-ES after 1 generations of 16 points"
    ]
    assert run(search(), HILL, shuffled=np.random.default_rng(1)).batches == plain.batches
    assert run(search(), HILL, written=plain.batches[:3]).batches == plain.batches


def test_a_generation_is_whole_batches_and_as_large_as_the_axes_ask() -> None:
    assert [generation_size(MANY, batch) for batch in (1, 8, 32)] == [12, 16, 32]  # 4 + floor(3 ln 16) = 12


def test_points_that_may_be_lucky_weigh_less_than_points_that_are_surely_good() -> None:
    sure = np.array([[3.0, 2.0, 1.0, 0.0]] * 2)
    logs = np.log(2.5) - np.log([1, 2, 3, 4])
    np.testing.assert_allclose(expected_weights(sure), logs)
    doubtful = np.array([[3.0, 2.0, 1.0, 0.0], [0.0, 2.0, 1.0, 3.0]])
    expected = [logs[[0, 3]].mean(), logs[1], logs[2], logs[[0, 3]].mean()]
    np.testing.assert_allclose(expected_weights(doubtful), expected)
    assert expected_weights(doubtful)[0] < expected_weights(sure)[0] / 3


def test_draws_come_nearer_to_the_top_with_each_generation() -> None:
    """On a noiseless hill, so that each point must meet its own value."""
    size, generations = 16, []
    centre = np.full(16, 0.9)
    distances: list[float] = []
    for number in range(12):
        drawn = evolved(MANY, generations, centre, size=size, seed=number)
        choices = [next(drawn) for _ in range(size)]
        values = np.array([-np.sum((np.array(choice) / 50 - TOP) ** 2) for choice in choices])
        generations.append((choices, values[None]))
        distances.append(float(-values.mean()))
    assert distances[-1] < distances[0] / 3


def test_weights_of_a_simplex_are_drawn_too() -> None:
    space, evidence = asked(40)
    found = propose(space, evidence, [], by="cma-es", count=8, number=40, seed=0, first=SCORE)
    assert len({each.choice for each in found} - {*evidence.choices}) == 8
    assert all(space.admits(each.choice) for each in found)


@pytest.mark.serial
@pytest.mark.heavy
def test_a_batch_after_three_hundred_points_takes_less_than_a_second() -> None:
    space, evidence = asked(300)
    propose(space, evidence, [], by="cma-es", count=1, number=1, seed=0, first=SCORE)  # loads scipy
    started = time.perf_counter()
    propose(space, evidence, [], by="cma-es", count=8, number=40, seed=0, first=SCORE)
    assert time.perf_counter() - started < 1


def asked(count: int) -> tuple[Space, Evidence]:
    """Sixteen axes beside a simplex of three, and so many points drawn at random with their figures."""
    space = Space((*MANY.axes, *TRIANGLE.axes), simplexes=TRIANGLE.simplexes)
    random = np.random.default_rng(0)
    choices = tuple(decoded(space, random.random((count, len(space.axes)))))
    return space, Evidence(choices, (Figures(random.random(count), np.diag(np.full(count, 1e-3))),))


@pytest.mark.parametrize("values", [2, 3])
def test_axes_of_few_values_do_not_freeze(values: int) -> None:
    space = Space(tuple(numbers(f"s{number}", values - 1) for number in range(14)))
    first = evolved(space, [], np.full(14, 0.5 / values), size=16, seed=1)
    choices = [next(first) for _ in range(16)]
    worth = np.array([[float(sum(choice)) for choice in choices]])
    later = evolved(space, [(choices, worth)] * 6, np.full(14, 0.5 / values), size=16, seed=2)
    assert len({next(later) for _ in range(64)}) > 8
