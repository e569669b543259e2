"""What RULER makes of scores by length: weighted averages and the effective context length, with its uncertainty.

A score at a length is the unweighted mean over tasks, from 0 to 100. The published threshold 85.6 is what
Llama-2-7B-chat scores at 4K (Hsieh et al. 2024); a threshold relative to a parent follows NoLiMa (Modarressi et al.
2025), which asks for 85 % of the score at short lengths.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput

RULER_THRESHOLD = 85.6
RELATIVE_SHARE = 0.85


def weighted_average(scores: Mapping[int, float], *, increasing: bool) -> float:
    """RULER's wAvg: the n lengths weigh 1 … n, the longest most if `increasing`, else the shortest."""
    ordered = [scores[length] for length in sorted(scores, reverse=not increasing)]
    weights = range(1, len(ordered) + 1)
    return sum(weight * score for weight, score in zip(weights, ordered, strict=True)) / sum(weights)


def effective_length(scores: Mapping[int, float], threshold: float = RULER_THRESHOLD) -> int:
    """The largest length up to which every score reaches the threshold; 0 if the shortest does not."""
    effective = 0
    for length in sorted(scores):
        if scores[length] < threshold:
            break
        effective = length
    return effective


def relative_threshold(parent: Mapping[int, float]) -> float:
    """What a merge has to score so as not to fall below 85 % of its parent at the parent's shortest length."""
    return RELATIVE_SHARE * parent[min(parent)]


class Outcome(NamedTuple):
    """One item's result: the task and length it belongs to, its cluster, and its score from 0 to 1."""

    task: str
    length: int
    haystack: str
    score: float


@dataclass(frozen=True, slots=True)
class EffectiveLength:
    """An effective length with the bounds of its confidence interval; `chance[L]` is P[effective length ≥ L]."""

    length: int
    low: int
    high: int
    chance: Mapping[int, float]


def score_by_length(outcomes: Iterable[Outcome]) -> dict[int, float]:
    """The unweighted mean over tasks at each length, from 0 to 100."""
    cells: dict[tuple[int, str], list[float]] = {}
    for outcome in outcomes:
        cells.setdefault((outcome.length, outcome.task), []).append(outcome.score)
    tasks: dict[int, list[float]] = {}
    for (length, _), scores in cells.items():
        tasks.setdefault(length, []).append(sum(scores) / len(scores))
    return {length: 100 * sum(means) / len(means) for length, means in sorted(tasks.items())}


def effective_length_interval(
    outcomes: Sequence[Outcome],
    threshold: float = RULER_THRESHOLD,
    *,
    seed: int,
    replicates: int = 2000,
    confidence: float = 0.95,
) -> EffectiveLength:
    """The effective length, its percentile interval, and the chance of each length, from a cluster bootstrap.

    In every task whole haystacks are drawn with replacement, with all their items at all lengths: items on one
    haystack are not independent, and neither is an item at 4K of its pair at 8K.
    """
    lengths, scores = _replicated(tuple(outcomes), seed, replicates)
    reached = scores >= threshold - 1e-9
    return _interval(effective_length(score_by_length(outcomes), threshold), lengths, reached, confidence)


def relative_length_interval(
    outcomes: Sequence[Outcome],
    parent: Sequence[Outcome],
    *,
    seed: int,
    replicates: int = 2000,
    confidence: float = 0.95,
) -> EffectiveLength | None:
    """The same with the threshold that `relative_threshold` takes from a parent, which is drawn along.

    The parent's answers on the same haystacks alone count, so that a draw strikes both alike; None where it has none.
    """
    asked = {(outcome.task, outcome.length, outcome.haystack) for outcome in outcomes}
    answered = [outcome for outcome in parent if (outcome.task, outcome.length, outcome.haystack) in asked]
    if not answered:
        return None
    lengths, scores = _replicated(tuple(outcomes), seed, replicates)
    _, of_parent = _replicated(tuple(answered), seed, replicates)
    thresholds = RELATIVE_SHARE * of_parent[:, :1]  # the first column is the shortest length
    length = effective_length(score_by_length(outcomes), relative_threshold(score_by_length(answered)))
    return _interval(length, lengths, scores >= thresholds - 1e-9, confidence)


def _interval(length: int, lengths: list[int], reached: NDArray[np.bool_], confidence: float) -> EffectiveLength:
    """Of replicates × lengths that reached their threshold or not."""
    effective = np.concatenate([[0], lengths])[np.cumprod(reached, axis=1).sum(axis=1)]
    tail = (1 - confidence) / 2
    low, high = np.quantile(effective, [tail, 1 - tail], method="inverted_cdf")
    chance = {reach: float(np.mean(effective >= reach)) for reach in lengths}
    return EffectiveLength(length, low=int(low), high=int(high), chance=chance)


@lru_cache(maxsize=8)  # a point is held against every parent, and a parent against every point
def _replicated(outcomes: tuple[Outcome, ...], seed: int, replicates: int) -> tuple[list[int], NDArray[np.float64]]:
    """The lengths, and of each bootstrap replicate the score at each, from 0 to 100: replicates × lengths."""
    if not outcomes:
        raise BadInput("effective length: there are no scores; evaluate at least one item")
    lengths = sorted({outcome.length for outcome in outcomes})
    by_task: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_task.setdefault(outcome.task, []).append(outcome)
    cells = [_by_cluster(by_task[task], lengths) for task in sorted(by_task)]
    total = np.zeros((replicates, len(lengths)))
    tasks_at = np.zeros(len(lengths))
    for (sums, counts), times in zip(
        cells, _draws(seed, replicates, tuple(len(sums) for sums, _ in cells)), strict=True
    ):
        here = counts.sum(axis=0)
        plain = sums.sum(axis=0) / np.maximum(here, 1)
        drawn = times @ counts
        total += np.where(drawn > 0, times @ sums / np.maximum(drawn, 1), plain)
        tasks_at += here > 0
    return lengths, 100 * total / tasks_at


@lru_cache(maxsize=2)  # the points of a grid answer the same haystacks, and drawing takes nine tenths of the time
def _draws(seed: int, replicates: int, clusters: tuple[int, ...]) -> list[NDArray[np.int64]]:
    """How often each replicate draws each haystack, of each task: replicates × clusters."""
    key = hashlib.sha256(f"effective length {seed}".encode()).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(key[:16], "big")))
    return [generator.multinomial(count, np.full(count, 1 / count), size=replicates) for count in clusters]


def _by_cluster(outcomes: Sequence[Outcome], lengths: Sequence[int]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sums of scores and numbers of items, clusters × lengths."""
    cluster = {name: number for number, name in enumerate(sorted({outcome.haystack for outcome in outcomes}))}
    column = {length: number for number, length in enumerate(lengths)}
    sums, counts = np.zeros((len(cluster), len(lengths))), np.zeros((len(cluster), len(lengths)))
    for outcome in outcomes:
        sums[cluster[outcome.haystack], column[outcome.length]] += outcome.score
        counts[cluster[outcome.haystack], column[outcome.length]] += 1
    return sums, counts
