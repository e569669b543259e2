"""One pass over memory: how one point's elements follow from its parents', once the facts about the tensor are known.

Most methods end in one of these few passes. They are data: `workers/methods/kernels/` computes them on CPUs, for all
points of a grid at once. The torch formula of a method remains its definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from workers.methods.coins import Coin
from workers.methods.importance import Importance
from workers.methods.ranking import Threshold
from workers.methods.tile import Array

Along = Literal["tensor", "rows", "columns"]
"""The lines of a tensor that have a number each: all of it, the vectors of its last axis, or those of its first."""


@dataclass(frozen=True, slots=True)
class WeightedSum:
    """Σ cᵢ·xᵢ, or base + Σ cᵢ·(xᵢ − base) with a base; summed from left to right in the arithmetic dtype.

    A coefficient is a number, or an array of one number for each line `along` the tensor. A term whose coefficient is
    exactly 1 is not multiplied.
    """

    models: tuple[str, ...]
    coefficients: tuple[float | Array, ...]
    base: str | None = None
    along: Along = "tensor"


@dataclass(frozen=True, slots=True)
class Kept:
    """One task vector δ of a consensus: factor · δ where it is kept, else zero; then times its weight.

    `among` keeps the elements that a threshold on |δ|, or on a `score`, keeps; `beyond` drops those that another
    keeps; `coin` decides element by element; None keeps all. `factor` is not multiplied if it is None.
    """

    model: str
    weight: float
    among: Threshold | None = None
    beyond: Threshold | None = None
    coin: Coin | None = None
    factor: float | None = None
    score: Importance | None = None


@dataclass(frozen=True, slots=True)
class Consensus:
    """base + scale · (Σ of the kept, weighted task vectors), as `task_vectors.add_consensus` defines it.

    With `elect`, only those take part whose sign is that of the sum, element by element; with `normalize` as well, the
    sum is divided by the weights of those that take part.
    """

    base: str
    kept: tuple[Kept, ...]
    elect: bool
    normalize: bool = False
    scale: float = 1.0


@dataclass(frozen=True, slots=True)
class SelectedConsensus:
    """base + m / max(d, 10⁻⁶), element by element in the arithmetic dtype; see `sce`.

    δᵢ = xᵢ − base, or zero where the threshold `among` on `ranking.Variance(models, base)` does not keep it;
    s = +1 where δ₁ + δ₂ + … ≥ 0, else −1;
    m = Σ δᵢ·wᵢ and d = Σ wᵢ over the models with sign(δᵢ) = s.
    All sums run from left to right.
    """

    base: str
    models: tuple[str, ...]
    weights: tuple[float, ...]
    among: Threshold | None


@dataclass(frozen=True, slots=True)
class Overlap:
    """base + what the models have changed, element by element in the arithmetic dtype; see `ram`.

    δᵢ = xᵢ − base takes part where |δᵢ| > epsilon; n counts those that do.
    Where n = 1, adds factorᵢ·δᵢ; else adds (Σ δᵢ)/n, summed from left to right, or zero where n = 0.
    `factors` of None are all 1.
    """

    base: str
    models: tuple[str, ...]
    factors: tuple[float, ...] | None
    epsilon: float


@dataclass(frozen=True, slots=True)
class TallConsensus:
    """base + scale · Σ vᵢ where at least `k` models use the element, else the base; see `consensus_ta`.

    vᵢ = weightᵢ · (xᵢ − base), summed from left to right; model i uses an element where |vᵢ| > ratioᵢ · |Σ vⱼ − vᵢ|.
    """

    base: str
    models: tuple[str, ...]
    weights: tuple[float, ...]
    ratios: tuple[float, ...]
    k: float
    scale: float


@dataclass(frozen=True, slots=True)
class Swap:
    """w·x + (1 − w)·base, element by element in the arithmetic dtype; see `nearswap`.

    w = t / max(|base − x|, 10⁻⁶), at least 0 and at most 1.
    """

    base: str
    model: str
    t: float


@dataclass(frozen=True, slots=True, eq=False)
class MatrixSum:
    """base + Σ (xᵢ − base)·Mᵢ, row by row in the arithmetic dtype; see `regression.matrix_sum`.

    A row is a vector of the last axis. Mᵢ is of blocks × size × size, in the arithmetic dtype: the elements of a row
    are cut into parts of `size`, each with its own block. Sums run in the order of the columns.
    """

    models: tuple[str, ...]
    matrices: tuple[Array, ...]
    base: str


@dataclass(frozen=True, slots=True)
class FisherMean:
    """x₀ + Σ gᵢ·(xᵢ − x₀) / Σ gᵢ, element by element in the arithmetic dtype; see `fisher`.

    gᵢ = weightᵢ · max(Fᵢ · inverse, floor), where Fᵢ is the element of the parent of that place in `fishers`. The sums
    run from left to right, and the first leaves x₀ out.
    """

    models: tuple[str, ...]
    fishers: tuple[str, ...]
    weights: tuple[float, ...]
    inverse: float
    floor: float


@dataclass(frozen=True, slots=True)
class Relaxed:
    """base + (merged − base) · factor, element by element in the arithmetic dtype; see `aim`.

    `merged` is rounded to the arithmetic dtype alone. `places` is (width, stride, block): element i of the tensor has
    the factor (i // block) · width + (i // stride) % width.
    """

    merged: Pass
    base: str
    factors: Array
    places: tuple[int, int, int]


Pass = WeightedSum | Consensus | SelectedConsensus | Overlap | TallConsensus | Swap | MatrixSum | FisherMean | Relaxed
