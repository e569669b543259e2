"""The gate: turns paired scores of a new and an old model into a verdict with one of three outcomes.

A test of non-inferiority with a margin. **pass**: the new model is significantly better than "worse by the margin".
**fail**: it is significantly worse than that. **inconclusive**: neither; the verdict gives the number of items needed.
"No significant difference" is not a pass.

A gate that may ask more items has two rules, each at half of alpha: bets (`betting`), which need few haystacks where
models agree, and a bound on the mean, which needs fewer where they differ often.

Beside scores, a gate may judge the tokens of output: the same tests, on tokens as shares of the most that a model may
write.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal
from xml.etree import ElementTree

import numpy as np
from numpy.typing import ArrayLike

from jobs.errors import BadInput
from orchestrator.judging.betting import Capital, Strata, capital, lower_bound, strata
from orchestrator.judging.estimates import Estimate, few_losses, macro_mean, macro_weights, pooled
from orchestrator.judging.samples import CellSample, FloatArray, normal_quantile, student_quantile, student_tail
from orchestrator.judging.significance import anytime_multiplier, anytime_p_value, holm
from orchestrator.judging.unanswered import DOUBTED, Unanswered

Outcome = Literal["pass", "fail", "inconclusive"]
EXIT_CODES: dict[Outcome, int] = {"pass": 0, "fail": 1, "inconclusive": 3}

RULES = 2
"""How many rules an anytime-valid gate has: each gets its part of alpha."""

TOKENS = "output_tokens"
"""The line about tokens of output."""

POWER = 0.8  # the probability that `items_needed` items reach a verdict, if the observed difference is the true one


@dataclass(frozen=True, slots=True)
class GateRule:
    """The rule of a gate. Margins are in points of a score from 0 to 100.

    `margin` is the smallest loss of the macro score that fails. `length_margin` is the same at each length, None to
    judge the macro score alone. `alpha` is the probability of a wrong pass, and of a wrong fail. `planned_haystacks`
    makes the gate anytime-valid: verdicts stay valid if items are added and judged repeatedly, and the bound on the
    mean is tightest near that many haystacks (over all cells). None means that the number of items is fixed in advance.
    `verdicts` is the number of verdicts of which one fail fails all: a fail needs alpha divided by it, a pass does not.
    `output_tokens` is the most tokens of output, as a multiple of the old model's; None judges scores alone.
    """

    margin: float = 1.0
    length_margin: float | None = None
    alpha: float = 0.05
    planned_haystacks: int | None = None
    verdicts: int = 1
    output_tokens: float | None = None

    def __post_init__(self) -> None:
        for name, margin in (("margin", self.margin), ("length_margin", self.length_margin)):
            if margin is not None and not 0 < margin < 100:
                raise BadInput(f"gate.{name}: {margin} points; give a number between 0 and 100, such as 1.0")
        if not 0 < self.alpha < 0.5:
            raise BadInput(f"gate.alpha: {self.alpha}; give a probability between 0 and 0.5, such as 0.05")
        if self.planned_haystacks is not None and self.planned_haystacks < 1:
            raise BadInput(f"gate.planned_haystacks: {self.planned_haystacks}; give a positive number")


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens of output per question of two models on the same items.

    `new` and `old` are macro means. `samples` are the differences `most` × old − new as shares of `range`, the largest
    difference that the limits of the questions allow.
    """

    samples: Sequence[CellSample]
    new: float
    old: float
    most: float
    range: float


