"""The power of the tests and of the gate, known before the first question.

The answers of two models are reduced to independent *units*: each is a gain, a loss or a tie, with the discordance as
the probability of no tie. The outcomes (gains, losses) are drawn at evenly spaced quantiles of their binomial
distributions, and the rules of `significance` and `gate` decide each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from orchestrator.judging.betting import BETS, STAKES
from orchestrator.judging.estimates import at_most
from orchestrator.judging.gate import POWER, RULES, unseen_variance
from orchestrator.judging.samples import FloatArray
from orchestrator.judging.significance import anytime_multiplier

QUANTILES = 40
SPLITS = 5
MOST_GROWTH = 1e6


@dataclass(frozen=True, slots=True)
class Design:
    """The questions behind one score: `haystacks` of all tasks, and the independent `units` that they are worth.

    `largest` is the change of the score by one haystack of one cell. With one unit a haystack, a loss is a whole
    haystack. `discordance` is the share of units on which two models differ. Tasks share no haystacks, and `lengths` is
    the number of cells of a task.
    """

    haystacks: int
    units: float
    largest: float
    discordance: float
    tasks: int = 1
    lengths: int = 1

    def grown(self, times: float) -> Design:
        """So many times the haystacks."""
        return replace(
            self, haystacks=math.ceil(self.haystacks * times), units=self.units * times, largest=self.largest / times
        )

    @property
    def touched(self) -> float:
        """The lengths at which a haystack is gained or lost together: all of them if they answer alike."""
        return min(max(self.lengths * self.haystacks / self.units, 1.0), self.lengths)

    @property
    def groups(self) -> float:
        """The groups of cells that answer independently of each other."""
        return self.tasks * self.lengths / self.touched

    @property
    def of_a_task(self) -> float:
        """The haystacks of a task."""
        return max(2.0, self.haystacks / self.tasks)

    def freedom(self, moved: FloatArray) -> FloatArray:
        """Satterthwaite's degrees of freedom after so many gains and losses.

        A cell without any has no variance, so few gains and losses leave the freedom of few cells: the expected sum of
        their squared numbers in g groups is moved + moved · (moved − 1)/g.
        """
        of_one = self.touched * (self.of_a_task - 1)
        found = of_one * self.groups * moved / np.maximum(self.groups + moved - 1, 1)
        return np.where(moved > 0, np.minimum(found, self.haystacks - 1), self.haystacks - 1)

    def inflations(self) -> FloatArray:
        """The variance within cells, as multiples of the one around the common mean, equally likely [splits].

        Gains and losses fall into the g groups by chance. The part of the variance between the groups, of g − 1
        degrees of freedom, is not in that within cells, whose n haystacks have the factor n/(n − 1).
        """
        from scipy.special import chdtri

        of_cell, whole = self.of_a_task, self.groups * self.of_a_task
        within, common = of_cell / (of_cell - 1), whole / (whole - 1)
        free = max(1.0, self.groups - 1)
        between = chdtri(free, 1 - (np.arange(SPLITS) + 0.5) / SPLITS) / free
        return np.maximum(within - (within - common) * between / between.mean(), 0)


@dataclass(frozen=True, slots=True)
class _Outcomes:
    """Equally likely outcomes [outcomes]: units gained and lost, and what the rules make of them."""

    gained: FloatArray
    lost: FloatArray
    mean: FloatArray
    variance: FloatArray
    freedom: FloatArray
    whole: FloatArray

    @classmethod
    def of(cls, design: Design, difference: float) -> _Outcomes:
        """The outcomes if the true difference is this."""
        from scipy.special import bdtrik

        units, haystacks = max(2.0, round(design.units)), design.haystacks
        discordance = min(1.0, max(design.discordance, abs(difference), 1e-9))
        quantiles = (np.arange(QUANTILES) + 0.5) / QUANTILES

        def drawn(trials: FloatArray, chance: float) -> FloatArray:
            if chance > 1 - 1e-9:
                return trials + 0 * quantiles
            return np.clip(np.ceil(np.nan_to_num(bdtrik(quantiles, np.maximum(trials, 1), chance))), 0, trials)

        moved = drawn(np.array(units), discordance)[:, None]
        gained = drawn(moved, (discordance + difference) / 2 / discordance)
        moved, gained = (np.broadcast_to(part[..., None], (*gained.shape, SPLITS)).ravel() for part in (moved, gained))
        lost = moved - gained
        mean = (gained - lost) / units
        variance = np.maximum(moved / units - mean**2, 0) / units * np.tile(design.inflations(), QUANTILES**2)
        whole = np.minimum(lost, haystacks) if units <= haystacks else np.zeros_like(lost)
        return cls(gained, lost, mean, variance, design.freedom(moved), whole)

    def few_losses(self, haystacks: int, claimed: float, *, two_sided: bool = False) -> FloatArray:
        """P(at most so few lost haystacks) if the true mean is −claimed: `estimates.few_losses` for whole haystacks."""
        gain = (self.mean * haystacks + self.whole) / np.maximum(haystacks - self.whole, 1)
        chance = np.clip((gain + claimed) / np.maximum(gain + 1, 1e-12), 0, 1)
        return at_most(self.whole, haystacks, chance, two_sided=two_sided)


def power(design: Design, difference: float, alpha: float) -> float:
    """P(the two-sided test finds a true positive difference at alpha); see `significance.difference_test`."""
    from scipy.special import stdtr

    if design.haystacks < 2:
        return 0.0
    found = _Outcomes.of(design, difference)
    error = np.sqrt(found.variance + 2 * design.largest**2)
    rare = found.few_losses(design.haystacks, 0.0, two_sided=True)
    p = np.maximum(2 * stdtr(found.freedom, -found.mean / error), rare)
    return float(np.mean((found.mean > 0) & (p <= alpha)))


@cache
def smallest_difference(design: Design, alpha: float) -> float:
    """The smallest true difference (of 1) that is found with probability `POWER`; infinite if none is."""
    return _least(lambda difference: power(design, difference, alpha) >= POWER, 1e-5, 1.0)


def passing(design: Design, margin: float, alpha: float, planned: int | None) -> float:
    """P(a gate passes an equal model) at one look; `margin` is a share of 1, `planned` as in `GateRule`."""
    from scipy.special import stdtr

    haystacks = design.haystacks
    if haystacks < 2:
        return 0.0
    found = _Outcomes.of(design, 0.0)
    unseen = np.maximum(unseen_variance(found.mean, margin), margin * (1 - margin)) / haystacks
    statistic = (found.mean + margin) / np.sqrt(np.maximum(found.variance, unseen))
    rare = found.few_losses(haystacks, margin)
    if planned is None:
        return float(np.mean(np.maximum(stdtr(found.freedom, -statistic), rare) <= alpha))
    part = alpha / RULES
    bound = (statistic >= anytime_multiplier(haystacks, planned, part)) & (rare <= part)
    return float(np.mean(bound | (_log_capital(found, design, margin) >= -math.log(part))))


def _log_capital(found: _Outcomes, design: Design, margin: float) -> FloatArray:
    """That of the gate's bets, where a haystack's units move its difference by equal steps."""
    ratio = min(1.0, design.haystacks / design.units)
    step = max(ratio, math.sqrt(design.discordance * ratio))
    moved, net = (found.gained + found.lost) * ratio**2 / step**2, (found.gained - found.lost) * ratio / step
    odds = BETS[:, None] / (1 - margin)
    logs = (
        (moved + net) / 2 * np.log1p(odds * (margin + step))
        + (moved - net) / 2 * np.log1p(np.maximum(odds * (margin - step), 1e-9 - 1))
        + np.maximum(design.haystacks - moved, 0) * np.log1p(odds * margin)
    )
    return np.asarray(np.logaddexp.reduce(np.log(STAKES)[:, None] + logs), dtype=np.float64)


@cache
def growth_to_pass(design: Design, margin: float, alpha: float, *, anytime: bool) -> float:
    """How many times the haystacks a gate needs to pass an equal model with probability `POWER`."""
    planned = design.haystacks if anytime else None
    return _least(
        lambda times: passing(design.grown(times), margin, alpha, planned) >= POWER, 1 / design.haystacks, MOST_GROWTH
    )


def smallest_margin(design: Design, alpha: float, planned: int | None) -> float:
    """The smallest margin (a share of 1) at which the gate passes an equal model with probability `POWER`."""
    return _least(lambda margin: passing(design, margin, alpha, planned) >= POWER, 1e-4, 0.99)


def failing(design: Design, loss: float, margin: float, alpha: float) -> float:
    """P(one look of the gate finds "worse by more than the margin") if the model is worse by `loss`; shares of 1."""
    from scipy.special import stdtr

    haystacks = design.haystacks
    if haystacks < 2:
        return 0.0
    found = _Outcomes.of(design, loss)  # gains and losses exchanged
    unseen = np.maximum(unseen_variance(found.mean, -margin), margin * (1 - margin)) / haystacks
    statistic = (found.mean - margin) / np.sqrt(np.maximum(found.variance, unseen))
    p = np.maximum(stdtr(found.freedom, -statistic), found.few_losses(haystacks, -margin))
    return float(np.mean(p <= alpha))


@cache
def smallest_loss(design: Design, margin: float, alpha: float) -> float:
    """The smallest true loss (of 1) that is found worse than the margin with probability `POWER`; infinite if none."""
    return _least(lambda loss: failing(design, loss, margin, alpha) >= POWER, margin, 1.0)


def _least(holds: Callable[[float], bool], low: float, high: float) -> float:
    """The least value from low to high for which it holds, to half a percent; infinite if it does not hold for high."""
    if not holds(high):
        return math.inf
    while high > 1.005 * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
