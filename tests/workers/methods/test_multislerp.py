"""multislerp against geometry on paper."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from jobs.errors import BadInput

ROOT = math.sqrt(0.5)


def multislerp(merge: Any, *models: list[float], weight: tuple[float, ...], base: Any = None, **more: Any) -> Any:
    parents = {f"m{place}": torch.tensor(each, dtype=torch.float64) for place, each in enumerate(models)}
    origin = None if base is None else {"base": torch.tensor(base, dtype=torch.float64)}
    return merge("multislerp", parents, base=origin, weight=weight, arithmetic="F64", **more).tolist()


def test_the_directions_and_the_lengths_are_averaged_apart(merge: Any):
    # directions (1, 0) and (0, 1), lengths 2 and 6: 45° at the length 4
    assert multislerp(merge, [2, 0], [0, 6], weight=(1, 1)) == pytest.approx([4 * ROOT, 4 * ROOT])
    # weights ¾ and ¼: the direction (3, 1)/√10 at the length 3
    assert multislerp(merge, [2, 0], [0, 6], weight=(3, 1)) == pytest.approx([9 / math.sqrt(10), 3 / math.sqrt(10)])


def test_weights_that_are_not_normalized_scale_the_length(merge: Any):
    merged = multislerp(merge, [2, 0], [0, 6], weight=(3, 1), normalize_weights=False)
    assert merged == pytest.approx([36 / math.sqrt(10), 12 / math.sqrt(10)])


def test_with_a_base_task_vectors_are_averaged(merge: Any):
    merged = multislerp(merge, [12, 5], [10, 11], [10, 5], weight=(2, 2, 1), base=[10, 5])
    # lengths 2, 6 and 0 at ⅖, ⅖, ⅕
    assert merged == pytest.approx([10 + 3.2 * ROOT, 5 + 3.2 * ROOT])


def test_one_model_is_returned_as_it_is(merge: Any):
    assert multislerp(merge, [2, 3], weight=(0.25,), base=[7, 7]) == [2, 3]


def test_eps_lengthens_the_norms_and_shortens_the_result(merge: Any):
    # directions 2/3 and 6/7 at eps 1, the length times cos 1
    merged = multislerp(merge, [2, 0], [0, 6], weight=(1, 1), eps=0.5)
    norm = math.hypot(2 / 2.5, 6 / 6.5)
    expected = [4 * math.cos(0.5) * part / norm for part in (2 / 2.5, 6 / 6.5)]
    assert merged == pytest.approx(expected)


def test_two_opposite_models_are_summed(merge: Any):
    assert multislerp(merge, [3, 0], [-3, 0], weight=(1, 1)) == [0, 0]
    assert multislerp(merge, [4, 0], [2, 0], weight=(1, 1), base=[3, 0]) == [3, 0]


def test_more_that_cancel_are_refused(merge: Any):
    with pytest.raises(BadInput, match="tensor x: the weighted directions of m0, m1, m2 cancel, and multislerp has no"):
        multislerp(merge, [2, 0], [-1, 0], [-1, 0], weight=(2, 1, 1))


def test_a_tensor_that_no_model_changed_is_the_base(merge: Any):
    # mergekit refuses it
    assert multislerp(merge, [3, 4], [3, 4], [3, 4], weight=(1, 1, 1), base=[3, 4]) == [3, 4]