@dataclass(frozen=True, slots=True)
class VerdictLine:
    """The judgement of one score, "overall" or of one length. All scores in points, new − old.

    The line "output_tokens" is in tokens per question, new − limit × old, with the limit of the rule and a margin of 0.
    `low` and `high` are one-sided bounds at the rule's alpha each. `p_pass` tests "worse by the margin or more";
    `p_fail` tests "not worse than the margin", adjusted by Holm over the lines, and for the rule's `verdicts`.
    """

    scope: str
    outcome: Outcome
    difference: float
    low: float
    high: float
    standard_error: float
    margin: float
    p_pass: float
    p_fail: float
    items: int
    haystacks: int
    items_needed: int | None
    reason: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """The verdict of a gate: one line for the macro score and one for each length, with reasons.

    `items_needed` is the largest total of items that an inconclusive line needs; None if every line is decided or if
    the difference is too close to the margin for any number of items.
    """

    outcome: Outcome
    new: str
    old: str
    rule: GateRule
    lines: tuple[VerdictLine, ...]
    items_needed: int | None

    @property
    def exit_code(self) -> int:
        """0 pass, 1 fail, 3 inconclusive."""
        return EXIT_CODES[self.outcome]

    def to_json(self) -> str:
        """The verdict as one JSON object; missing bounds are null."""
        document = asdict(self) | {"exit_code": self.exit_code}
        return json.dumps(_without_infinities(document), indent=2, allow_nan=False)

    def to_junit_xml(self) -> str:
        """The verdict as a JUnit suite, one case per line; inconclusive is an error, not a pass."""
        outcomes = [line.outcome for line in self.lines]
        suite = ElementTree.Element(
            "testsuite",
            name=f"mergeyard gate: {self.new} against {self.old}",
            tests=str(len(outcomes)),
            failures=str(outcomes.count("fail")),
            errors=str(outcomes.count("inconclusive")),
        )
        for line in self.lines:
            case = ElementTree.SubElement(suite, "testcase", classname=f"gate.{self.new}", name=line.scope)
            if line.outcome == "pass":
                ElementTree.SubElement(case, "system-out").text = line.reason
            else:
                tag = "failure" if line.outcome == "fail" else "error"
                ElementTree.SubElement(case, tag, type=line.outcome, message=line.reason)
        return ElementTree.tostring(suite, encoding="unicode", xml_declaration=True)


def doubted(verdict: Verdict, new: Unanswered, old: Unanswered) -> Verdict:
    """The verdict with the questions that the two models did not answer.

    Above `DOUBTED` of them, the reason of the first line says so. Above `REFUSED`, no line passes; a line that fails
    still does, as a model that gives no answers is not as good.
    """
    sides = [(verdict.new, new), (verdict.old, old)]
    told = "; ".join(found.words(name) for name, found in sides if found.share > DOUBTED)
    if not told:
        return verdict
    first, *others = verdict.lines
    lines = (replace(first, reason=f"{first.reason}; but {told}"), *others)
    if not (new.refused or old.refused):
        return replace(verdict, lines=lines)
    lines = tuple(replace(line, outcome="inconclusive") if line.outcome == "pass" else line for line in lines)
    return replace(verdict, outcome=joint_outcome(line.outcome for line in lines), lines=lines)


def same_merge(rule: GateRule, *, new: str, old: str) -> Verdict:
    """The verdict on a model that is its own baseline, unasked: a pass, unless it must write fewer tokens."""
    reason = "overall: the same merge as the baseline"
    line = VerdictLine("overall", "pass", 0.0, 0.0, 0.0, 0.0, rule.margin, 0.0, 1.0, 0, 0, None, reason)
    if rule.output_tokens is None or rule.output_tokens >= 1:
        return Verdict("pass", new, old, rule, (line,), None)
    reason = f"{TOKENS}: as many as the baseline's; more than {rule.output_tokens:g} times as many"
    more = VerdictLine(TOKENS, "fail", 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0, 0, None, reason)
    return Verdict("fail", new, old, rule, (line, more), None)


