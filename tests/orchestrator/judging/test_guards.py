"""Guards: the three findings, their levels over points and guards, and the gate's lines."""

from __future__ import annotations

import numpy as np
import pytest

from orchestrator.judging.gate import GateRule, judge
from orchestrator.judging.guards import Comparison, Guarded, broken, compare, ruled_out, with_guards
from orchestrator.judging.samples import CellSample, paired_sample


def sample(gained: int, lost: int, items: int) -> CellSample:
    """A task where a point is right on `gained` items alone, and its baseline on `lost`."""
    new, old = np.ones(items), np.ones(items)
    old[:gained] = 0
    new[gained : gained + lost] = 0
    return paired_sample("gsm8k:acc", 0, new, old)


@pytest.mark.parametrize(
    ("gained", "lost", "outcome"), [(10, 100, "broken"), (0, 0, "held"), (10, 14, "undecided"), (100, 10, "held")]
)
def test_a_guard_is_broken_held_or_undecided(gained: int, lost: int, outcome: str) -> None:
    found = compare([sample(gained, lost, 500)], "fmt", margin=1, alpha=0.05, tests=1)
    assert (found.outcome, found.difference) == (outcome, pytest.approx((gained - lost) / 5))
    assert found.low < found.difference < found.high
    assert (found.high < -1, found.low > -1) == (outcome == "broken", outcome == "held")


def test_a_loss_among_many_points_and_guards_needs_more() -> None:
    """20 of 500 lost alone: −4 ± 0.9 is surely beyond the margin of 2 for one test, and not for one of sixty."""
    findings = [compare([sample(0, 20, 500)], "fmt", margin=2, alpha=0.05, tests=tests) for tests in (1, 60)]
    assert [found.outcome for found in findings] == ["broken", "undecided"]
    assert findings[1].p_fail == pytest.approx(60 * findings[0].p_fail)
    assert findings[0].high < -2 < findings[1].high and findings[0].low == findings[1].low


def test_one_haystack_decides_nothing() -> None:
    found = compare([paired_sample("a", 0, [0.0], [1.0])], "fmt", margin=1, alpha=0.05, tests=1)
    assert (found.outcome, found.low, found.high) == ("undecided", -100, 100)


def test_wrong_calls_of_any_of_many_points_stay_within_alpha() -> None:
    """Ten points that truly lose just the margin of 5, on 200 shared items each: 150 worlds."""
    random = np.random.default_rng(0)
    wrong = 0
    for _ in range(150):
        base = random.random(200) < 0.7
        worst = 1.0
        for _ in range(10):
            moved = random.random(200)
            new = np.where(base, moved > 0.05 / 0.7 + 0.1, moved < 0.1 * 0.7 / 0.3)
            found = compare([paired_sample("t", 0, new, base)], "fmt", margin=5, alpha=0.05, tests=10)
            worst = min(worst, found.p_fail)
        wrong += worst <= 0.05
    assert wrong <= 0.05 * 150 + 2 * np.sqrt(150 * 0.05 * 0.95)


def guarded(outcome: str, difference: float) -> Guarded:
    against = Comparison("fmt", 1, outcome, difference, difference - 2, difference + 2, 0.5, 0.5, 500)
    return Guarded("w0.3", f"{outcome}-task", 50.0, 500, against)


def test_a_gate_fails_by_a_broken_guard_and_reserves_an_undecided_one() -> None:
    rule = GateRule(margin=1)
    lost, unsure, kept = guarded("broken", -9.0), guarded("undecided", -0.4), guarded("held", 2.0)
    verdict = ruled_out([unsure, lost, kept], rule, new="w0.3", old="fmt")
    assert verdict is not None and (verdict.outcome, verdict.exit_code, len(verdict.lines)) == ("fail", 1, 1)
    assert verdict.lines[0].reason == (
        "guard broken-task -9.0 (-11.0 to -7.0) against fmt, worse by more than the margin of 1"
    )
    assert '<failure type="fail"' in verdict.to_junit_xml() and '"standard_error": null' in verdict.to_json()
    assert ruled_out([unsure, kept], rule, new="w0.3", old="fmt") is None
    passed = with_guards(judge([sample(0, 0, 500)], rule, new="w0.3", old="fmt"), [unsure, kept])
    assert passed.outcome == "pass" and [line.scope for line in passed.lines] == ["overall", "held-task"]
    assert passed.lines[0].reason.endswith(
        "; but undecided-task -0.4 (-2.4 to +1.6) against fmt, not sure whether worse by 1"
    )
    assert broken([lost, unsure, Guarded("fmt", "t", 50.0, 5, None)]) == {"w0.3"}
