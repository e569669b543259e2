"""Two points on the same items: the gap of their scores, its error by haystacks, and losses too rare to be seen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.judging.estimates import Haystacks, few_losses, macro_weights, satterthwaite
from orchestrator.judging.samples import Cell, FloatArray


@dataclass(frozen=True, slots=True)
class Gap:
    """Macro score of the rival less that of the point, as a share of 1, with its error and degrees of freedom.

    `rare` is the probability of so few losses of the rival if the point is as good, see `estimates.few_losses`.
    """

    size: float
    standard_error: float
    degrees_of_freedom: float
    rare: float


class Pairing:
    """Compares points over these cells, each of which every point answers from its first item on.

    Args:
        cells: tasks at lengths.
        items_per_haystack: items k·m … k·m + m − 1 share a haystack.
        items_shared_across_lengths: item i of a task is the same question at every length, so that its lengths are
            dependent: one group of cells.
        weights: of the cells in the figure that is compared, by default those of the macro score.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        items_per_haystack: int = 1,
        items_shared_across_lengths: bool = False,
        weights: FloatArray | None = None,
    ) -> None:
        self.weights = macro_weights(cells) if weights is None else weights
        self._haystack = items_per_haystack
        groups: dict[object, list[int]] = {}
        for index, cell in enumerate(cells):
            groups.setdefault(cell.task if items_shared_across_lengths else index, []).append(index)
        self._groups = [*groups.values()]

    def parts(self, scores: FloatArray) -> FloatArray:
        """The part of each haystack in the figure [groups, haystacks], from scores [cells, items]; they sum to it."""
        parts = scores * self.weights[:, None] / scores.shape[1]
        by_cell = parts.reshape(len(scores), -1, self._haystack).sum(axis=2)
        return np.stack([by_cell[group].sum(axis=0) for group in self._groups])

    def gap(self, rival: FloatArray, point: FloatArray) -> Gap:
        """The gap from the scores [cells, items] of both on the same items."""
        parts = self.parts(rival - point)
        error, freedom = self._error(parts)
        return Gap(float(parts.sum()), error, freedom, few_losses(self._pooled(parts), 0.0))

    def spare(self, rival: FloatArray, point: FloatArray, margin: float) -> Gap:
        """How far the point is above the rival less the margin, a share of 1; `rare` is that of the point's losses."""
        parts = self.parts(point - rival)
        error, freedom = self._error(parts)
        return Gap(float(parts.sum()) + margin, error, freedom, few_losses(self._pooled(parts), margin))

    def _error(self, parts: FloatArray) -> tuple[float, float]:
        """Standard error of the gap, clustered by haystack, and its degrees of freedom."""
        haystacks = parts.shape[1]
        residuals = parts - parts.mean(axis=1, keepdims=True)
        variances = np.sum(residuals**2, axis=1) * haystacks / (haystacks - 1)
        freedom = satterthwaite(variances, np.full(len(parts), haystacks - 1.0))
        return math.sqrt(float(variances.sum())) or self._least_error(haystacks), freedom

    def _pooled(self, parts: FloatArray) -> Haystacks:
        shares = np.array([self.weights[group].sum() for group in self._groups])
        spread = float(shares @ shares) / parts.shape[1]
        return Haystacks(parts.size * parts.ravel(), len(shares) * float(shares.max()), spread)

    def _least_error(self, haystacks: int) -> float:
        """A lower limit of the error if all haystacks agree: one of two more might differ (the plus-four rule)."""
        other = 1 / (haystacks * len(self._groups) + 2)
        shares = [float(self.weights[group].sum()) for group in self._groups]
        return math.sqrt(sum(share**2 for share in shares) * other * (1 - other) / haystacks)