def judge(
    samples: Sequence[CellSample],
    rule: GateRule | None = None,
    *,
    new: str = "new",
    old: str = "old",
    tokens: Tokens | None = None,
) -> Verdict:
    """The verdict on paired differences new − old, one `CellSample` per cell (see `samples.paired_sample`).

    `tokens` adds a line about tokens of output.

    Passes if every line passes, each at alpha. A wrong pass then needs an error in the line that is worse, so its
    probability is at most alpha without correction (intersection-union, Berger 1982). Fails if any line fails after
    Holm's correction over the lines (1979), so that the probability of a wrong fail is at most alpha too.
    """
    if not samples:
        raise BadInput(f"gate: {new} and {old} have no items in common; evaluate both on the same benchmark and seed")
    rule = rule or GateRule()
    bets = rule.planned_haystacks is not None
    scopes = [_Scope.of("overall", samples, rule.margin, bets=bets)]
    if rule.length_margin is not None:
        for length in sorted({sample.cell.length for sample in samples}):
            at_length = [sample for sample in samples if sample.cell.length == length]
            scopes.append(_Scope.of(str(length), at_length, rule.length_margin, bets=bets))
    if tokens is not None:
        scopes.append(replace(_Scope.of(TOKENS, tokens.samples, 0.0, bets=bets), tokens=tokens))
    alone = [scope.p_value(rule, worse=True) for scope in scopes]
    lines = tuple(
        _judge_scope(
            scope, rule, float(min(1.0, rule.verdicts * p)), rule.verdicts * sum(other >= own for other in alone)
        )
        for scope, p, own in zip(scopes, holm(alone).tolist(), alone, strict=True)
    )
    needed = [line.items_needed for line in lines if line.outcome == "inconclusive"]
    return Verdict(joint_outcome(line.outcome for line in lines), new, old, rule, lines, _largest(needed))


@dataclass(frozen=True, slots=True)
class _Scope:
    """One score under judgement: its estimate (0 to 1), its margin, and the inputs of its two tests.

    A small sample may hide a model that gains a little on most haystacks and loses a few completely: its observed
    spread is too small. So each test of the mean uses at least the spread that its null hypothesis implies
    (`unseen_variance`). `rare` is P(at most the observed number of losses) under that hypothesis. The bets need
    neither; `strata` are the haystacks that they bet on, None if no bet is possible. The estimate of `tokens` is larger
    where the new model writes fewer.
    """

    name: str
    estimate: Estimate
    margin: float
    errors: Mapping[bool, float]
    rare: Mapping[bool, float]
    strata: Strata | None
    tokens: Tokens | None = None

    @classmethod
    def of(cls, name: str, samples: Sequence[CellSample], margin: float, *, bets: bool) -> _Scope:
        share = margin / 100
        estimate = macro_mean(samples)
        weights = macro_weights([sample.cell for sample in samples])
        parts = strata(samples, weights) if bets else None
        if not any(sample.losable for sample in samples):
            seen = dict.fromkeys((False, True), estimate.standard_error)
            return cls(name, estimate, share, seen, dict.fromkeys(seen, 0.0), parts)
        haystacks = pooled(samples, weights)
        errors: dict[bool, float] = {}
        rare: dict[bool, float] = {}
        for worse, sign in ((False, 1.0), (True, -1.0)):
            variance = max(float(unseen_variance(sign * estimate.mean, sign * share)), share * (1 - share))
            errors[worse] = max(estimate.standard_error, math.sqrt(variance * haystacks.spread))
            rare[worse] = few_losses(replace(haystacks, means=sign * haystacks.means), sign * share)
        return cls(name, estimate, share, errors, rare, parts)

    @property
    def unit(self) -> float:
        """Shares of 1 in the unit of the line: points, or tokens, which are better where they are fewer."""
        return 100.0 if self.tokens is None else -self.tokens.range

    @property
    def standard_error(self) -> float:
        """The larger standard error of the two tests."""
        return max(self.errors.values())

    def p_value(self, rule: GateRule, *, worse: bool) -> float:
        """One-sided p value of "not worse than the margin" if `worse`, else of "worse by the margin or more"."""
        error = max(self.errors[worse], 1e-12)  # likelihoods that all differ alike have no spread
        if math.isinf(error):
            return 1.0
        statistic = (self.estimate.mean + self.margin) / error * (-1 if worse else 1)
        if rule.planned_haystacks is None:
            return max(student_tail(statistic, self.estimate.degrees_of_freedom), self.rare[worse])
        found = anytime_p_value(statistic, self.estimate.clusters, rule.planned_haystacks)
        bets = self.bets(worse=worse)
        return min(1.0, RULES * min(max(found, self.rare[worse]), 1.0 if bets is None else bets.p_value))

    def bets(self, *, worse: bool) -> Capital | None:
        """The capital of the bets against "not worse than the margin" if `worse`, else "worse by that or more"."""
        if self.strata is None:
            return None
        return capital(self.strata.negated(), self.margin) if worse else capital(self.strata, -self.margin)

    def bounds(self, rule: GateRule) -> tuple[float, float]:
        """One-sided bounds at the rule's alpha each; no tighter than the margin while a test is open."""
        anytime = rule.planned_haystacks is not None
        alpha = rule.alpha / RULES if anytime else rule.alpha
        factor = self.multiplier(rule, self.estimate.clusters)
        low = self.estimate.mean - factor * self.errors[False]
        high = self.estimate.mean + factor * self.errors[True]
        if self.rare[False] > alpha:
            low = min(low, -self.margin)
        if self.rare[True] > alpha:
            high = max(high, -self.margin)
        if math.isinf(factor * self.standard_error):
            return low, high
        low, high = max(-1.0, low), min(1.0, high)
        if self.strata is not None:
            low = lower_bound(self.strata, alpha, low)
            high = -lower_bound(self.strata.negated(), alpha, -high)
        return low, high

    def multiplier(self, rule: GateRule, clusters: float, tests: int = 1) -> float:
        """Standard errors from the mean to a one-sided bound at alpha / `tests`, with `clusters` clusters."""
        alpha = rule.alpha / tests
        if rule.planned_haystacks is not None:
            return anytime_multiplier(math.ceil(clusters), rule.planned_haystacks, alpha / RULES)
        return student_quantile(1 - alpha, self.estimate.degrees_of_freedom)


