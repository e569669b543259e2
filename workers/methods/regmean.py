"""regmean: the weights whose outputs are nearest to those of the models on their own inputs (Jin et al. 2023).

*Dataless knowledge fusion by merging weights of language models*, arXiv 2212.09849. mergekit does not have it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from jobs.errors import MergeyardError
from workers.methods.linear import linear, linear_pass
from workers.methods.passes import MatrixSum, WeightedSum
from workers.methods.regression import matrix_sum, mixing
from workers.methods.tile import Array, Inputs, PerModel, Reduction

if TYPE_CHECKING:
    from torch import Tensor

GRAMS = Reduction()
"""The fact that is given and not computed: the `Grams` of a tensor."""

KEPT_BYTES = 512 << 20
"""Matrices that stay in memory for the next tensor with the same inputs, and for the next point."""


class Kept:
    """The matrices that were computed last, for all tensors of a task; threads may share it."""

    def __init__(self) -> None:
        self._matrices: OrderedDict[tuple[object, ...], tuple[Array, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def matrices(self, key: tuple[object, ...], compute: Callable[[], tuple[Array, ...]]) -> tuple[Array, ...]:
        """Those of a key, computed unless they are kept. The last ones are kept, however large they are."""
        with self._lock:
            found = self._matrices.pop(key, None) or compute()
            self._matrices[key] = found
            while len(self._matrices) > 1 and self._bytes > KEPT_BYTES:
                self._matrices.popitem(last=False)
            return found

    @property
    def _bytes(self) -> int:
        return sum(each.nbytes for kept in self._matrices.values() for each in kept)


class Grams:
    """The Gram matrices of the inputs of one tensor, by model.

    `read` returns that of a model, float32 of blocks × size × size. `names` are those of the models that have one, each
    with the name of its matrix: they are equal for tensors with the same inputs.
    """

    def __init__(self, names: tuple[tuple[str, str], ...], read: Callable[[str], Array], kept: Kept) -> None:
        self.names, self._read, self._kept = names, read, kept

    def cover(self, models: tuple[str, ...]) -> bool:
        """Whether each of these models has a matrix."""
        return {*models} <= {model for model, _ in self.names}

    def matrices(self, models: tuple[str, ...], weights: PerModel, alpha: float, dtype: str) -> tuple[Array, ...]:
        """`mixing` of all models but the first, in the arithmetic dtype.

        `MergeyardError` if the weighted sum of the matrices cannot be inverted.
        """
        precision = np.float64 if dtype == "float64" else np.float32

        def compute() -> tuple[Array, ...]:
            _, *found = mixing([self._read(model) for model in models], weights, alpha)
            if not all(np.isfinite(each).all() for each in found):
                raise MergeyardError(
                    f"{self.names[0][1]}: the sum of these Gram matrices of {', '.join(models)} cannot be inverted with"
                    f" alpha {alpha:g}; take an alpha of 0.999 or less, or measure with more texts"
                )
            return tuple(np.ascontiguousarray(each, precision) for each in found)

        return self._kept.matrices((self.names, models, weights, alpha, precision), compute)


def regmean(inputs: Inputs, *, weight: PerModel = (1.0,), alpha: float = 0.9) -> Tensor:
    """Σ Wᵢ·wᵢG̃ᵢ(Σ wⱼG̃ⱼ)⁻¹, where G̃ is a Gram matrix whose elements beside the diagonal are multiplied by `alpha`.

    A tensor without Gram matrices is the weighted mean. The default of `alpha` is 0.9; fusion_bench has
    0.95 for CLIP and 0.6 for GPT-2.
    """
    found = _matrix_sum(inputs, weight, alpha)
    if found is not None:
        return matrix_sum(inputs, found)
    return linear(inputs, weight=weight, normalize=inputs.as_mergekit)  # else the weights sum to 1


def regmean_pass(inputs: Inputs, *, weight: PerModel, alpha: float) -> MatrixSum | WeightedSum:
    """The same as a pass, from a simplified setting: no weight is zero, and their sum is 1."""
    return _matrix_sum(inputs, weight, alpha) or linear_pass(inputs, weight=weight, normalize=False)


def _matrix_sum(inputs: Inputs, weight: PerModel, alpha: float) -> MatrixSum | None:
    grams = inputs.tile.facts.get(GRAMS)
    if grams is None or not grams.cover(inputs.models):
        return None
    first, *others = inputs.models
    return MatrixSum(tuple(others), grams.matrices(inputs.models, weight, alpha, inputs.dtype), first)
