"""How the score depends on the axes of a grid: profiles, maps of two axes, the importance of each axis.

All points answered the same haystacks, so that one Bayesian bootstrap (Rubin 1981) over the haystacks gives joint
draws of all scores: differences between points keep their pairing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jobs.evaluation_tasks import ScoreRow
from jobs.expressions import Value
from jobs.grid import Point
from orchestrator.judging.estimates import macro_weights
from orchestrator.judging.samples import FloatArray, cell_of
from orchestrator.report.figures import Map, MapTile, axis_values, value_word

DRAWS = 400
SURE = 1.96
"""Standard errors of a difference, from which on it is marked as more than noise (each one by itself, at 5 %)."""


@dataclass(frozen=True, slots=True)
class Profile:
    """Scores in points along one axis; `half` is half of the 95 % interval of the difference from the best of them."""

    name: str
    values: tuple[Value, ...]
    scores: tuple[float, ...]
    half: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Importance:
    """The share of the variance of true scores over the points that the mean by this axis explains, from 0 to 1."""

    axis: str
    share: float
    low: float
    high: float


@dataclass(frozen=True)
class Surface:
    """The points by their axes: `at` [points × axes] has the index of each value.

    `scores` [points] and `draws` [draws × points] are in points, on the haystacks that every point answered.
    """

    axes: tuple[str, ...]
    values: tuple[tuple[Value, ...], ...]
    names: tuple[str, ...]
    at: NDArray[np.int64]
    scores: FloatArray
    draws: FloatArray

    @property
    def best(self) -> int:
        """The number of the point with the highest score."""
        return int(np.argmax(self.scores))

    @property
    def full(self) -> bool:
        """Whether every combination of values is a point."""
        return math.prod(map(len, self.values)) == len(self.names)

    # ---- figures ----

    def profiles(self, axis: int) -> list[Profile]:
        """The line through the best point, and with more axes the mean over all others."""
        others = [other for other in range(len(self.axes)) if other != axis]
        through = np.flatnonzero((self.at[:, others] == self.at[self.best, others]).all(axis=1))
        lines = [self._profile("the others at the best point", axis, through)] if others and len(through) > 1 else []
        return [*lines, self._profile("mean over the others" if others else "", axis, np.arange(len(self.names)))]

    def _profile(self, name: str, axis: int, points: NDArray[np.int64]) -> Profile:
        index = sorted(set(self.at[points, axis].tolist()))
        groups = [points[self.at[points, axis] == value] for value in index]
        scores, errors = self._against_best(groups)
        values = tuple(self.values[axis][value] for value in index)
        return Profile(name, values, tuple(scores.tolist()), tuple((SURE * errors).tolist()))

    def _against_best(self, groups: Sequence[NDArray[np.int64]]) -> tuple[FloatArray, FloatArray]:
        """Mean scores of groups of points, and the standard error of each one's difference from the best of them."""
        scores = np.array([self.scores[group].mean() for group in groups])
        draws = np.stack([self.draws[:, group].mean(axis=1) for group in groups], axis=1)
        errors = (draws - draws[:, [int(np.argmax(scores))]]).std(axis=0, ddof=1)
        return scores, errors

    def maps(self, axes: Sequence[str]) -> list[Map]:
        """For each two of these axes, a map with the others at the best point and one of the mean over them."""
        found: list[Map] = []
        for first, second in itertools.combinations(sorted(map(self.axes.index, axes)), 2):
            others = [axis for axis in range(len(self.axes)) if axis not in (first, second)]
            pair = f"{self.axes[first]} × {self.axes[second]}"
            everything = np.arange(len(self.names))
            if others:
                at_best = np.flatnonzero((self.at[:, others] == self.at[self.best, others]).all(axis=1))
                words = ", ".join(
                    f"{self.axes[axis]}={value_word(self.values[axis][self.at[self.best, axis]])}" for axis in others
                )
                found.append(self._map(f"{pair}, {words}", first, second, at_best))
            found.append(self._map(f"{pair}, mean over the others" if others else pair, first, second, everything))
        return found

    def _map(self, title: str, first: int, second: int, points: NDArray[np.int64]) -> Map:
        groups: dict[tuple[int, int], list[int]] = {}
        for point in points.tolist():
            groups.setdefault((int(self.at[point, first]), int(self.at[point, second])), []).append(point)
        scores, errors = self._against_best([np.array(group) for group in groups.values()])
        rows = tuple(map(value_word, self.values[first]))
        columns = tuple(map(value_word, self.values[second]))
        best = float(scores.max())
        tiles: dict[tuple[int, int], MapTile] = {}
        for place, score, error in zip(groups, scores.tolist(), errors.tolist(), strict=True):
            text = f"{self.axes[first]} {rows[place[0]]}, {self.axes[second]} {columns[place[1]]}: {score:.1f}"
            if score < best:
                text += f"; {best - score:.1f} ± {SURE * error:.1f} below the best"
            tiles[place] = MapTile(score, score == best or best - score > SURE * error, text)
        return Map(title, rows, columns, self.axes[first], self.axes[second], tiles)

    def importance(self) -> list[Importance]:
        """The main effects of a functional analysis of variance (Sobol' 1993; Hutter et al. 2014), largest first.

        V_a is the variance over the points of the mean score by the value of axis a, V that of the scores. Noise adds
        N_a and N to them: the mean variance of the draws around the scores. The share is (V_a − N_a) / (V − N). A draw
        has the noise twice, so that its share is (V_a − 2 N_a) / (V − 2 N); a draw with V ≤ 2 N allows any share.
        """
        spread, noise = _variances(self.scores, self.draws)
        found: list[Importance] = []
        for number, axis in enumerate(self.axes):
            member = np.eye(len(self.values[number]))[self.at[:, number]]
            mean_by_value = member @ (member / np.maximum(1, member.sum(axis=0))).T
            effect, own = _variances(mean_by_value @ self.scores, self.draws @ mean_by_value)
            drawn = (self.draws @ mean_by_value).var(axis=1) - 2 * own
            total = self.draws.var(axis=1) - 2 * noise
            known = total > 1e-9
            shares = np.clip(drawn / np.where(known, total, 1), 0, 1)
            low = float(np.quantile(np.where(known, shares, 0), 0.025))
            high = float(np.quantile(np.where(known, shares, 1), 0.975))
            share = float(np.clip((effect - own) / (spread - noise), 0, 1)) if spread - noise > 1e-9 else math.nan
            found.append(Importance(axis, share, low, high))
        return sorted(found, key=lambda one: -math.inf if math.isnan(one.share) else one.share, reverse=True)


