"""Paired scores of one cell, and the quantiles and tails of the distributions behind every test."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from jobs.errors import CorruptData
from jobs.evaluation_tasks import ScoreRow

FloatArray = NDArray[np.float64]
Labels = NDArray[Any]


class Cell(NamedTuple):
    """One task of a benchmark at one context length in tokens; `weight` is that of the benchmark in the macro score."""

    task: str
    length: int
    benchmark: str = ""
    weight: float = 1.0


def cell_of(row: ScoreRow) -> Cell:
    """The cell of an answer."""
    return Cell(row.task, row.length, row.benchmark, row.weight)


@dataclass(frozen=True, slots=True, eq=False)
class CellSample:
    """One value for each item of a cell (a score, or a paired difference of scores) and the haystack it came from.

    `values` and `haystacks` are of shape [items]. A haystack label that occurs in several cells means the same
    haystack there, and the cells are then treated as dependent. Where a score may be 0 or 1, an answer can be lost
    whole; likelihoods never are, and not `losable`. The benchmark says which: a sample may have no lost answer by luck.
    """

    cell: Cell
    values: FloatArray
    haystacks: Labels
    losable: bool = True


def cell_sample(
    task: str,
    length: int,
    values: ArrayLike,
    haystacks: Sequence[Any] | Labels | None = None,
    *,
    benchmark: str = "",
    weight: float = 1.0,
) -> CellSample:
    """A checked `CellSample`; without `haystacks` every item is a haystack of its own.

    Raises `CorruptData` for an empty cell, a value that is not finite or lies outside [−1, 1], or labels that do not
    match the items one to one.
    """
    array = np.asarray(values, dtype=np.float64)
    place = f"{task} at {length}"
    if array.ndim != 1 or array.size == 0:
        raise CorruptData(f"{place}: scores of shape {array.shape}, expected one a item; evaluate the cell again")
    if not np.all(np.abs(array) <= 1):
        raise CorruptData(f"{place}: a score is missing or outside its range; evaluate the cell again")
    if haystacks is None:
        labels = np.array([f"{task}/{length}/{item}" for item in range(array.size)])
    else:
        labels = np.asarray(haystacks)
    if labels.shape != array.shape:
        raise CorruptData(f"{place}: {array.size} scores but {labels.size} haystacks; evaluate the cell again")
    return CellSample(Cell(task, length, benchmark, weight), array, labels)


def paired_sample(
    task: str,
    length: int,
    new: ArrayLike,
    old: ArrayLike,
    haystacks: Sequence[Any] | Labels | None = None,
    *,
    losable: bool = True,
    benchmark: str = "",
    weight: float = 1.0,
) -> CellSample:
    """Differences new − old of two models' scores on the same items, in the same order, as a `CellSample`."""
    new_scores, old_scores = np.asarray(new, dtype=np.float64), np.asarray(old, dtype=np.float64)
    if new_scores.shape != old_scores.shape:
        raise CorruptData(
            f"{task} at {length}: {new_scores.size} scores against {old_scores.size}; compare the items both answered"
        )
    sample = cell_sample(task, length, new_scores - old_scores, haystacks, benchmark=benchmark, weight=weight)
    return replace(sample, losable=losable)


def cluster_sums(values: FloatArray, labels: Labels) -> tuple[Labels, FloatArray, FloatArray]:
    """Cluster names in order, the sum of their values, their sizes: each of shape [clusters]."""
    names, index = _clusters(labels.dtype.str, labels.tobytes()) if _is_kept(labels) else _found(labels)
    sums = np.asarray(np.bincount(index, weights=values), dtype=np.float64)
    return names, sums, np.asarray(np.bincount(index), dtype=np.float64)


KEPT_LABELS, KEPT_BYTES = 512, 1 << 16
"""A report of many points asks some thousand times for the clusters of each cell: those of so many are kept."""


def _is_kept(labels: Labels) -> bool:
    return labels.nbytes <= KEPT_BYTES and not labels.dtype.hasobject


@lru_cache(maxsize=KEPT_LABELS)
def _clusters(dtype: str, labels: bytes) -> tuple[Labels, NDArray[np.intp]]:
    return _found(np.frombuffer(labels, dtype))


def _found(labels: Labels) -> tuple[Labels, NDArray[np.intp]]:
    """Cluster names in order [clusters], and the place of each label among them [items]; neither to be written to."""
    names, index = np.unique(labels, return_inverse=True)
    names.flags.writeable = index.flags.writeable = False
    return names, index


# ---- quantiles -------------------------------------------------------------------------------------------------------


def normal_quantile(probability: float) -> float:
    """The standard normal quantile."""
    return NormalDist().inv_cdf(probability)


def normal_tail(statistic: float) -> float:
    """P[Z ≥ statistic] of the standard normal distribution."""
    from scipy.special import ndtr

    return float(ndtr(-statistic))


def student_quantile(probability: float, degrees_of_freedom: float) -> float:
    """Student's t quantile."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees_of_freedom, probability))


def student_tail(statistic: float, degrees_of_freedom: float) -> float:
    """P[T ≥ statistic] for Student's t."""
    from scipy.special import stdtr

    return float(stdtr(degrees_of_freedom, -statistic))
