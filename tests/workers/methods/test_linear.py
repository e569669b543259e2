"""linear and passthrough against sums on paper."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import pytest
import torch

X, Y = [4.0, 8.0, -16.0], [8.0, 0.0, 4.0]
NAN = float("nan")


def test_a_weighted_mean(merge: Any):
    # ¾·4 + ¼·8 = 5, ¾·8 = 6, ¾·(−16) + ¼·4 = −11
    assert merge("linear", {"a": X, "b": Y}, weight=(0.75, 0.25)).tolist() == [5, 6, -11]


def test_normalize_divides_by_the_sum_of_the_weights(merge: Any):
    assert merge("linear", {"a": X, "b": Y}, weight=(3.0, 1.0)).tolist() == [5, 6, -11]


def test_without_normalize_the_weights_are_taken_as_they_are(merge: Any):
    assert merge("linear", {"a": X, "b": Y}, weight=(3.0, 1.0), normalize=False).tolist() == [20, 24, -44]


def test_negative_weights_extrapolate(merge: Any):
    # 2·4 − 8 = 0, 2·8 − 0 = 16, 2·(−16) − 4 = −36
    assert merge("linear", {"a": X, "b": Y}, weight=(2.0, -1.0)).tolist() == [0, 16, -36]


def test_a_model_of_weight_zero_is_not_looked_at(merge: Any):
    assert merge("linear", {"a": X, "b": [NAN, NAN, NAN]}, weight=(0.5, 0.0)).tolist() == X


def test_weights_that_are_all_zero_give_zeros(merge: Any):
    assert merge("linear", {"a": X, "b": Y}, weight=(0.0, 0.0), normalize=False).tolist() == [0, 0, 0]


def test_three_models_are_added_in_order(merge: Any):
    # 2^24 + 1 is not a float32: the order of additions shows
    parts = {"a": [2.0**24], "b": [1.0], "c": [1.0]}
    assert merge("linear", parts, weight=(1.0, 1.0, 1.0), normalize=False).tolist() == [2.0**24]
    parts = {"b": [1.0], "c": [1.0], "a": [2.0**24]}
    assert merge("linear", parts, weight=(1.0, 1.0, 1.0), normalize=False).tolist() == [2.0**24 + 2]


def share_of_nearest(merged: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> float:
    """The share of elements for which no other number of the dtype lies nearer to 7/10 x + 3/10 y.

    Where that is exactly between two, as it is for one sibling's element in ten, either is right.
    """
    infinity = torch.full_like(merged, math.inf)
    neighbours = (torch.nextafter(merged, infinity), torch.nextafter(merged, -infinity))
    right = 0
    for a, b, ours, *others in zip(*(t.tolist() for t in (x, y, merged, *neighbours)), strict=True):
        exact = (7 * Fraction(a) + 3 * Fraction(b)) / 10
        right += all(abs(exact - Fraction(ours)) <= abs(exact - Fraction(other)) for other in others)
    return right / merged.numel()


@pytest.mark.parametrize(("dtype", "arithmetic", "share"), [("float32", "F64", 1.0), ("bfloat16", "F32", 0.999)])
def test_siblings_are_merged_to_the_nearest_number(merge: Any, dtype: str, arithmetic: str, share: float):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4000, generator=generator) * 0.02
    y = x + torch.randn(4000, generator=generator) * 1e-3
    x, y = x.to(getattr(torch, dtype)), y.to(getattr(torch, dtype))
    merged = merge("linear", {"a": x, "b": y}, weight=(0.7, 0.3), arithmetic=arithmetic)
    assert share_of_nearest(merged.to(x.dtype), x, y) >= share


def test_passthrough_scales(merge: Any):
    assert merge("passthrough", {"a": X}, scale=(0.5,)).tolist() == [2, 4, -8]
    assert merge("passthrough", {"a": X}).tolist() == X
