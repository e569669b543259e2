"""Rows and batches are arithmetic on token ids: checked by rebuilding every prompt from them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.engines.packing import Pool, columns, common_prefix, make_rows, pools, smaller

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
def test_pools_keep_every_row_once_and_stay_within_their_limits(prompts, max_branches, max_cells):
    _, rows = rows_of(prompts, max_branches)
    made = list(pools(rows, max_branches=max_branches, max_cells=max_cells))
    assert [row.members for pool in made for row in pool.rows] == [row.members for row in rows]
    for pool in made:
        assert 1 <= pool.slots <= len(pool.rows)
        assert all(columns(row) <= pool.columns and len(row.branches) <= pool.width for row in pool.rows)
        assert pool.slots == 1 or pool.slots * pool.columns <= max_cells
        assert pool.slots == 1 or pool.slots * pool.width <= max_branches


def test_a_short_row_does_not_wait_for_the_slot_of_a_long_one():
    _, rows = rows_of([("", [at] * length, 1) for at, length in enumerate((60, 60, 28, 28, 28, 28))], 8)
    long, short = pools(rows, max_branches=8, max_cells=122)
    assert [len(row.trunk) + 1 for row in long.rows] == [60, 60] and long.slots == 2
    assert [len(row.trunk) + 1 for row in short.rows] == [28] * 4 and short.slots == 4
    assert len(list(pools(rows, max_branches=2, max_cells=122))) == 1, "more memory would give it no more slots"


@given(prompts_, st.integers(1, 4))
def test_a_smaller_pool_has_the_same_prompts_and_ends_at_one_at_a_time(prompts, max_branches):
    ids, rows = rows_of(prompts, max_branches)
    pool = Pool(tuple(rows), len(rows))
    while (less := smaller(pool)) is not None:
        assert less.slots * less.width < pool.slots * pool.width
        assert sorted(m for row in less.rows for m in row.members) == list(range(len(ids)))
        for row in less.rows:
            for member, branch, new in zip(row.members, row.branches, row.new_tokens, strict=True):
                assert [*row.trunk, *branch] == list(ids[member]) and new == prompts[member][2]
        pool = less
    assert pool.slots == pool.width == 1


def test_prompts_without_a_prefix_stand_alone_and_neighbours_with_one_share_a_trunk():
    prompts = [("p", [1, 2, 3, 4], 1), ("p", [1, 2, 5], 1), ("", [1, 2, 3], 1), ("", [1, 2, 4], 1)]
    _, rows = rows_of(prompts, 8)
    shared = next(row for row in rows if len(row.members) == 2)
    assert list(shared.trunk) == [1, 2]
    assert [list(branch) for branch in shared.branches] == [[3, 4], [5]]
    assert sorted(row.members for row in rows if len(row.members) == 1) == [(2,), (3,)]


@pytest.mark.parametrize("prefix", ["p", ""])
def test_equal_prompts_leave_each_branch_its_last_token(prefix):
    _, rows = rows_of([(prefix, [1, 2, 3], 1), (prefix, [1, 2, 3], 1)], 8)
    assert [list(branch) for branch in rows[0].branches] == [[3], [3]]


def test_long_answers_share_a_row_as_far_as_the_trunk_outweighs_them():
    _, rows = rows_of([("p", [*range(40), at], 20) for at in range(6)], 8)
    assert [row.members for row in rows] == [(0, 1, 2, 3), (4, 5)], "80 new tokens are twice a trunk of 40"
    assert all(list(row.trunk) == list(range(40)) for row in rows)


def test_rows_of_one_length_lie_beside_those_that_share_most():
    prompts = [("", [1, 1, 1, 1], 1), ("", [2, 1, 1, 1], 1), ("", [1, 1, 1, 2], 1), ("", [2, 1, 1, 2], 1)]
    _, rows = rows_of(prompts, 8)
    assert [row.trunk[0] for row in rows] in ([1, 1, 2, 2], [2, 2, 1, 1])


def test_common_prefix_counts_equal_leading_ids():
    assert common_prefix(np.array([1, 2, 3]), np.array([1, 2, 4, 5])) == 2
    assert common_prefix(np.array([1, 2]), np.array([1, 2, 3])) == 2
    assert common_prefix(np.array([1]), np.array([2])) == 0
