"""The bets of the gate: their capital by hand and by a general optimiser, and that it is no more than fair."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import binom

from orchestrator.judging.betting import BETS, STAKES, Strata, capital, lower_bound, strata
from orchestrator.judging.samples import CellSample, cell_sample


def haystacks(*tasks: list[float]) -> Strata:
    found = strata(
        [cell_sample(f"task {number}", 4096, values) for number, values in enumerate(tasks)],
        np.full(len(tasks), 1 / len(tasks)),
    )
    assert found is not None
    return found


def test_the_capital_of_three_haystacks_by_hand():
    found = capital(haystacks([0.5, -0.2, 0.0]), -0.01)
    by_hand = [math.prod(1 + bet * (y + 0.01) / 0.99 for y in (0.5, -0.2, 0.0)) for bet in BETS]
    assert np.exp(found.growth) == pytest.approx(np.array(by_hand))
    assert found.p_value == pytest.approx(1 / max(1.0, float(STAKES @ by_hand)))
    assert STAKES.sum() == pytest.approx(1.0)


def test_a_haystack_lost_whole_leaves_the_smaller_bets_their_capital():
    assert 0.04 < math.exp(capital(haystacks([0.0] * 40 + [-1.0]), -0.1).growth.max()) < 10
    assert capital(haystacks([0.0] * 400 + [-1.0]), -0.1).p_value < 1e-6


@pytest.mark.parametrize("bet", [0, 6, 10, 11])
def test_the_least_capital_over_tasks_is_that_of_a_general_optimiser(bet: int):
    random = np.random.default_rng(3)
    tasks = [
        random.choice([-1.0, -0.4, 0.0, 0.4, 1.0], size=size, p=[0.01, 0.1, 0.7, 0.15, 0.04]) for size in (30, 80, 50)
    ]
    stake = BETS[bet]

    def log_capital(free: np.ndarray) -> float:
        shares = np.exp(free - free.max())
        rooms = 3 * 0.95 * shares / shares.sum()  # means + 1, whose average is 1 - 0.05
        return sum(float(np.log1p(stake * (y - room + 1) / room).sum()) for y, room in zip(tasks, rooms, strict=True))

    found = capital(haystacks(*(values.tolist() for values in tasks)), -0.05).growth[bet]
    least = minimize(log_capital, np.zeros(3), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-9}).fun
    assert least - 0.011 < found < least + 1e-6


def test_the_capital_of_one_task_is_fair_on_the_margin():
    # every outcome of 6 haystacks that are lost with a chance of the margin: the expected capital is 1
    expected = 0.0
    for lost in range(7):
        growth = capital(haystacks([-1.0] * lost + [0.0] * (6 - lost)), -0.1).growth
        expected += binom.pmf(lost, 6, 0.1) * float(STAKES @ np.exp(growth))
    assert expected == pytest.approx(1.0)


@pytest.mark.parametrize("chances", [(0.1, 0.1), (0.2, 0.0), (0.15, 0.05)])
def test_the_capital_of_two_tasks_is_no_more_than_fair(chances: tuple[float, float]):
    expected = 0.0
    for lost in product(range(6), repeat=2):
        likely = math.prod(binom.pmf(number, 5, chance) for number, chance in zip(lost, chances, strict=True))
        found = haystacks(*([-1.0] * number + [0.0] * (5 - number) for number in lost))
        expected += likely * float(STAKES @ np.exp(capital(found, -0.1).growth))
    assert 0.7 < expected <= 1.0 + 1e-9


def test_a_bound_is_the_mean_that_the_bets_just_reject():
    found = haystacks([0.1, 0.0, 0.3, 0.2] * 20)
    low = lower_bound(found, 0.05, -1.0)
    assert -1 < low < 0.15
    assert capital(found, low - 1e-3).p_value < 0.05 < capital(found, low + 1e-3).p_value
    assert lower_bound(found, 0.05, 0.149) == 0.149, "a mean that is not rejected is no better bound"


def test_lengths_that_share_haystacks_are_one_stratum_and_orders_do_not_matter():
    names = [f"h{number}" for number in range(20)]
    random = np.random.default_rng(5)
    short, long = random.choice([-1.0, 0.0, 1.0], size=(2, 20))
    cells = [cell_sample("vt", 4096, short, names), cell_sample("vt", 8192, long, names)]
    found = strata(cells, np.array([0.5, 0.5]))
    assert found is not None and found.values.shape[0] == 1 and found.counts.sum() == 20
    assert float(found.values[0] @ found.counts[0]) == pytest.approx((short.sum() + long.sum()) / 2)
    order = random.permutation(20)
    shuffled = [CellSample(cell.cell, cell.values[order], cell.haystacks[order]) for cell in reversed(cells)]
    again = strata(shuffled, np.array([0.5, 0.5]))
    assert again is not None
    assert capital(again, -0.01).growth.tolist() == capital(found, -0.01).growth.tolist()


def test_a_haystack_that_is_cut_off_does_not_count_and_unlike_haystacks_take_no_bets():
    even = cell_sample("vt", 4096, [0.0, 1.0, 0.0, 1.0, 1.0], ["a", "a", "b", "b", "c"])
    found = strata([even], np.ones(1))
    assert found is not None and found.counts.sum() == 2
    uneven = cell_sample("vt", 4096, [0.0, 1.0, 0.0, 1.0], ["a", "a", "b", "c"])
    assert strata([uneven], np.ones(1)) is None


def test_more_haystacks_are_needed_where_models_differ_often():
    agree, differ = capital(haystacks([0.0] * 100), -0.05), capital(haystacks([0.0] * 90 + [1.0, -1.0] * 5), -0.05)
    times = agree.growth_needed(0.05, 0.8)
    assert float(STAKES @ (1 + BETS * 0.05 / 0.95) ** (100 * times)) == pytest.approx(20, rel=0.01)
    assert differ.growth_needed(0.05, 0.8) > 3 * agree.growth_needed(0.05, 0.8)
    assert capital(haystacks([-0.5] * 10), -0.05).growth_needed(0.05, 0.8) == math.inf
