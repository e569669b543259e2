"""Rows and batches are arithmetic on token ids: checked by rebuilding every prompt from them."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from workers.engines.packing import batches, columns, common_prefix, make_rows

prompts_ = st.lists(
    st.tuples(st.sampled_from(["", "a", "b"]), st.lists(st.integers(0, 2), min_size=1, max_size=12), st.integers(1, 5)),
    min_size=1,
    max_size=12,
)


def rows_of(prompts, max_branches):
    ids = [np.array(tokens) for _, tokens, _ in prompts]
    return ids, make_rows(ids, [prefix for prefix, _, _ in prompts], [new for _, _, new in prompts], max_branches)


@given(prompts_, st.integers(1, 4))
def test_every_prompt_is_its_trunk_and_its_branch(prompts, max_branches):
    ids, rows = rows_of(prompts, max_branches)
    rebuilt = {
        member: [*row.trunk, *branch] for row in rows for member, branch in zip(row.members, row.branches, strict=True)
    }
    assert rebuilt == {index: list(tokens) for index, tokens in enumerate(ids)}
    assert all(len(branch) > 0 and len(row.branches) <= max_branches for row in rows for branch in row.branches)


@given(prompts_, st.integers(1, 4), st.integers(1, 60))
def test_batches_keep_every_row_once_and_stay_within_their_limits(prompts, max_branches, max_cells):
    _, rows = rows_of(prompts, max_branches)
    made = list(batches(rows, max_branches=max_branches, max_cells=max_cells))
    assert [row.members for batch in made for row in batch] == [row.members for row in rows]
    for batch in made:
        assert len(batch) == 1 or len(batch) * columns(batch) <= max_cells
        assert len(batch) == 1 or sum(len(row.branches) for row in batch) <= max_branches


def test_prompts_without_a_prefix_stand_alone_and_neighbours_with_one_share_a_trunk():
    prompts = [("p", [1, 2, 3, 4], 1), ("p", [1, 2, 5], 1), ("", [1, 2, 3], 1), ("", [1, 2, 3], 1)]
    _, rows = rows_of(prompts, 8)
    shared = next(row for row in rows if len(row.members) == 2)
    assert list(shared.trunk) == [1, 2]
    assert [list(branch) for branch in shared.branches] == [[3, 4], [5]]
    assert sorted(row.members for row in rows if len(row.members) == 1) == [(2,), (3,)]


def test_equal_prompts_leave_each_branch_its_last_token():
    _, rows = rows_of([("p", [1, 2, 3], 1), ("p", [1, 2, 3], 1)], 8)
    assert [list(branch) for branch in rows[0].branches] == [[3], [3]]


def test_rows_of_one_length_lie_beside_those_that_share_most():
    prompts = [("", [1, 1, 1, 1], 1), ("", [2, 1, 1, 1], 1), ("", [1, 1, 1, 2], 1), ("", [2, 1, 1, 2], 1)]
    _, rows = rows_of(prompts, 8)
    assert [row.trunk[0] for row in rows] in ([1, 1, 2, 2], [2, 2, 1, 1])


def test_common_prefix_counts_equal_leading_ids():
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert common_prefix(np.array([1, 2]), np.array([1, 2, 3])) == 2
    assert common_prefix(np.array([1]), np.array([2])) == 0
