"""arcee_fusion against its formula on paper."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch


def divergence(model: Any, base: Any) -> float:
    """KL of the softmaxes, each probability raised by 1e-8."""
    p, q = (np.exp(row) / np.exp(row).sum() + 1e-8 for row in (np.array(model), np.array(base)))
    return float((p * np.log(p / q)).sum())


def fused(merge: Any, base: Any, other: Any, **more: Any) -> list[float]:
    shape = np.array(base).shape
    models = {name: torch.tensor(values, dtype=torch.float64).flatten() for name, values in (("x", other), ("b", base))}
    return merge(
        "arcee_fusion", {"x": models["x"]}, base={"b": models["b"]}, arithmetic="F64", shape=shape, **more
    ).tolist()


def test_a_change_beyond_one_and_a_half_interquartile_ranges_is_taken(merge: Any):
    # in one row the importances are |δ| times one number: δ = 1 … 8 and 100 of n = 9.
    # ranks ⌊(1/4, 1/2, 3/4) · 8⌋ = 2, 4, 6 are 3, 5 and 7: the cutoff is 5 + 1.5 · 4 = 11
    base = [0.0] * 9
    other = [0.01 * step for step in (1, 2, 3, 4, 5, 6, 7, 8, 100)]
    assert fused(merge, base, other) == [0.0] * 8 + [other[8]]


def test_a_change_at_the_cutoff_is_taken(merge: Any):
    # 1, 2, 3, 4, 10 of n = 5: ranks 1, 2, 3 are 2, 3 and 4, the cutoff is 3 + 1.5 · 2 = 6
    steps = (1.0, 2.0, 3.0, 4.0, 6.0)
    assert fused(merge, [0.0] * 5, [step / 64 for step in steps]) == [0, 0, 0, 0, 6 / 64]


def test_a_row_weighs_by_its_divergence(merge: Any):
    # A row that moves as a whole has the same softmax: its greatest |δ| of all have the importance 0. Rows of ±k/100
    # have importances near k³ times a number: those at ranks 2, 5 and 8 of 12 are 1, 8 and 64, so the cutoff is near
    # 8 + 1.5 · 63 = 102.5, which only the row of ±0.3 reaches.
    other = [[0.5, 0.5], *([k / 100, -k / 100] for k in (1, 2, 3, 4)), [0.3, -0.3]]
    assert fused(merge, [[0.0, 0.0]] * 6, other) == [0.0] * 10 + [0.3, -0.3]


@pytest.mark.parametrize("units", [1, 3])
@pytest.mark.parametrize("shape", [(11, 7), (4, 41)], ids=["cut rows", "rows wider than a tile"])
def test_it_follows_the_formula_over_many_rows_and_tiles(
    merge: Any, small_tiles: int, shape: tuple[int, int], units: int
):
    rng = np.random.default_rng(4)
    base = rng.standard_normal(shape)
    other = base + rng.standard_normal(shape) * rng.choice([0.01, 0.5, 2], (shape[0], 1))
    importance = np.array([abs(x - b) * divergence(x, b) for x, b in zip(other, base, strict=True)])
    ranked = np.sort(importance.flatten())
    lower, median, upper = (ranked[int(q * (ranked.size - 1))] for q in (0.25, 0.5, 0.75))
    kept = importance >= median + 1.5 * (upper - lower)
    assert 0 < kept.sum() < kept.size
    merged = np.array(fused(merge, base, other, units=units)).reshape(shape)
    assert merged == pytest.approx(np.where(kept, other, base), rel=1e-12)


def test_where_most_elements_are_unchanged_the_other_model_is_taken(merge: Any):
    # three quartiles of zero make a cutoff of zero, which every importance reaches
    base, other = [0.0] * 9, [0.0] * 8 + [0.25]
    assert fused(merge, base, other) == other
