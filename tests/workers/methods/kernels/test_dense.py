"""Products and systems of equations against numpy; their bits do not depend on the rows that are computed together."""

from __future__ import annotations

import numpy as np
import pytest

from workers.methods.kernels.dense import add_product, solved


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("rows", "terms", "columns"), [(1, 1, 1), (7, 13, 300), (4, 256, 257), (5, 0, 3)])
def test_a_product_is_that_of_numpy(dtype: type, rows: int, terms: int, columns: int):
    rng = np.random.default_rng(rows)
    left, right = (rng.standard_normal(shape).astype(dtype) for shape in ((rows, terms), (terms, columns)))
    into = rng.standard_normal((rows, columns)).astype(dtype)
    expected = into + left.astype(np.float64) @ right.astype(np.float64)
    add_product(left, right, into)
    assert into == pytest.approx(expected, rel=0, abs=terms * 4 * float(np.finfo(dtype).eps))


def test_bits_do_not_depend_on_the_rows_and_columns_of_a_call():
    rng = np.random.default_rng(1)
    left, right = rng.standard_normal((23, 50)), rng.standard_normal((50, 600))
    whole = np.zeros((23, 600))
    add_product(left, right, whole)
    for rows, columns in ((slice(5, 6), slice(0, 600)), (slice(9, 23), slice(131, 140))):
        part = np.zeros((600, 600))[: rows.stop - rows.start, : columns.stop - columns.start]
        add_product(left[rows], right[:, columns], part)
        assert (part == whole[rows, columns]).all()


@pytest.mark.parametrize("size", [1, 63, 64, 65, 200])
def test_a_solution_is_that_of_numpy(size: int):
    rng = np.random.default_rng(size)
    inputs = rng.standard_normal((3 * size, size))
    matrix, right = inputs.T @ inputs, rng.standard_normal((size, size + 3))
    assert solved(matrix, right) == pytest.approx(np.linalg.solve(matrix, right), rel=1e-9, abs=1e-11)


def test_a_matrix_that_is_not_positive_definite_gives_nan():
    assert np.isnan(solved(np.array([[1.0, 2.0], [2.0, 1.0]]), np.eye(2))).any()
