"""The simulation of intervals, tests and gates: some dozens of each line at once, the thousands where there is time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from scipy.stats import binom

from tests.benchmarks.statistics_simulation import (
    FEW_DIFFER,
    Case,
    Result,
    alone,
    cases,
    fractional,
    right_or_wrong,
    simulate,
    verdict_on,
)


def assert_as_stated(of: Sequence[Case], trials: int, first: int = 0) -> None:
    """A case without an error in its `first` trials is not simulated further; most of them err less than they may."""
    results: list[Result] = []
    for case in of:
        found = simulate(case, first, seed=1) if first else []
        results += found if found and not any(line.errors for line in found) else simulate(case, trials, seed=1)
    wrong = [result for result in results if result.verdict == "above" and not result.note]
    assert not wrong, "\n".join(f"{line.what}, {line.regime}: {line.rate:.1%}" for line in wrong)
    known = [result for result in results if result.verdict == "above" and result.note == FEW_DIFFER]
    assert known, "the simulation no longer sees that the plain interval collapses"


def test_nothing_errs_more_often_than_it_says() -> None:
    assert_as_stated(cases(), trials=60, first=12)


def test_a_line_that_errs_four_times_as_often_is_noticed() -> None:
    lines = [alone("test", "errs", f"world {each}", lambda random: bool(random.random() < 0.2)) for each in range(5)]
    with pytest.raises(AssertionError, match="errs, world"):
        assert_as_stated(lines, trials=60, first=12)


@pytest.mark.heavy
def test_nothing_errs_more_often_than_it_says_in_thousands_of_simulations() -> None:
    assert_as_stated(cases(), trials=2000)


def test_every_kind_is_simulated_small_alike_shared_and_fractional() -> None:
    lines_of_all = [name for case in cases() for name in case.names]
    names = {*lines_of_all}
    assert len(names) == len(lines_of_all), "lines of one name would have the same random numbers"
    for kind in ("interval", "test", "gate"):
        lines = [name for name in names if name.startswith(kind)]
        looks = {"interval": (), "test": ("every look",), "gate": ("10 looks",)}[kind]
        for regime in ("n 8", "ρ 0.1", "ρ 0.3", "fifths", *looks):
            assert any(regime in name for name in lines), (kind, regime)


@pytest.mark.parametrize(("rate", "above"), [(0.1, True), (0.05, False)])
def test_a_test_that_errs_twice_as_often_is_noticed(rate: float, above: bool) -> None:
    [found] = simulate(alone("test", "errs", "any", lambda random: bool(random.random() < rate)), 1000, seed=0)
    assert (found.verdict == "above") is above
    assert verdict_on(0, 1000, 0.05) == "few"
    assert binom.sf(70 - 1, 1000, 0.05) > 1e-3 and verdict_on(70, 1000, 0.05) == "as stated"


def test_the_regimes_have_the_mean_and_the_correlation_that_they_claim() -> None:
    regime = right_or_wrong(80_000, 0.1, 0.2, correlation=0.3)
    values, haystacks = regime.draw(np.random.default_rng(1))
    assert regime.mean == pytest.approx(-0.1) and values.mean() == pytest.approx(-0.1, abs=0.01)
    table = values.reshape(-1, 8)
    assert haystacks.reshape(-1, 8).std() > 0 and np.all(haystacks.reshape(-1, 8) == haystacks.reshape(-1, 8)[:, :1])
    assert np.corrcoef(table[:, 0], table[:, 1])[0, 1] == pytest.approx(0.3, abs=0.04)
    parts = fractional(10_000, 0.98, 0.9).draw(np.random.default_rng(2))[0]
    assert parts.mean() == pytest.approx(0.08, abs=0.01) and {round(5 * abs(value), 9) for value in parts} <= {
        0,
        1,
        2,
        3,
        4,
        5,
    }
