"""model_stock against the paper's equation on small vectors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.workers.methods.whole import answered, tiles_of
from workers.methods.model_stock import model_stock_collapse
from workers.methods.tile import Inputs, Reduction

S = math.sqrt(3) / 2


def stock(merge: Any, base: Any, *models: Any, **more: Any) -> Any:
    parents = {f"m{place}": torch.as_tensor(each, dtype=torch.float64) for place, each in enumerate(models)}
    zero = {"base": torch.tensor(base, dtype=torch.float64)}
    return merge("model_stock", parents, base=zero, arithmetic="F64", **more).tolist()


def test_two_models_at_sixty_degrees(merge: Any):
    # t = 2·½/(1 + ½) = ⅔ of the mean (¾, S/2), whatever the lengths
    assert stock(merge, [0.0, 0], [1.0, 0], [0.5, S]) == pytest.approx([0.5, S / 3])
    assert stock(merge, [5.0, 7], [7.0, 7], [6.0, 7 + 2 * S]) == pytest.approx([6, 7 + 2 * S / 3])


def test_three_models_count_the_mean_of_all_pairs(merge: Any):
    # the cosines are 0, ½ and S: t = 3c/(1 + 2c)
    cosine = (0 + 0.5 + S) / 3
    share = 3 * cosine / (1 + 2 * cosine) / 3
    assert stock(merge, [0.0, 0], [1.0, 0], [0, 1.0], [0.5, S]) == pytest.approx([1.5 * share, (1 + S) * share])


def test_equal_models_are_the_result_and_orthogonal_ones_leave_the_base(merge: Any):
    assert stock(merge, [1.0, 2], [4.0, 6], [4.0, 6]) == pytest.approx([4, 6])
    assert stock(merge, [1.0, 2], [2.0, 2], [1.0, 3]) == [1, 2]


def test_a_negative_cosine_moves_away_from_the_mean(merge: Any):
    # cos = −½: t = −1/(1 − ½) = −2 of the mean (¼, S/2)
    assert stock(merge, [0.0, 0], [1.0, 0], [-0.5, S]) == pytest.approx([-0.5, -S])


def test_opposite_models_leave_the_base(merge: Any):
    # 1 + cos = 0: no optimum
    assert stock(merge, [1.0, 1], [2.0, 3], [0.0, -1]) == [1, 1]


def test_the_product_of_two_short_task_vectors_counts_as_a_millionth(merge: Any):
    # both of length 10⁻⁴: 10⁻⁸/10⁻⁶ in place of a cosine of 1
    assert stock(merge, [0.0, 0], [1e-4, 0], [1e-4, 0])[0] == pytest.approx(1e-4 * 2 * 0.01 / 1.01)


def test_filter_wise_takes_each_row_by_itself(merge: Any, small_tiles: int):
    # rows of 10 elements over tiles of 16: at 60°, orthogonal, equal
    first, second = torch.zeros(2, 3, 10, dtype=torch.float64)
    first[0, 1], second[0, 1], second[0, 8] = 1, 0.5, S
    first[1, 0], second[1, 9] = 2, 3
    first[2, 4:] = second[2, 4:] = 1
    merged = stock(merge, [[1.0] * 10] * 3, 1 + first, 1 + second, filter_wise=True)
    mean = (first + second) / 2
    expected = 1 + torch.stack([mean[0] * 2 / 3, mean[1] * 0, mean[2]])
    assert merged == pytest.approx(expected.flatten().tolist(), rel=1e-12)
    one_row = stock(merge, [1.0] * 10, 1 + first[0], 1 + second[0], filter_wise=True)
    assert one_row == pytest.approx(expected[0].tolist(), rel=1e-12)


def test_all_but_the_last_axis_are_rows(merge: Any):
    models = [[[[1.0, 0]], [[0, 2.0]]], [[[0.5, S]], [[2.0, 0]]]]
    merged = stock(merge, [[[0.0, 0]], [[0.0, 0]]], *models, filter_wise=True)
    assert merged == pytest.approx([0.5, S / 3, 0, 0])


def test_in_mergekits_order_each_step_rounds_to_bfloat16(merge: Any):
    # t = 2/3 is 0.66796875 in bf16, the mean of 1 and 1/128 + 1 (1.0078125) is 1.0; (1 − t)·3 = 0.99609375
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.5, S])
    parents = {"a": 3 + a, "b": 3 + b}
    merged = merge("model_stock", parents, base={"base": [3.0, 3.0]}, arithmetic="BF16", numerics="mergekit")
    half = torch.bfloat16
    deltas = [(each.to(half) - 3).double() for each in parents.values()]
    cosine = float(deltas[0] @ deltas[1] / deltas[0].norm() / deltas[1].norm())
    ratio = torch.tensor(2 * cosine / (1 + cosine), dtype=half)
    mean = (parents["a"].to(half) + parents["b"].to(half)) / 2
    assert merged.tolist() == (ratio * mean + (1 - ratio) * torch.tensor(3.0, dtype=half)).tolist()


@pytest.mark.parametrize(("other", "collapses"), [([0.0, 1.0], True), ([0.5, S], False)])
def test_a_merge_that_is_the_base_is_named(other: list[float], collapses: bool):
    parents: Any = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor(other), "base": torch.zeros(2)}
    facts: dict[Reduction, Any] = {}
    (said,) = answered(
        tiles_of(parents, facts),
        facts,
        lambda tile: model_stock_collapse(Inputs(tile, ("a", "b"), "base", "float32"), filter_wise=False),
    )
    assert (said is not None) == collapses
    assert not said or said.startswith("model_stock returned the base, since task vectors are nearly orthogonal")