def unseen_variance(mean: ArrayLike, claimed: float) -> FloatArray:
    """The least variance of a model that is worse by `claimed` but looks better by `mean` on the observed items.

    It loses a whole haystack with probability q, not yet observed, and gains a constant g: (1 − q)g − q = −claimed. Its
    variance is q(1 − q)(1 + g)². Without this variance, 24 % of models on the margin passed at 5 %, if they gain 0.05
    on most of 24 haystacks and lose a few completely.
    """
    gain = np.maximum(mean, max(0.0, -claimed))
    chance = (gain + claimed) / (1 + gain)
    return np.asarray(chance * (1 - chance) * (1 + gain) ** 2, dtype=np.float64)


def _judge_scope(scope: _Scope, rule: GateRule, p_fail: float, tests: int) -> VerdictLine:
    """The line of one score; a fail needs alpha divided by `tests`."""
    estimate = scope.estimate
    p_pass = scope.p_value(rule, worse=False)
    outcome: Outcome = "pass" if p_pass <= rule.alpha else "fail" if p_fail <= rule.alpha else "inconclusive"
    low, high = sorted(scope.unit * bound for bound in scope.bounds(rule))
    needed = _items_needed(scope, rule, tests) if outcome == "inconclusive" else None
    return VerdictLine(
        scope=scope.name,
        outcome=outcome,
        difference=scope.unit * estimate.mean,
        low=low,
        high=high,
        standard_error=abs(scope.unit) * scope.standard_error,
        margin=abs(scope.unit) * scope.margin,
        p_pass=p_pass,
        p_fail=p_fail,
        items=estimate.items,
        haystacks=estimate.clusters,
        items_needed=needed,
        reason=(_reason if scope.tokens is None else _reason_of_tokens)(scope, outcome, low, high, needed),
    )


