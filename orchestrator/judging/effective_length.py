"""RULER's summary of scores by length: weighted averages, and the effective context length with its uncertainty.

A score at a length is the unweighted mean over tasks. The published threshold of 85.6 points is the score of
Llama-2-7B-chat at 4K (Hsieh et al. 2024). A threshold relative to a parent follows NoLiMa (Modarressi et al. 2025),
which requires 85 % of the score at short lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jobs.errors import BadInput
from orchestrator.judging.estimates import Estimate, macro_mean, macro_weights, pooled, weighted_score
from orchestrator.judging.samples import CellSample, FloatArray, normal_quantile, student_quantile

RULER_THRESHOLD = 85.6
RELATIVE_SHARE = 0.85

ROUNDING = 1e-9


def weighted_average(scores: Mapping[int, float], *, increasing: bool) -> float:
    """RULER's wAvg: the n lengths weigh 1 … n, the longest most if `increasing`, else the shortest."""
    ordered = [scores[length] for length in sorted(scores, reverse=not increasing)]
    weights = range(1, len(ordered) + 1)
    return sum(weight * score for weight, score in zip(weights, ordered, strict=True)) / sum(weights)


def score_by_length(samples: Sequence[CellSample]) -> dict[int, float]:
    """The unweighted mean over tasks at each length, from 0 to 100."""
    return {length: 100 * macro_mean(found).mean for length, found in _by_length(samples).items()}


def effective_length(scores: Mapping[int, float], threshold: float = RULER_THRESHOLD) -> int:
    """The largest length up to which every score reaches the threshold; 0 if the shortest does not."""
    effective = 0
    for length in sorted(scores):
        if scores[length] < threshold - ROUNDING:
            break
        effective = length
    return effective


@dataclass(frozen=True, slots=True)
class EffectiveLength:
    """An effective length with the bounds of its confidence interval, and the longest evaluated length."""

    length: int
    low: int
    high: int
    asked: int


def effective_length_interval(
    samples: Sequence[CellSample], threshold: float = RULER_THRESHOLD, confidence: float = 0.95
) -> EffectiveLength:
    """The effective length of one model's scores, and its interval.

    `low` is the effective length of the lower bounds of the scores at each length, `high` that of the upper bounds. A
    lower bound also uses the spread of scores at the threshold (Wilson 1927), because few wrong answers show little
    spread. `low` is too long only if it is wrong at the one length at which the model falls short. `high` is too short
    if it is wrong at any length before, so its error is split over the lengths (Bonferroni).
    """
    if not samples:
        raise BadInput("effective length: there are no scores; evaluate at least one item")
    cells = _by_length(samples)
    weights = {length: macro_weights([sample.cell for sample in found]) for length, found in cells.items()}
    parts = {length: (found, weights[length]) for length, found in cells.items()}
    return _interval(parts, threshold / 100, confidence)


def relative_length_interval(
    samples: Sequence[CellSample], parent: Sequence[CellSample], confidence: float = 0.95
) -> EffectiveLength | None:
    """The same, with 85 % of the parent's score at its shortest length as the threshold, including its uncertainty.

    Uses the parent's answers on the same haystacks only, as a hard haystack is hard for both. None if there are none.
    """
    asked = {sample.cell: set(sample.haystacks.tolist()) for sample in samples}
    answered = [
        found for sample in parent if (found := _on_haystacks(sample, asked.get(sample.cell, set()))) is not None
    ]
    if not answered:
        return None
    shortest = next(iter(_by_length(answered).values()))
    bar = -RELATIVE_SHARE * macro_weights([sample.cell for sample in shortest])
    parts = {
        length: ([*found, *shortest], np.concatenate([macro_weights([sample.cell for sample in found]), bar]))
        for length, found in _by_length(samples).items()
    }
    return _interval(parts, 0.0, confidence)


def _interval(
    parts: Mapping[int, tuple[Sequence[CellSample], FloatArray]], threshold: float, confidence: float
) -> EffectiveLength:
    """The interval for weighted sums of cells, one per length, that must reach `threshold` (a score, or zero)."""
    scores = {length: weighted_score(*part, confidence) for length, part in parts.items()}
    shared = 1 - (1 - confidence) / len(parts) / 2
    away = normal_quantile((1 + confidence) / 2) * math.sqrt(threshold * (1 - threshold))
    at_threshold = {length: away * math.sqrt(pooled(*part).spread) for length, part in parts.items()}
    lows = {length: min(found.low, found.mean - at_threshold[length]) for length, found in scores.items()}
    return EffectiveLength(
        length=effective_length({length: found.mean for length, found in scores.items()}, threshold),
        low=effective_length(lows, threshold),
        high=effective_length({length: _upper(found, shared) for length, found in scores.items()}, threshold),
        asked=max(parts),
    )


def _upper(found: Estimate, probability: float) -> float:
    return found.mean + student_quantile(probability, found.degrees_of_freedom) * found.standard_error


def _on_haystacks(sample: CellSample, haystacks: set[str]) -> CellSample | None:
    kept = np.isin(sample.haystacks, [*haystacks])
    if not kept.any():
        return None
    return replace(sample, values=sample.values[kept], haystacks=sample.haystacks[kept])


def _by_length(samples: Sequence[CellSample]) -> dict[int, list[CellSample]]:
    """The cells of each length, shortest first."""
    found: dict[int, list[CellSample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.cell.length):
        found.setdefault(sample.cell.length, []).append(sample)
    return found
