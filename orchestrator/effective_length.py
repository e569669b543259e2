"""What RULER makes of scores by length: weighted averages and the effective context length, with its uncertainty.

A score at a length is the unweighted mean over tasks. The published threshold of 85.6 points is what Llama-2-7B-chat
scores at 4K (Hsieh et al. 2024); a threshold relative to a parent follows NoLiMa (Modarressi et al. 2025), which asks
for 85 % of the score at short lengths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.errors import BadInput
from orchestrator.statistics import (
    Cell,
    CellSample,
    FloatArray,
    macro_mean,
    macro_weights,
    normal_quantile,
    weighted_score,
)

RULER_THRESHOLD = 85.6
RELATIVE_SHARE = 0.85


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
    return _reached({length: score - threshold for length, score in scores.items()})


@dataclass(frozen=True, slots=True)
class EffectiveLength:
    """An effective length with the bounds of its confidence interval, and the longest length that was asked."""

    length: int
    low: int
    high: int
    asked: int


def effective_length_interval(
    samples: Sequence[CellSample], threshold: float = RULER_THRESHOLD, confidence: float = 0.95
) -> EffectiveLength:
    """The effective length of one model's scores, and its interval.

    `low` is the effective length of the lower bounds of the scores at each length, `high` that of the upper bounds. A
    lower bound holds against the spread of scores at the threshold as well (Wilson 1927): few wrong answers show little
    of it. To
    be too long, `low` has to be wrong at the one length at which the model falls short; to be too short, `high` has to
    be wrong at any before, for which its error is shared among the lengths (Bonferroni).
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
    """The same with 85 % of the parent's score at its shortest length for a threshold, as uncertain as that score.

    The parent's answers on the same haystacks alone count: a hard one is hard for both. None where it has none.
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
    """Of a weighted sum of cells at each length, that has to reach the threshold, a score or zero."""
    shared = 1 - (1 - confidence) / len(parts)
    lows = {length: weighted_score(*part, confidence) for length, part in parts.items()}
    highs = {length: weighted_score(*part, shared) for length, part in parts.items()}
    away = normal_quantile((1 + confidence) / 2) * math.sqrt(threshold * (1 - threshold))
    at_threshold = {length: away * math.sqrt(_spread(*part)) for length, part in parts.items()}
    return EffectiveLength(
        length=_reached({length: found.mean - threshold for length, found in lows.items()}),
        low=_reached(
            {length: min(found.low, found.mean - at_threshold[length]) - threshold for length, found in lows.items()}
        ),
        high=_reached({length: found.high - threshold for length, found in highs.items()}),
        asked=max(parts),
    )


def _spread(samples: Sequence[CellSample], weights: FloatArray) -> float:
    """By what the variance of one haystack becomes that of the sum, cells being independent."""
    clusters = [np.unique(sample.haystacks).size for sample in samples]
    return float(sum(weight**2 / count for weight, count in zip(weights.tolist(), clusters, strict=True)))


def _reached(spare: Mapping[int, float]) -> int:
    """The largest length up to which nothing is to spare below zero, but for rounding."""
    effective = 0
    for length in sorted(spare):
        if spare[length] < -1e-9:
            break
        effective = length
    return effective


def _on_haystacks(sample: CellSample, haystacks: set[str]) -> CellSample | None:
    kept = np.isin(sample.haystacks, [*haystacks])
    if not kept.any():
        return None
    return CellSample(Cell(*sample.cell), sample.values[kept], sample.haystacks[kept])


def _by_length(samples: Sequence[CellSample]) -> dict[int, list[CellSample]]:
    """The cells of each length, shortest first."""
    found: dict[int, list[CellSample]] = {}
    for sample in sorted(samples, key=lambda sample: sample.cell.length):
        found.setdefault(sample.cell.length, []).append(sample)
    return found