def _items_needed(scope: _Scope, rule: GateRule, tests: int) -> int | None:
    """The total of items with which the observed difference, if true, reaches a verdict with probability `POWER`.

    A fail needs alpha divided by `tests`. The error of a test may be the one that rare losses imply, but the mean
    varies by the observed one. P(so few losses) falls by the same factor with each haystack. None if the difference is
    within a hundredth of a point of the margin, or if there is no standard error yet.
    """
    distance = abs(scope.estimate.mean + scope.margin)
    if distance < 1e-4 or math.isinf(scope.standard_error):
        return None
    worse = scope.estimate.mean < -scope.margin
    tests = tests if worse else 1
    alpha = rule.alpha / tests / (1 if rule.planned_haystacks is None else RULES)
    least = math.log(alpha) / math.log(scope.rare[worse]) if 0 < scope.rare[worse] < 1 else 1.0
    varies = normal_quantile(POWER) * scope.estimate.standard_error
    growth = 1.0
    for _ in range(50):  # the anytime multiplier grows with the logarithm of the items, so this converges quickly
        away = scope.multiplier(rule, scope.estimate.clusters * growth, tests) * scope.errors[worse] + varies
        growth = max(1.0, least, (away / distance) ** 2)
    bets = scope.bets(worse=worse)
    if bets is not None:
        growth = max(1.0, min(growth, bets.growth_needed(alpha, POWER)))
    return max(scope.estimate.items + 1, math.ceil(scope.estimate.items * growth - 1e-9))


def _reason(scope: _Scope, outcome: Outcome, low: float, high: float, needed: int | None) -> str:
    margin, estimate = 100 * scope.margin, scope.estimate
    found = (
        f"{scope.name}: {100 * estimate.mean:+.2f} points ({low:+.2f} to {high:+.2f}) "
        f"on {estimate.items} items in {estimate.clusters} haystacks"
    )
    if outcome == "pass":
        regressed = ", regressed but within the margin" if high < 0 else ""
        return f"{found}; not worse by {margin:g} or more{regressed}"
    if outcome == "fail":
        return f"{found}; worse by more than {margin:g}"
    remedy = f"about {needed} items would decide" if needed else "too close to the margin for any number of items"
    if high < -margin:
        return f"{found}; worse by more than {margin:g} alone, but not for sure among so many comparisons, {remedy}"
    if math.isinf(scope.standard_error):
        remedy = "one haystack shows no spread; evaluate more"
    return f"{found}; cannot tell whether worse by {margin:g}, {remedy}"


def _reason_of_tokens(scope: _Scope, outcome: Outcome, low: float, high: float, needed: int | None) -> str:
    tokens, estimate = scope.tokens, scope.estimate
    assert tokens is not None
    times = f", {tokens.new / tokens.old:.2f} times" if tokens.old else ""
    found = (
        f"{scope.name}: {tokens.new:.1f} per question against {tokens.old:.1f}{times}"
        f" (new - {tokens.most:g} × old: {low:+.1f} to {high:+.1f})"
        f" on {estimate.items} items in {estimate.clusters} haystacks"
    )
    if outcome == "pass":
        return f"{found}; fewer than {tokens.most:g} times as many"
    if outcome == "fail":
        return f"{found}; more than {tokens.most:g} times as many"
    remedy = f"about {needed} items would decide" if needed else "too close for any number of items"
    if math.isinf(scope.standard_error):
        remedy = "one haystack shows no spread; evaluate more"
    return f"{found}; cannot tell whether more than {tokens.most:g} times as many, {remedy}"


def joint_outcome(outcomes: Iterable[Outcome]) -> Outcome:
    """One fail fails; all have to pass."""
    found = set(outcomes)
    if "fail" in found:
        return "fail"
    return "inconclusive" if "inconclusive" in found else "pass"


def _largest(needed: Sequence[int | None]) -> int | None:
    known = [items for items in needed if items is not None]
    return max(known) if known and len(known) == len(needed) else None


def _without_infinities(value: object) -> object:
    if isinstance(value, dict):
        return {str(key): _without_infinities(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_without_infinities(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
