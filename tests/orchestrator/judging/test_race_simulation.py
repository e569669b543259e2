"""The race of the simulation, in a few worlds; `race_simulation.py` without `--worlds` runs the hundreds."""

import numpy as np
import pytest

from orchestrator.judging import pairing, race
from tests.benchmarks.race_simulation import MISLEADING, REGIMES, dropped, simulate


def test_race_keeps_the_winner_of_the_full_evaluation_at_a_twentieth_of_its_cost():
    rule = {"points": 200, "items": 500, "z": 3.0, "alpha": None, "keep": 1, "seed": 1}
    results = [simulate(regime, 1, **rule) for regime in REGIMES]
    assert [result.regime for result in results] == ["correlated", "crossing", "anti-correlated"]
    assert all(result.same_winner == 1.0 for result in results)
    assert sum(result.cost_share for result in results) / 3 < 0.07


WORLDS = {world.name: world for world in MISLEADING}


def test_races_that_are_misled_drop_the_best_as_rarely_as_alpha_says() -> None:
    # more than 5 of 20 happen in fewer than one of a thousand simulations at 5 %
    for name in ("13 tasks, one tells", "rare total losses"):
        assert dropped(WORLDS[name], 20, alpha=0.05, z=3.0, seed=1) <= 5


def test_the_simulation_sees_degrees_of_freedom_of_tasks_that_tell_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race, "LEAST_HAYSTACKS", 2)
    monkeypatch.setattr(pairing, "satterthwaite", lambda variances, degrees: float(np.sum(degrees)))
    monkeypatch.setattr(pairing, "few_losses", lambda seen, claimed: 0.0)
    assert dropped(WORLDS["13 tasks, one tells"], 60, alpha=0.05, z=3.0, seed=1) > 6


def test_the_simulation_sees_a_race_without_the_guard_against_rare_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairing, "few_losses", lambda seen, claimed: 0.0)
    assert dropped(WORLDS["rare total losses"], 20, alpha=0.05, z=3.0, seed=1) > 5