def _variances(scores: FloatArray, draws: FloatArray) -> tuple[float, float]:
    """The variance of the scores over the points, and the part that noise has in it."""
    around = draws - scores
    return float(scores.var()), float((around - around.mean(axis=1, keepdims=True)).var(axis=0).mean())


def surface(points: Sequence[Point], rows: Mapping[str, Sequence[ScoreRow]], same: Mapping[str, str]) -> Surface | None:
    """The surface over these points; None without an axis, or without haystacks that all of them answered."""
    scored = [point for point in points if same.get(point.name, point.name) in rows]
    if len(scored) < 3 or any(point.bindings.keys() != scored[0].bindings.keys() for point in scored):
        return None
    axes = [axis for axis in scored[0].bindings if len({point.bindings[axis] for point in scored}) > 1]
    if not axes:
        return None
    of = [same.get(point.name, point.name) for point in scored]
    found = _scores(of, rows)
    if found is None:
        return None
    values = [axis_values(scored, axis) for axis in axes]
    at = [[known.index(point.bindings[axis]) for axis, known in zip(axes, values, strict=True)] for point in scored]
    names = tuple(point.name for point in scored)
    return Surface(tuple(axes), tuple(map(tuple, values)), names, np.array(at, np.int64), *found)


def _scores(names: Sequence[str], rows: Mapping[str, Sequence[ScoreRow]]) -> tuple[FloatArray, FloatArray] | None:
    """Scores [points] and draws [draws × points], from 0 to 100, on the items that every point answered."""
    answers = {
        name: {(cell_of(row), row.haystack, row.item): row.score for row in rows[name]} for name in dict.fromkeys(names)
    }
    common = sorted(set.intersection(*(set(of) for of in answers.values())))
    haystacks = {name: index for index, name in enumerate(sorted({haystack for _, haystack, _ in common}))}
    if len(haystacks) < 2:
        return None
    random = np.random.default_rng(0).exponential(size=(DRAWS, len(haystacks)))
    weights = np.vstack([np.ones(len(haystacks)), random])
    cells = sorted({cell for cell, _, _ in common})
    means = np.zeros((len(weights), len(names)))
    for cell, share in zip(cells, macro_weights(cells).tolist(), strict=True):
        items = [key for key in common if key[0] == cell]
        scores = np.array([[answers[name][key] for name in names] for key in items])
        of_item = weights[:, [haystacks[haystack] for _, haystack, _ in items]]
        means += share * (of_item @ scores) / of_item.sum(axis=1, keepdims=True)
    return 100 * means[0], 100 * means[1:]
