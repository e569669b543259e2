"""Do the intervals cover, and do the tests and gates err, as often as they say? Simulated, with what is true known.

    python -m tests.benchmarks.statistics_simulation --trials 2000

Each line is one interval, test or gate in one regime: how often it erred (an interval missed the truth, a test
rejected a true null, a gate gave a wrong verdict) and how often it may. `above` is an error rate that the nominal one
explains in fewer than one of a thousand simulations; `few` is less than a fifth of the nominal one: valid, but not
sharp. A line that is above and has a note is known to be, for the reason that the note gives.

Differences of right-or-wrong scores are +1, −1 or 0; fractional ones are those of five parts right or wrong. With ρ, a
question takes its haystack's answer with probability √ρ, which makes two questions on one haystack correlate by ρ.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import erfinv
from scipy.stats import binom

from orchestrator.judging.betting import Strata, capital
from orchestrator.judging.effective_length import effective_length, effective_length_interval, relative_length_interval
from orchestrator.judging.estimates import macro_difference, macro_mean, macro_score
from orchestrator.judging.gate import GateRule, Tokens, joint_outcome, judge
from orchestrator.judging.samples import CellSample, cell_sample
from orchestrator.judging.significance import (
    anytime_multiplier,
    benjamini_hochberg,
    difference_test,
    flip_rate,
    holm,
    mcnemar,
    mcnemar_interval,
    paired_test,
    sign_flip_test,
    wilson_interval,
)
from orchestrator.judging.simultaneous import simultaneous

Random = np.random.Generator
Floats = NDArray[np.float64]
Draw = Callable[[Random], tuple[Floats, NDArray[np.intp]]]
"""Paired differences and their haystacks."""

LEVEL = 0.05
FEW_DIFFER = "an interval from the spread that was seen is none where few items differ; macro_difference is one there"
FEW_DRAWS = 999  # sign patterns a test: it holds its level with any number of them


@dataclass(frozen=True)
class Case:
    """One world. `errs` simulates it once and says for each of its `lines`, a kind and a subject, if it was an error.

    `note` says why a rate above the nominal one is known.
    """

    lines: tuple[tuple[str, str], ...]
    regime: str
    errs: Callable[[Random], Sequence[bool]]
    nominal: float = LEVEL
    note: str = ""

    @property
    def names(self) -> list[str]:
        return [f"{kind} {what}: {self.regime}" for kind, what in self.lines]


def alone(
    kind: str, what: str, regime: str, errs: Callable[[Random], bool], nominal: float = LEVEL, note: str = ""
) -> Case:
    """A world of one line."""
    return Case(((kind, what),), regime, lambda random: (errs(random),), nominal, note)


def both_verdicts(what: str, regime: str, outcomes: Callable[[Random], set[str]]) -> Case:
    """A gate whose every verdict is wrong: `outcomes` are those of all of its looks."""
    lines = (("gate", f"wrong pass{what}"), ("gate", f"wrong fail{what}"))

    def errs(random: Random) -> Sequence[bool]:
        found = outcomes(random)
        return "pass" in found, "fail" in found

    return Case(lines, regime, errs)


@dataclass(frozen=True)
class Result:
    """How one line went: the share of errors, and what it says about the nominal rate."""

    kind: str
    what: str
    regime: str
    trials: int
    errors: int
    rate: float
    nominal: float
    verdict: str
    seconds: float
    note: str


# ---- what is drawn


@dataclass(frozen=True)
class Regime:
    """Paired differences of a known mean: the values and their chances, and how many questions share a haystack."""

    name: str
    values: tuple[float, ...]
    chances: tuple[float, ...]
    haystacks: int
    questions: int = 1
    correlation: float = 0.0

    @property
    def mean(self) -> float:
        return float(np.dot(self.values, self.chances))

    def draw(self, random: Random) -> tuple[Floats, NDArray[np.intp]]:
        shape = (self.haystacks, self.questions)
        own = random.choice(self.values, size=shape, p=self.chances)
        common = random.choice(self.values, size=(self.haystacks, 1), p=self.chances)
        takes = random.random(shape) < np.sqrt(self.correlation)
        drawn = np.where(takes, common, own).ravel()
        return drawn, np.repeat(np.arange(self.haystacks), self.questions)

    def sample(self, random: Random, length: int = 4096) -> CellSample:
        values, haystacks = self.draw(random)
        return cell_sample("task", length, values, length * 10_000 + haystacks)


def right_or_wrong(items: int, gain: float, loss: float, **clusters: float) -> Regime:
    shared = "" if not clusters else f", 8 a haystack, ρ {clusters['correlation']:g}"
    return Regime(
        f"n {items}, +{gain:g} −{loss:g}{shared}",
        (1.0, -1.0, 0.0),
        (gain, loss, 1 - gain - loss),
        haystacks=items // 8 if clusters else items,
        questions=8 if clusters else 1,
        correlation=clusters.get("correlation", 0.0),
    )


def fractional(items: int, better: float, worse: float, **clusters: float) -> Regime:
    """Of five parts, each is right with chance `better` in one model and `worse` in the other."""
    parts = np.arange(6)
    joint = np.outer(binom.pmf(parts, 5, better), binom.pmf(parts, 5, worse))
    values = [(high - low) / 5 for high in parts for low in parts]
    chances = joint.ravel() / joint.sum()
    shared = "" if not clusters else f", 8 a haystack, ρ {clusters['correlation']:g}"
    return Regime(
        f"n {items}, fifths {better:g} {worse:g}{shared}",
        tuple(float(value) for value in values),
        tuple(chances.tolist()),
        haystacks=items // 8 if clusters else items,
        questions=8 if clusters else 1,
        correlation=clusters.get("correlation", 0.0),
    )


ALIKE = right_or_wrong(24, 0.0, 0.0)
SHARED = [
    right_or_wrong(items, gain, loss, correlation=rho)
    for items in (96, 480)
    for gain, loss in ((0.05, 0.05), (0.0, 0.02))
    for rho in (0.1, 0.3)
]
ALONE = [
    right_or_wrong(items, gain, loss)
    for items in (8, 24, 100, 500)
    for gain, loss in ((0.05, 0.05), (0.3, 0.3), (0.1, 0.2), (0.0, 0.02))
]
FRACTIONAL = [
    *(fractional(items, 0.8, 0.8) for items in (8, 24, 100)),
    *(fractional(items, 0.98, 0.98) for items in (8, 24, 100)),
    *(fractional(items, 0.98, 0.9) for items in (24, 100)),
    fractional(480, 0.8, 0.8, correlation=0.3),
    fractional(480, 0.98, 0.98, correlation=0.1),
]


def skewed(items: int, gain: float, truth: float = 0.0) -> Regime:
    """Gains a little on most haystacks and loses few of them whole; better by `truth` on the mean."""
    lost = (gain - truth) / (1 + gain)
    return Regime(f"n {items}, +{gain:g} on most, few lost whole", (gain, -1.0), (1 - lost, lost), items)


def nearly_skewed(items: int) -> Regime:
    """Small losses beside the rare ones: what is seen of losses is small."""
    lost = (0.8 * 0.05 - 0.1 * 0.01) / (1 + 0.05)
    return Regime(
        f"n {items}, +0.05 or −0.01, few lost whole", (0.05, -0.01, 0.0, -1.0), (0.8 - lost, 0.1, 0.1, lost), items
    )


def at_all_lengths(random: Random, regime: Regime, lengths: int = 6) -> list[CellSample]:
    """The same haystacks at several lengths, each won or lost at all of them."""
    values, haystacks = regime.draw(random)
    return [cell_sample("task", 1024 << step, values, haystacks) for step in range(lengths)]


SKEWED = [skewed(items, gain) for items in (8, 24, 100, 500) for gain in (0.01, 0.05, 0.2)]
SKEWED += [nearly_skewed(items) for items in (8, 24, 100)]


def nulls(regimes: Sequence[Regime]) -> list[Regime]:
    """Those without a difference."""
    return [regime for regime in regimes if abs(regime.mean) < 1e-12]


# ---- intervals


def misses(low: float, high: float, truth: float) -> bool:
    return not low - 1e-12 <= truth <= high + 1e-12


def proportions() -> Iterator[Case]:
    def wilson(trials: int, rate: float | None) -> Callable[[Random], bool]:
        def errs(random: Random) -> bool:
            truth = random.random() if rate is None else rate
            return misses(*wilson_interval(int(random.binomial(trials, truth)), trials), truth)

        return errs

    dips = "Wilson's interval is nominal over all rates, not at each: it dips where the rate is near 0 or 1"
    for trials in (10, 24, 100):
        yield alone("interval", "wilson", f"n {trials}, any rate", wilson(trials, None))
        for rate in (0.5, 0.9, 0.98, 1.0):
            yield alone("interval", "wilson", f"n {trials}, rate {rate:g}", wilson(trials, rate), note=dips)
    for flips in (0.001, 0.02):

        def noise(random: Random, flips: float = flips) -> bool:
            again = (random.random(100) < flips).astype(float)
            found = flip_rate(np.zeros(100), again)
            return misses(found.low, found.high, flips)

        yield alone("interval", "flip rate", f"n 100, rate {flips:g}", noise, note=dips)


def differences() -> Iterator[Case]:
    few = FEW_DIFFER
    for regime in [ALIKE, *ALONE]:

        def bonett_price(random: Random, regime: Regime = regime) -> bool:
            values, _ = regime.draw(random)
            low, high = mcnemar_interval(int(np.sum(values > 0)), int(np.sum(values < 0)), values.size)
            return misses(low, high, regime.mean)

        yield alone("interval", "mcnemar", regime.name, bonett_price)
    for regime in [ALIKE, *ALONE, *FRACTIONAL, *SHARED]:

        def student(random: Random, regime: Regime = regime) -> bool:
            estimate = macro_mean([regime.sample(random)])
            return misses(estimate.low, estimate.high, regime.mean)

        def careful(random: Random, regime: Regime = regime) -> bool:
            estimate = macro_difference([regime.sample(random)])
            return misses(estimate.low, estimate.high, regime.mean)

        yield alone("interval", "macro mean", regime.name, student, note=few)
        yield alone("interval", "macro difference", regime.name, careful)


def macro_scores() -> Iterator[Case]:
    """Six cells of different regimes, as tasks and lengths are."""
    few = FEW_DIFFER
    regimes = {
        "6 cells of 24": [right_or_wrong(24, gain, loss) for gain, loss in ((0.2, 0.1), (0.05, 0.05), (0.0, 0.1)) * 2],
        "6 cells of 24, most alike": [*[right_or_wrong(24, 0.0, 0.0)] * 5, right_or_wrong(24, 0.0, 0.1)],
        "6 cells of 100": [
            right_or_wrong(100, gain, loss) for gain, loss in ((0.2, 0.1), (0.05, 0.05), (0.0, 0.1)) * 2
        ],
        "6 cells of 96, 8 a haystack, ρ 0.3": [
            right_or_wrong(96, gain, loss, correlation=0.3) for gain, loss in ((0.2, 0.1), (0.05, 0.05), (0.0, 0.1)) * 2
        ],
    }
    for name, cells in regimes.items():
        truth = sum(regime.mean for regime in cells) / len(cells)

        def drawn(random: Random, cells: Sequence[Regime] = cells) -> list[CellSample]:
            return [regime.sample(random, 1024 * (number + 1)) for number, regime in enumerate(cells)]

        def plain(random: Random, drawn: Callable[[Random], list[CellSample]] = drawn, truth: float = truth) -> bool:
            estimate = macro_mean(drawn(random))
            return misses(estimate.low, estimate.high, truth)

        def careful(random: Random, drawn: Callable[[Random], list[CellSample]] = drawn, truth: float = truth) -> bool:
            estimate = macro_difference(drawn(random))
            return misses(estimate.low, estimate.high, truth)

        yield alone("interval", "macro mean", name, plain, note=few if "24" in name or "haystack" in name else "")
        yield alone("interval", "macro difference", name, careful)


def scored(items: int, rate: float, **clusters: float) -> Regime:
    """Answers of one model, right with a chance of `rate`."""
    shared = "" if not clusters else f", 8 a haystack, ρ {clusters['correlation']:g}"
    return Regime(
        f"n {items}, right {rate:g}{shared}",
        (1.0, 0.0),
        (rate, 1 - rate),
        haystacks=items // 8 if clusters else items,
        questions=8 if clusters else 1,
        correlation=clusters.get("correlation", 0.0),
    )


def scores() -> Iterator[Case]:
    """The score on the leaderboard and the points of its curves."""
    dips = (
        "Student's interval of a share is too short near 0 and 1, where most samples of so few have one error or none"
    )
    regimes = {
        regime.name: [regime]
        for regime in (
            *(scored(items, rate) for items in (8, 24, 100) for rate in (0.5, 0.9, 0.98, 1.0)),
            *(scored(480, rate, correlation=0.3) for rate in (0.5, 0.9)),
        )
    }
    regimes["6 cells of 24, right 1 … 0.2"] = [scored(24, rate) for rate in (1.0, 0.98, 0.95, 0.9, 0.6, 0.2)]
    for name, cells in regimes.items():
        truth = sum(regime.mean for regime in cells) / len(cells)

        def errs(random: Random, cells: Sequence[Regime] = cells, truth: float = truth) -> bool:
            found = macro_score([regime.sample(random, 1024 * (at + 1)) for at, regime in enumerate(cells)])
            return misses(found.low, found.high, truth)

        yield alone("interval", "macro score", name, errs, note=dips)


def effective_lengths() -> Iterator[Case]:
    """Six lengths; where scores fall by little, the truth is the last length that is still at the threshold."""
    falls = {
        "falls by little": (0.95, 0.93, 0.90, 0.87, 0.83, 0.80),
        "at the threshold all along": (0.856,) * 6,
        "just below it at last": (0.95, 0.95, 0.95, 0.856, 0.85, 0.84),
    }
    for name, rates in falls.items():
        truth = effective_length({1024 << step: 100 * rate for step, rate in enumerate(rates)})
        bar = 0.85 * rates[0]
        by_parent = effective_length({1024 << step: rate for step, rate in enumerate(rates)}, bar)
        for items, correlation in ((24, None), (100, None), (480, 0.3)):
            shared = {} if correlation is None else {"correlation": correlation}
            lengths = [(1024 << step, scored(items, rate, **shared)) for step, rate in enumerate(rates)]

            def absolute(random: Random, lengths: Sequence[tuple[int, Regime]] = lengths, truth: int = truth) -> bool:
                found = effective_length_interval([regime.sample(random, length) for length, regime in lengths])
                return misses(found.low, found.high, truth)

            def relative(
                random: Random, lengths: Sequence[tuple[int, Regime]] = lengths, truth: int = by_parent
            ) -> bool:
                cells = [regime.sample(random, length) for length, regime in lengths]
                parent = [lengths[0][1].sample(random, 1024)]
                found = relative_length_interval(cells, parent)
                assert found is not None
                return misses(found.low, found.high, truth)

            about = f"{name}, {lengths[0][1].name.partition(', right')[0]}{f', ρ {correlation}' if shared else ''}"
            yield alone("interval", "effective length", about, absolute)
            yield alone("interval", "effective length by parent", about, relative)


# ---- tests


def single_tests() -> Iterator[Case]:
    for regime in [ALIKE, *nulls(ALONE)]:

        def exact(random: Random, regime: Regime = regime) -> bool:
            values, _ = regime.draw(random)
            return mcnemar(int(np.sum(values > 0)), int(np.sum(values < 0))).two_sided <= LEVEL

        yield alone("test", "mcnemar", regime.name, exact)
    for regime in [ALIKE, *nulls(ALONE), *nulls(FRACTIONAL), *nulls(SHARED), *SKEWED]:

        def tested(random: Random, regime: Regime = regime) -> Sequence[bool]:
            sample = regime.sample(random)
            estimate = macro_difference([sample])
            p = sign_flip_test(sample.values, sample.haystacks, draws=FEW_DRAWS, seed=int(random.integers(2**32)))
            return max(p, estimate.least_p) <= LEVEL, difference_test(estimate) <= LEVEL

        yield Case((("test", "sign flips"), ("test", "macro difference")), regime.name, tested)


def opposite_cells() -> Iterator[Case]:
    """No difference over all, but large ones in opposite directions."""
    for items in (24, 100):
        cells = [right_or_wrong(items, 0.3, 0.1), right_or_wrong(items, 0.1, 0.3)] * 3

        def errs(random: Random, cells: Sequence[Regime] = cells) -> bool:
            samples = [regime.sample(random, 1024 * (number + 1)) for number, regime in enumerate(cells)]
            return difference_test(macro_difference(samples)) <= LEVEL

        yield alone("test", "macro difference", f"6 opposite cells of {items}", errs)


def shared_lengths() -> Iterator[Case]:
    """A haystack is the same at all lengths, and so is what a model makes of it."""
    for regime in (*(skewed(items, 0.05) for items in (10, 24, 100)), right_or_wrong(24, 0.2, 0.2)):

        def errs(random: Random, regime: Regime = regime) -> bool:
            return difference_test(macro_difference(at_all_lengths(random, regime))) <= LEVEL

        yield alone("test", "macro difference", f"6 lengths of the same: {regime.name}", errs)
    for margin, regime in (
        (1.0, skewed(50, 0.05, -0.01)),
        (10.0, skewed(24, 0.05, -0.1)),
        (10.0, right_or_wrong(24, 0.1, 0.2)),
    ):

        def judged(random: Random, regime: Regime = regime, margin: float = margin) -> set[str]:
            return {judge(at_all_lengths(random, regime), GateRule(margin=margin)).outcome}

        yield both_verdicts("", f"margin {margin:g}, 6 lengths of the same: {regime.name}", judged)


def many_tests() -> Iterator[Case]:
    null = right_or_wrong(100, 0.1, 0.1)

    def exact(random: Random) -> float:
        values, _ = null.draw(random)
        return mcnemar(int(np.sum(values > 0)), int(np.sum(values < 0))).two_sided

    def any_of_twelve(random: Random) -> bool:
        return bool(holm([exact(random) for _ in range(12)]).min() <= LEVEL)

    def any_discovery(random: Random) -> bool:
        return bool(benjamini_hochberg([exact(random) for _ in range(12)]).min() <= LEVEL)

    yield alone("test", "holm, any", "12 cells of 100", any_of_twelve)
    yield alone("test", "benjamini-hochberg, any", "12 cells of 100", any_discovery)


def grids() -> Iterator[Case]:
    """Ten points against a parent, and the best of eleven against its rivals: all equal, or with one that is better."""
    worlds = {
        "10 points, 3 lengths of 36": (10, (0.9, 0.8, 0.6), 36, 1, 0.8),
        "10 points, 3 lengths of 36, alike but for few": (10, (1.0, 0.99, 0.3), 36, 1, 0.95),
        "20 points, 3 lengths of 100": (20, (0.9, 0.8, 0.6), 100, 1, 0.8),
        "10 points, 3 lengths of 8 haystacks of 8": (10, (0.9, 0.8, 0.6), 8, 8, 0.6),
    }
    for name, (points, rates, haystacks, questions, alike) in worlds.items():

        def drawn(random: Random, shape: Any = (points, rates, haystacks, questions, alike)) -> Floats:
            """Scores [points + 1, lengths, items]; a point takes the common answer with the chance `alike`."""
            points, rates, haystacks, questions, alike = shape
            common = random.random((1, 1, haystacks, 1)) * np.ones((1, len(rates), 1, questions))
            own = random.random((points + 1, len(rates), haystacks, questions))
            takes = random.random(own.shape) < alike
            right = np.where(takes, common, own) < np.array(rates)[:, None, None]
            return right.reshape(points + 1, len(rates), -1).astype(float)

        def against(scores: Floats, new: int, old: int, questions: int = questions) -> list[CellSample]:
            items = scores.shape[2]
            labels = np.arange(items) // questions
            return [
                cell_sample("task", 1024 << at, scores[new, at] - scores[old, at], labels)
                for at in range(scores.shape[1])
            ]

        def against_one(
            random: Random, drawn: Any = drawn, against: Any = against, points: int = points
        ) -> Sequence[bool]:
            scores = drawn(random)
            leader = 1 + int(np.argmax(scores[1:].mean(axis=(1, 2))))
            tested = simultaneous({str(new): against(scores, new, 0) for new in range(1, points + 1)}, draws=FEW_DRAWS)
            found = tested[str(leader)].estimate
            any_sure = any(max(found.p, found.rare) <= LEVEL for found in tested.values())
            return any_sure, misses(found.low, found.high, 0.0)

        def wrongly_best(random: Random, drawn: Any = drawn, against: Any = against) -> bool:
            scores = drawn(random)
            order = np.argsort(-scores.mean(axis=(1, 2)), kind="stable").tolist()
            tested = (paired_test(against(scores, order[0], rival)) for rival in order[1:])
            return all(max(found.p, found.rare) <= LEVEL for found in tested)

        lines = (("test", "any of many against one"), ("interval", "leader of many against one"))
        yield Case(lines, name, against_one)
        yield alone("test", "best of many", name, wrongly_best)
    yield from _deciding_cells()


def _deciding_cells() -> Iterator[Case]:
    """One cell of right and wrong answers decides, at one of three lengths: McNemar's test."""
    for items, differ in ((36, 0.3), (36, 0.1), (100, 0.1)):

        def exact(random: Random, items: int = items, differ: float = differ) -> bool:
            values = right_or_wrong(items, differ / 2, differ / 2).draw(random)[0]
            found = paired_test(_three_lengths(np.zeros(items), values))
            return max(found.p, found.rare) <= LEVEL

        yield alone("test", "one cell decides", f"n {items}, {differ:g} differ", exact)

        def lost(random: Random, items: int = items, differ: float = differ) -> bool:
            gains = (random.random(items) < differ).astype(float)
            gone = random.random(items) < differ / (3 + differ)
            found = paired_test(_three_lengths(-gone.astype(float), np.where(gone, -1.0, gains)))
            return max(found.p, found.rare) <= LEVEL

        yield alone("test", "one cell decides", f"n {items}, +{differ:g} at one length, few lost at all three", lost)


