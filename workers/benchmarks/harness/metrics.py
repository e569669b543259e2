"""The harness's metrics as scores between 0 and 1."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from lm_eval.api.task import Task


INVERSE = {"perplexity": "{}", "weighted_perplexity": "{}", "bits_per_byte": "byte_perplexity"}
"""Aggregations of log-likelihoods, and the perplexity that each comes to."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The harness's metrics for one item, after one of the task's filters."""

    number: int
    filter: str
    metrics: Mapping[str, Any]
    responses: Sequence[Any]


@dataclass(frozen=True, slots=True)
class Rule:
    """How a metric of one task becomes a score: its title, and the score of a value; or why it does not."""

    title: str
    score: Callable[[Any], float]
    remark: str = ""
    left_out: bool = False


def metric_rules(leaf: Task, samples: Sequence[Sample]) -> dict[str, Rule]:
    """How each metric becomes a score, decided by all of its values together, so that items stay paired."""
    values: defaultdict[str, list[Any]] = defaultdict(list)
    for sample in samples:
        for metric, value in sample.metrics.items():
            values[metric].append(value)
    return {metric: _rule(leaf, metric, found) for metric, found in values.items()}


def _rule(leaf: Task, metric: str, values: Sequence[Any]) -> Rule:
    own: Any = leaf
    aggregation = own.aggregation().get(metric)
    kind = getattr(aggregation, "__name__", "")
    if kind in INVERSE:
        return Rule(f"inverse_{INVERSE[kind].format(metric)}", _likelihood)
    if own.higher_is_better().get(metric) is False:
        return _left_out(metric, "less of it is better")
    of_one = _number if all(_number(value) is not None for value in values) else _alone(leaf, aggregation)
    numbers = [of_one(value) for value in values]
    known = [number for number in numbers if number is not None]
    if len(known) < len(numbers):
        return _left_out(metric, "a single item has none")
    if not all(0.0 <= number <= 100.0 for number in known):
        return _left_out(metric, "it is not from 0 to 1 or 100")
    if max(known, default=0.0) > 1.0:
        return Rule(metric, lambda value: (of_one(value) or 0.0) / 100, "runs to 100 and counts in hundredths")
    return Rule(metric, lambda value: of_one(value) or 0.0)


def _left_out(metric: str, why: str) -> Rule:
    return Rule(metric, lambda _: 0.0, f"is left out: {why}", left_out=True)


def _likelihood(value: Any) -> float:
    """exp(log-likelihood), or that of a word or byte where their number stands beside it."""
    total, count = value if isinstance(value, tuple | list) else (value, 1)
    return min(1.0, math.exp(float(total) / float(count))) if count and not math.isnan(total) else 0.0


def _number(value: Any) -> float | None:
    """A value that is a number by itself; one that is not a number is 0."""
    if isinstance(value, bool | int | float | np.number | np.bool_):
        return 0.0 if math.isnan(float(value)) else float(value)
    return None


def _alone(leaf: Task, aggregation: Any) -> Callable[[Any], float | None]:
    """The task's aggregation (such as BLEU) applied to one answer and its reference."""

    def of_one(value: Any) -> float | None:
        if aggregation is None or leaf.OUTPUT_TYPE != "generate_until":  # of choices there is F1 over the set alone
            return None
        try:
            return _number(aggregation([value]))
        except Exception:  # a task's own code, which need not know sets of one
            return None

    return of_one


def metric_remarks(rules: Mapping[str, Mapping[str, Rule]]) -> str:
    """The remarks on the metrics of all leaf tasks, each once."""
    found = [f"{metric} {rule.remark}" for each in rules.values() for metric, rule in each.items() if rule.remark]
    return "; ".join(dict.fromkeys(found))
