"""consensus_ta against the equations of arXiv 2405.07813, on vectors small enough to check by hand."""

from __future__ import annotations

from typing import Any

import pytest

BASE = {"base": [10.0, 10.0, 10.0, 10.0]}
# Στ is       5, 1, 4, 0
ONE, TWO = [2.0, 3.0, 4.0, 1.0], [3.0, -2.0, 0.0, -1.0]


def test_what_two_models_use_is_added_whole_and_the_rest_is_the_base(merge: Any):
    # |τ₁| > 0.5·|Στ − τ₁| = 0.5·|τ₂|: 2 > 1.5, 3 > 1, 4 > 0, 1 > 0.5
    # |τ₂| > 0.5·|τ₁|: 3 > 1, 2 > 1.5, 0 > 2 fails, 1 > 0.5
    models = {"one": [10 + x for x in ONE], "two": [10 + x for x in TWO]}
    merged = merge("consensus_ta", models, base=BASE, weight=(1.0, 1.0), tall_lambda=(0.5, 0.5))
    assert merged.tolist() == [15, 11, 10, 10]


@pytest.mark.parametrize(
    ("ratio", "k", "expected"),
    [
        (1.0, 2, [10, 10, 10, 10]),  # 2 > 3 fails, 2 > 3 fails, 0 > 4 fails, 1 > 1 fails
        (1.0, 1, [15, 11, 14, 10]),  # each of the first three is used by one
        (0.7, 2, [10, 10, 10, 10]),  # 2 > 2.1 fails, 2 > 2.1 fails; the last sums to zero
        (0.6, 2, [15, 11, 10, 10]),  # 2 > 1.8 twice
    ],
)
def test_the_ratio_and_the_number_of_users_decide(merge: Any, ratio: float, k: float, expected: list[float]):
    models = {"one": [10 + x for x in ONE], "two": [10 + x for x in TWO]}
    assert merge("consensus_ta", models, base=BASE, tall_lambda=(ratio, ratio), k=k).tolist() == expected


def test_weights_scale_the_task_vectors_before_they_are_compared(merge: Any):
    # 0.5·τ₁ = 1, 1.5, 2, ½ and 2·τ₂ = 6, −4, 0, −2
    # with a ratio of 0.3 model one uses 1 > 1.8 no, 1.5 > 1.2, 2 > 0, ½ > 0.6 no
    models = {"one": [10 + x for x in ONE], "two": [10 + x for x in TWO]}
    merged = merge("consensus_ta", models, base=BASE, weight=(0.5, 2.0), tall_lambda=(0.3, 0.3), lambda_=0.5)
    assert merged.tolist() == [10, 10 - 0.5 * 2.5, 10, 10]