def _three_lengths(others: Floats, last: Floats) -> list[CellSample]:
    labels = np.arange(last.size)
    return [cell_sample("task", 1024 << at, values, labels) for at, values in enumerate((others, others, last))]


def looking_again() -> Iterator[Case]:
    def bound(random: Random) -> bool:
        counts = np.arange(1, 601)
        paths = np.cumsum(random.standard_normal(600)) / np.sqrt(counts)
        return bool(np.any(paths > BOUNDS))

    yield alone("test", "anytime bound", "600 haystacks, every look", bound)


BOUNDS = np.array([anytime_multiplier(count, 300, LEVEL) for count in range(1, 601)])


# ---- gates: the truth lies on the margin, so that every verdict is wrong


def gates() -> Iterator[Case]:
    at_margin = {
        1.0: [
            right_or_wrong(100, 0.0, 0.01),
            right_or_wrong(500, 0.0, 0.01),
            right_or_wrong(500, 0.05, 0.06),
            right_or_wrong(480, 0.05, 0.06, correlation=0.1),
            right_or_wrong(480, 0.05, 0.06, correlation=0.3),
            right_or_wrong(2000, 0.0, 0.01, correlation=0.3),
        ],
        10.0: [
            right_or_wrong(8, 0.1, 0.2),
            right_or_wrong(24, 0.0, 0.1),
            right_or_wrong(24, 0.2, 0.3),
            right_or_wrong(96, 0.1, 0.2, correlation=0.1),
            right_or_wrong(96, 0.1, 0.2, correlation=0.3),
            right_or_wrong(96, 0.0, 0.1, correlation=0.3),
            fractional(24, 0.8, 0.9),
            fractional(100, 0.8, 0.9),
        ],
    }
    for margin in at_margin:
        at_margin[margin] += [skewed(items, gain, -margin / 100) for items in (24, 100, 500) for gain in (0.01, 0.05)]
    for margin, regimes in at_margin.items():
        for regime in regimes:

            def judged(random: Random, regime: Regime = regime, margin: float = margin) -> set[str]:
                return {judge([regime.sample(random)], GateRule(margin=margin)).outcome}

            yield both_verdicts("", f"margin {margin:g}: {regime.name}", judged)
    yield from _gates_over_lengths()
    yield from _gates_looked_at_again()
    yield from _gates_of_several_tasks()


