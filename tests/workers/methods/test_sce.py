"""sce against arithmetic on paper."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs.merge_tasks import Setting
from tests.workers.methods.whole import answered, tiles_of
from workers.merging.tiles import merge_tile

ZERO = {"base": [0.0] * 4}
X, Y = [4.0, -2.0, 1.0, 0.0], [2.0, 2.0, -1.0, 0.0]  # variances 1, 4, 1, 0; squares sum to 21 and 9


def sce(merge: Any, x: list[float] = X, y: list[float] = Y, **more: Any) -> list[float]:
    return merge("sce", {"x": x, "y": y}, base={"base": [0.0] * len(x)}, **more).tolist()


def test_what_agrees_is_averaged_by_the_size_of_the_task_vectors(merge: Any):
    # weights 0.7 and 0.3; the sums 6, 0, 0, 0 elect +: both, y, x, nobody
    assert sce(merge) == pytest.approx([0.7 * 4 + 0.3 * 2, 2, 1, 0])


@pytest.mark.parametrize(
    ("share", "selected"),
    [
        (0.99, [1, 1, 0, 0]),  # of the three variances that are not zero ⌊2.97⌋ = 2: 4, and the first of the two 1
        (0.66, [0, 1, 0, 0]),
        (0.34, [0, 1, 0, 0]),
        (0.3, [0, 0, 0, 0]),
    ],
)
def test_the_elements_of_the_largest_variance_take_part(merge: Any, share: float, selected: list[int]):
    # the weights come from the selected elements: 20/28 and 8/28 for the first, then 4/8 each
    both = (20 * 4 + 8 * 2) / 28
    assert sce(merge, select_topk=share) == pytest.approx([both * selected[0], 2 * selected[1], 0, 0])


def test_a_sum_of_zero_elects_the_positive_and_the_base_is_added(merge: Any):
    merged = merge("sce", {"x": [1.0, 7.0], "y": [5.0, 11.0]}, base={"base": [3.0, 10.0]})
    # δ = [−2, −3] and [2, 1], squares 13 and 5
    assert merged.tolist() == pytest.approx([5, 7])


def test_the_sign_is_elected_without_weights(merge: Any):
    # y is the larger by far, but the third element's sum 3 − 2 is positive
    assert sce(merge, [0, 0, 3, 1], [9, 9, -2, 1])[2] == pytest.approx(3)


def test_small_task_vectors_weigh_the_same(merge: Any):
    # mean squares of 10⁻⁸ and 4·10⁻⁸ are below 10⁻⁶ in sum; a thousand times larger they are not
    assert sce(merge, [1e-4], [2e-4]) == pytest.approx([1.5e-4])
    assert sce(merge, [1e-1], [2e-1]) == pytest.approx([(1 * 0.1 + 4 * 0.2) / 5])


def test_a_weight_below_a_millionth_does_not_keep_its_value(merge: Any):
    # x weighs 10⁻⁸/(1 + 10⁻⁸) and agrees alone in the first element: divided by 10⁻⁶, a hundredth is left
    assert sce(merge, [1e-4, 0.0], [0.0, 1.0])[0] == pytest.approx(1e-6)


@pytest.mark.parametrize("units", [1, 3])
def test_the_whole_tensor_is_looked_at_not_a_tile(merge: Any, small_tiles: int, units: int):
    # 70 elements in five tiles: 60 with equal variance, of which the first 30 stay
    x = [0.0] * 10 + [2.0] * 60
    merged = sce(merge, x, [0.0] * 70, select_topk=0.5, units=units)
    assert merged == [0.0] * 10 + [2.0] * 30 + [0.0] * 30


@pytest.mark.parametrize(("numerics", "selected"), [("float32", 1), ("mergekit", 0)])
def test_mergekits_numerics_rank_the_variance_of_the_documents_dtype(numerics: str, selected: int):
    # the variances are (1 − 0.0005)²/4 = 0.24975 and ¼; in bfloat16 both are ¼, and the first is taken
    parents = {"x": torch.ones(2), "y": torch.tensor([0.0005, 0.0]), "base": torch.zeros(2)}
    parents = {name: values.bfloat16() for name, values in parents.items()}
    facts: dict[Any, Any] = {}
    setting = Setting("sce", ("x", "y"), "base", (("select_topk", 0.5),))
    arithmetic = "BF16" if numerics == "mergekit" else "F32"
    [merged] = answered(tiles_of(parents, facts), facts, lambda tile: merge_tile(tile, setting, arithmetic, numerics))
    assert merged.count_nonzero() == 1 and merged[selected] > 0
