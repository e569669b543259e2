"""Many models against one: on paper where it can be, and by simulation where it cannot."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from orchestrator.judging.estimates import macro_difference
from orchestrator.judging.samples import CellSample, cell_sample
from orchestrator.judging.significance import spread_test
from orchestrator.judging.simultaneous import simultaneous


def one_cell(values: object, task: str = "vt") -> list[CellSample]:
    array = np.asarray(values, dtype=float)
    return [cell_sample(task, 512, array, [f"{task}{number}" for number in range(array.size)])]


def test_the_largest_statistic_is_that_of_all_sign_patterns() -> None:
    # eight haystacks have 2⁸ patterns of signs: the share of patterns whose statistic is at least the observed one
    values = np.array([0.5, 0.4, 0.45, 0.3, 0.5, 0.2, -0.1, 0.25])
    residuals = values - values.mean()
    statistics = []
    for signs in itertools.product((-1, 1), repeat=8):
        flipped = residuals * signs
        error = np.sqrt(8 / 7 * (np.sum(flipped**2) - flipped.sum() ** 2 / 8))
        statistics.append(abs(flipped.sum()) / error)
    estimate = macro_difference(one_cell(values))
    share = np.mean(np.array(statistics) >= estimate.mean / estimate.standard_error)
    found = simultaneous({"a": one_cell(values)})["a"]
    assert found.p == pytest.approx(max(share, spread_test(estimate)), abs=0.003)


def test_p_and_interval_come_from_one_rule() -> None:
    random = np.random.Generator(np.random.Philox(key=5))
    for trial in range(12):
        common = random.standard_normal(30)
        models = {
            f"m{number}": one_cell(np.clip(0.1 * (0.3 * number + common + random.standard_normal(30)), -1, 1))
            for number in range(6)
        }
        for found in simultaneous(models, seed=trial).values():
            sure = max(found.p, found.rare) <= 0.05
            assert sure is not (found.estimate.low <= 0 <= found.estimate.high)


def test_draws_are_keyed_and_do_not_depend_on_the_order_of_the_models() -> None:
    random = np.random.Generator(np.random.Philox(key=6))
    models = {f"m{number}": one_cell(0.2 * random.standard_normal(20).clip(-4, 4)) for number in range(5)}
    found = simultaneous(models)
    backwards = simultaneous(dict(reversed(models.items())))
    assert {name: entry.p for name, entry in found.items()} == {name: entry.p for name, entry in backwards.items()}
    assert found["m0"].estimate.high == pytest.approx(backwards["m0"].estimate.high)


def test_the_interval_is_never_shorter_than_that_of_one_model() -> None:
    alike = simultaneous({"a": one_cell(np.zeros(24)), "b": one_cell(np.zeros(24))})["a"]
    alone = macro_difference(one_cell(np.zeros(24)))
    assert (alike.estimate.low, alike.estimate.high, alike.p) == (alone.low, alone.high, 1.0)


def test_one_haystack_shows_no_spread() -> None:
    found = simultaneous({"a": [cell_sample("vt", 512, [1.0, 1.0], ["h", "h"])]})["a"]
    assert found.p == 1.0 and found.estimate.low <= -1
    assert simultaneous({}) == {}


def test_of_equal_models_any_is_rarely_sure() -> None:
    """Ten models, each as good as the baseline: at 5 %, at most 12 of 100 (one in a thousand simulations has more)."""
    random, wrong = np.random.Generator(np.random.Philox(key=7)), 0
    for _ in range(100):
        base = random.random(60) < 0.7
        models = {f"m{number}": one_cell((random.random(60) < 0.7).astype(float) - base) for number in range(10)}
        wrong += any(max(found.p, found.rare) <= 0.05 for found in simultaneous(models, draws=999).values())
    assert wrong <= scipy.stats.binom.isf(1e-3, 100, 0.05)