def _gates_over_lengths() -> Iterator[Case]:
    lengths = (4096, 8192, 16384, 32768, 65536, 131072)
    bad, fine = right_or_wrong(200, 0.05, 0.1), right_or_wrong(200, 0.0, 0.0)
    rule = GateRule(margin=5.0, length_margin=5.0)

    def passes(random: Random) -> bool:
        samples = [fine.sample(random, length) for length in lengths[:-1]]
        return judge([*samples, bad.sample(random, lengths[-1])], rule).outcome == "pass"

    def fails(random: Random) -> bool:
        return judge([bad.sample(random, length) for length in lengths], rule).outcome == "fail"

    yield alone("gate", "wrong pass", "margin 5 at each of 6 lengths, one at it", passes)
    yield alone("gate", "wrong fail", "margin 5 at each of 6 lengths, all at it", fails)


def _gates_looked_at_again() -> Iterator[Case]:
    """Ten looks, the plan being the first: how `mergeyard gate` does it."""
    regimes = [
        (5.0, right_or_wrong(1000, 0.05, 0.1)),
        (1.0, right_or_wrong(2000, 0.0, 0.01)),
        (5.0, right_or_wrong(1600, 0.05, 0.1, correlation=0.3)),
        (10.0, fractional(1000, 0.8, 0.9)),
        (1.0, skewed(1000, 0.05, -0.01)),
        (5.0, skewed(400, 0.05, -0.05)),
    ]
    for margin, regime in regimes:

        def judged(random: Random, regime: Regime = regime, margin: float = margin) -> set[str]:
            values, haystacks = regime.draw(random)
            step = regime.haystacks // 10 * regime.questions
            rule = GateRule(margin=margin, planned_haystacks=max(1, regime.haystacks // 10))
            looks = (slice(0, step * look) for look in range(1, 11))
            return {judge([cell_sample("task", 4096, values[seen], haystacks[seen])], rule).outcome for seen in looks}

        yield both_verdicts(", 10 looks", f"margin {margin:g}: {regime.name}", judged)


def _gates_of_several_tasks() -> Iterator[Case]:
    """Four tasks at three lengths on the same haystacks, looked at up to four times the first items; one is worse."""
    worse, fine = skewed(96, 0.05, -0.2), right_or_wrong(96, 0.0, 0.0)
    flips, alike = right_or_wrong(96, 0.1, 0.3), right_or_wrong(96, 0.1, 0.1)
    for name, bad, others in (("few lost whole in one", worse, fine), ("more lost in one", flips, alike)):

        def judged(random: Random, bad: Regime = bad, others: Regime = others) -> set[str]:
            drawn = [regime.draw(random)[0] for regime in (bad, others, others, others)]
            rule = GateRule(margin=5.0, planned_haystacks=96)
            looks = (
                [
                    cell_sample(str(task), length, values[:seen], 1000 * task + np.arange(seen))
                    for task, values in enumerate(drawn)
                    for length in (1024, 2048, 4096)
                ]
                for seen in (24, 48, 96)
            )
            return {judge(samples, rule).outcome for samples in looks}

        yield both_verdicts(", 3 looks", f"margin 5: 4 tasks of 96, {name}", judged)


LIMIT = 4128
"""A thought of 4,096 tokens and an answer of 32."""
WRITTEN = np.minimum(600 * np.exp(0.6 * np.sqrt(2) * erfinv(np.linspace(-0.99, 0.99, 40))), LIMIT).round()
"""Tokens of a model that thinks: a lognormal distribution up to the limit, every value equally likely."""


def gates_of_tokens() -> Iterator[Case]:
    """The new model writes exactly 0.8 times the tokens of the old one, on the mean: both verdicts are wrong."""
    mean = float(WRITTEN.mean())

    def runs_on(saved: float, random: Random, items: int) -> tuple[Floats, Floats]:
        old, short = random.choice(WRITTEN, items), 1 - saved
        chance = (0.8 - short) * mean / (LIMIT - short * mean)
        return np.where(random.random(items) < chance, LIMIT, short * old), old

    def old_runs_on(random: Random, items: int) -> tuple[Floats, Floats]:
        usual = random.choice(WRITTEN, items)
        chance = 0.25 * mean / (LIMIT - mean)  # the mean of the old one is then 1.25 times the usual
        return usual, np.where(random.random(items) < chance, LIMIT, usual)

    def varies(random: Random, items: int) -> tuple[Floats, Floats]:
        old = random.choice(WRITTEN, items)
        return old * random.choice((0.4, 1.2), items), old

    worlds: dict[str, Callable[[Random, int], tuple[Floats, Floats]]] = {
        "half the tokens, some to the limit": partial(runs_on, 0.5),
        "a quarter less, few to the limit": partial(runs_on, 0.25),
        "the old one sometimes to the limit": old_runs_on,
        "0.4 or 1.2 times": varies,
    }
    designs = [(name, items, 1) for name in worlds for items in (100, 500)]
    for name, items, looks in (*designs, *((name, 100, 3) for name in [*worlds][:2])):

        def judged(random: Random, name: str = name, items: int = items, looks: int = looks) -> set[str]:
            new, old = worlds[name](random, items * looks)
            rule = GateRule(planned_haystacks=items if looks > 1 else None, output_tokens=0.8)
            found: set[str] = set()
            for seen in range(items, items * looks + 1, items):
                samples = [cell_sample("task", 4096, (0.8 * old - new)[:seen] / LIMIT)]
                found.add(judge(samples, rule, tokens=Tokens(samples, 1.0, 1.0, 0.8, LIMIT)).lines[-1].outcome)
            return found

        yield both_verdicts(" of tokens" + (f", {looks} looks" if looks > 1 else ""), f"n {items}, {name}", judged)


def nights() -> Iterator[Case]:
    """A night's two verdicts: against the blessed merge at the margin, against the anchor at twice the margin."""
    worse, worst, alike = (right_or_wrong(200, 0.05, loss) for loss in (0.1, 0.15, 0.05))
    for outcome, name, by_blessed, by_anchor in (
        ("pass", "at the margin of the blessed merge", worse, alike),
        ("pass", "as good as the blessed merge, at twice the margin of the anchor", alike, worst),
        ("fail", "at both margins", worse, worst),
    ):

        def errs(
            random: Random, outcome: str = outcome, by_blessed: Regime = by_blessed, by_anchor: Regime = by_anchor
        ) -> bool:
            found = [
                judge([regime.sample(random)], GateRule(margin=margin, verdicts=2)).outcome
                for regime, margin in ((by_blessed, 5.0), (by_anchor, 10.0))
            ]
            return joint_outcome(found) == outcome

        yield alone("gate", f"wrong {outcome} of a night", f"margin 5, n 200: {name}", errs)


def bets() -> Iterator[Case]:
    """The bets alone at twenty looks, the mean on the margin: their level is exact whatever the differences are."""
    regimes = [
        (0.01, right_or_wrong(1000, 0.0, 0.01)),
        (0.05, right_or_wrong(200, 0.0, 0.05)),
        (0.05, right_or_wrong(1000, 0.05, 0.1)),
        (0.1, fractional(500, 0.8, 0.9)),
        *((margin, skewed(items, 0.05, -margin)) for margin in (0.01, 0.1) for items in (40, 200, 1000)),
    ]
    for margin, regime in regimes:
        for side in ("pass", "fail"):

            def errs(random: Random, regime: Regime = regime, margin: float = margin, side: str = side) -> bool:
                values, _ = regime.draw(random)
                step = regime.haystacks // 20
                for seen in range(step, regime.haystacks + 1, step):
                    differences, counts = np.unique(values[:seen], return_counts=True)
                    found = Strata(differences[None], counts[None].astype(float), np.ones(1))
                    of, mean = (found, -margin) if side == "pass" else (found.negated(), margin)
                    if capital(of, mean).p_value <= LEVEL:
                        return True
                return False

            yield alone("bets", f"wrong {side}, 20 looks", f"margin {100 * margin:g}: {regime.name}", errs)


# ---- all of it


def cases() -> list[Case]:
    """Everything that is simulated."""
    makers = (
        proportions,
        differences,
        macro_scores,
        scores,
        effective_lengths,
        single_tests,
        opposite_cells,
        shared_lengths,
        many_tests,
        grids,
        looking_again,
        gates,
        gates_of_tokens,
        nights,
        bets,
    )
    return [case for make in makers for case in make()]


def simulate(case: Case, trials: int, seed: int) -> list[Result]:
    """The case, so many times, a result a line; every case has random numbers of its own."""
    key = np.random.SeedSequence([seed, zlib.crc32(case.names[0].encode())])
    random = np.random.Generator(np.random.Philox(key))
    started = time.perf_counter()
    drawn = [case.errs(random) for _ in range(trials)]
    seconds = round(time.perf_counter() - started, 2)
    found: list[Result] = []
    for (kind, what), outcomes in zip(case.lines, zip(*drawn, strict=True), strict=True):
        errors = sum(outcomes)
        rate, verdict = errors / trials, verdict_on(errors, trials, case.nominal)
        found.append(Result(kind, what, case.regime, trials, errors, rate, case.nominal, verdict, seconds, case.note))
    return found


def verdict_on(errors: int, trials: int, nominal: float) -> str:
    """`above` where the nominal rate explains so many errors in fewer than one of a thousand simulations."""
    if binom.sf(errors - 1, trials, nominal) < 1e-3:
        return "above"
    return "few" if errors < nominal * trials / 5 else "as stated"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=2000, help="simulations a line")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="lines with this text in their name")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    started = time.perf_counter()
    results: list[Result] = []
    if not arguments.json:
        print(f"{'':<9} {'':<25} {'regime':<62} {'errors':>7} {'nominal':>7}")
    for case in cases():
        if not any(arguments.only in name for name in case.names):
            continue
        found = simulate(case, arguments.trials, arguments.seed)
        results += found
        for result in () if arguments.json else found:
            verdict = result.verdict + (" (known)" if result.verdict == "above" and result.note else "")
            print(
                f"{result.kind:<9} {result.what:<25} {result.regime:<62} {result.rate:>7.1%} {result.nominal:>7.0%}"
                f"  {verdict}",
                flush=True,
            )
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        for note in dict.fromkeys(result.note for result in results if result.verdict == "above" and result.note):
            print(f"known: {note}")
        print(f"{arguments.trials} simulations a line, {time.perf_counter() - started:.0f} s")
    return int(any(result.verdict == "above" and not result.note for result in results))


if __name__ == "__main__":
    sys.exit(main())
