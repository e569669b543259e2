"""The arithmetic of tensors whose parent stores them in another form."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from jobs.merge_tasks import Derived, LowRank, Rows, Scaled
from workers.merging.deriving import RULES
from workers.merging.parent_rules import low_rank, product, row_adapter, scaled

GENERATOR = np.random.default_rng(13)


def drawn(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    return GENERATOR.standard_normal(shape).astype(dtype)


def adapted(weight: NDArray[Any], rule: LowRank, *inputs: NDArray[Any]) -> NDArray[Any]:
    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[weight.dtype.name]
    flat = [part.reshape(-1) for part in (weight, *inputs)]
    return low_rank(rule, Derived(dtype, weight.shape, rule, ()), flat).reshape(weight.shape)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_an_update_is_added_and_rounded_once(dtype: Any) -> None:
    weight, a, b = drawn(5, 7, dtype=dtype), drawn(3, 7), drawn(5, 3)
    expected = np.array(
        [
            [
                float(
                    Fraction(float(weight[i, j]))
                    + 2 * sum(Fraction(float(b[i, k] * 1.0)) * Fraction(float(a[k, j])) for k in range(3))
                )
                for j in range(7)
            ]
            for i in range(5)
        ]
    )
    found = adapted(weight, LowRank(2.0, 3), a, b)
    assert found.dtype == dtype
    if dtype is np.float32:
        np.testing.assert_allclose(found, expected, rtol=2**-23)
    else:
        assert (found == expected.astype(np.float32).astype(dtype)).all()


def test_a_transposed_weight_gets_the_transposed_update() -> None:
    weight, a, b = drawn(7, 5), drawn(3, 7), drawn(5, 3)
    assert (adapted(weight, LowRank(0.5, 3, transposed=True), a, b) == adapted(weight.T, LowRank(0.5, 3), a, b).T).all()


def test_blocks_do_not_change_an_element(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, a, b, m = drawn(40, 6), drawn(4, 6), drawn(40, 4), drawn(40)
    whole = [adapted(weight, LowRank(1.5, 4), *inputs) for inputs in ((a, b), (a, b, m))]
    monkeypatch.setattr("workers.merging.parent_rules.BLOCK_ELEMENTS", 20)
    assert all(
        (adapted(weight, LowRank(1.5, 4), *i) == w).all() for i, w in zip(((a, b), (a, b, m)), whole, strict=True)
    )


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rank", [1, 4, 7, 512])
def test_the_compiled_loop_has_the_bits_of_the_formula(transposed: bool, rank: int) -> None:
    a, b = drawn(rank, 600), drawn(5, rank)
    weight = drawn(*((600, 5) if transposed else (5, 600)), dtype=ml_dtypes.bfloat16)
    weight.flat[:4] = np.nan, -np.nan, np.inf, -0.0
    rule = LowRank(0.7, rank, transposed)
    change = product(b.astype(np.float64), a.astype(np.float64), fine=False) * 0.7
    with np.errstate(invalid="ignore"):
        expected = (weight + (change.T if transposed else change)).astype(ml_dtypes.bfloat16)
    assert adapted(weight, rule, a, b).tobytes() == expected.tobytes()
    adapt = row_adapter(rule, Derived("BF16", weight.shape, rule, ()), a.reshape(-1), b.reshape(-1))
    assert adapt is not None
    assert adapt(1, weight[1:4].reshape(-1)).tobytes() == expected[1:4].tobytes()


@pytest.mark.parametrize("transposed", [False, True])
def test_the_magnitudes_of_a_dora_are_the_norms_of_its_rows(transposed: bool) -> None:
    weight, a, b, magnitude = drawn(6, 5), drawn(2, 5), drawn(6, 2), np.abs(drawn(6)) + 1
    given = weight.T.copy() if transposed else weight
    found = adapted(given, LowRank(0.3, 2, transposed), a, b, magnitude)
    rows = found.T if transposed else found
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), magnitude, rtol=1e-6)
    direction = weight + 0.3 * b @ a
    np.testing.assert_allclose(
        rows / magnitude[:, None], direction / np.linalg.norm(direction, axis=1)[:, None], rtol=1e-4
    )


def test_a_bias_gets_the_scaled_bias_of_b() -> None:
    assert adapted(np.float32([1, 2]), LowRank(0.5, 4), np.float32([8, -2])).tolist() == [5, 1]


@pytest.mark.parametrize("fine", [False, True])
def test_a_product_does_not_depend_on_the_order_of_its_terms(fine: bool) -> None:
    left, right = drawn(30, 300).astype(np.float64), drawn(300, 20).astype(np.float64)
    order = GENERATOR.permutation(300)
    first, second = product(left, right, fine=fine), product(left[:, order], right[order], fine=fine)
    assert (first == second).all() or fine
    assert (left[:, order] @ right[order] != left @ right).any(), "a plain product does"
    bound = (np.abs(left) @ np.abs(right)) * (2.0**-40 if fine else 2.0**-19)
    assert (np.abs(first - left @ right) <= bound).all()


def test_infinity_and_nan_of_an_adapter_reach_the_weights() -> None:
    a, b = np.float32([[1, np.inf]]), np.float32([[1], [0], [np.nan]])
    found = adapted(np.zeros((3, 2), np.float32), LowRank(1.0, 1), a, b)
    np.testing.assert_array_equal(found, [[1, np.inf], [0, np.nan], [np.nan, np.nan]])


def test_an_empty_and_a_zero_update_change_nothing() -> None:
    weight = drawn(3, 4)
    assert (
        adapted(weight, LowRank(1.0, 2), np.zeros((2, 4), np.float32), np.zeros((3, 2), np.float32)) == weight
    ).all()
    assert adapted(drawn(0, 4), LowRank(1.0, 2), drawn(2, 4), drawn(0, 2)).shape == (0, 4)


def test_a_tensor_is_converted_with_one_rounding() -> None:
    values = np.float32([1.00390625, -3.0, 65504.0])
    derived = Derived("BF16", (3,), Scaled(), ())
    assert (scaled(Scaled(), derived, [values]) == values.astype(ml_dtypes.bfloat16)).all()


def test_rows_of_a_vocabulary_are_copies_means_and_zeros() -> None:
    own, other = drawn(4, 3, dtype=ml_dtypes.bfloat16), drawn(2, 3)
    rule = Rows(((0, 1, 2, 2), (1, 4, 0, 1)), ((3, ((0, 0), (1, 1))),), averaged=5)
    found = RULES[Rows](rule, Derived("F32", (7, 3), rule, ()), [own.reshape(-1), other.reshape(-1)]).reshape(7, 3)
    mean = (own[0].astype(np.float64) + other[1]) / 2
    expected = np.array([np.zeros(3), own[2], own[3], mean, other[0]], dtype=np.float32)
    assert (found[:5] == expected).all()
    assert (found[5:] == expected.astype(np.float64).mean(axis=0).astype(np.float32)).all()


def test_a_bias_of_a_head_has_rows_of_one_number() -> None:
    rule = Rows(((0, 0, 1, 2), (0, 2, 0, 1)))
    found = RULES[Rows](rule, Derived("F32", (3,), rule, ()), [np.array([1, 2, 3], np.float32)])
    assert found.tolist() == [2, 3, 1]


@pytest.mark.parametrize(
    ("shape", "grid", "block"),
    [
        ((6, 4), (1, 1, 1), (6, 4)),
        ((6, 4), (1, 6, 1), (1, 4)),
        ((6, 4), (1, 1, 4), (6, 1)),
        ((5, 7), (1, 3, 2), (2, 4)),
        ((3, 4, 4), (3, 2, 2), (2, 2)),
        ((3, 4, 4), (1, 1, 1), (4, 4)),
    ],
)
def test_each_scale_multiplies_its_block(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], grid: tuple[int, int, int], block: tuple[int, int]
) -> None:
    monkeypatch.setattr("workers.merging.parent_rules.BLOCK_ELEMENTS", 12)
    values, scales = drawn(*shape, dtype=ml_dtypes.float8_e4m3fn), np.abs(drawn(*grid))
    rule = Scaled(grid, block)
    derived = Derived("BF16", shape, rule, ())
    found = scaled(rule, derived, [values.reshape(-1), scales.reshape(-1)]).reshape(-1, *shape[-2:])
    for (plane, row, column), value in np.ndenumerate(values.reshape(found.shape)):
        scale = scales[plane if grid[0] > 1 else 0, row // block[0], column // block[1]]
        assert found[plane, row, column] == ml_dtypes.bfloat16(np.float32(value) * scale)
