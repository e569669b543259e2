from __future__ import annotations

import numpy as np
import pytest

from jobs.search import Space
from orchestrator.searching.encoding import all_choices, decoded, encoded, features, scaled, squared_distances
from tests.orchestrator.searching.worlds import LINE, MIXED, TRIANGLE


@pytest.mark.parametrize(("space", "size"), [(LINE, 101), (TRIANGLE, 231), (MIXED, 11 * 3 * 3)])
def test_every_point_is_listed_once_and_admitted(space: Space, size: int):
    listed = [*all_choices(space)]
    assert len(listed) == len({*listed}) == space.size == size
    assert all(space.admits(choice) for choice in listed)


@pytest.mark.parametrize("space", [LINE, TRIANGLE, MIXED])
def test_a_point_goes_to_the_unit_cube_and_back(space: Space):
    listed = [*all_choices(space)]
    assert decoded(space, np.stack([encoded(space, choice) for choice in listed])) == listed


@pytest.mark.parametrize("space", [LINE, TRIANGLE, MIXED])
def test_places_of_the_unit_cube_are_points(space: Space):
    random = np.random.Generator(np.random.Philox(key=3))
    cube = np.concatenate(
        [random.random((200, len(space.axes))), np.zeros((1, len(space.axes))), np.ones((1, len(space.axes)))]
    )
    assert all(space.admits(choice) for choice in decoded(space, cube))


def test_uniform_places_are_uniform_on_a_simplex():
    random = np.random.Generator(np.random.Philox(key=3))
    weights = np.array(decoded(TRIANGLE, random.random((4000, 3)))) / 20
    assert weights.mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.015)
    assert (weights[:, 0] > 0.5).mean() == pytest.approx(1 / 4, abs=0.03)  # a quarter of the triangle's area


def test_words_are_one_apart_and_numbers_as_far_as_their_values():
    seen = features(MIXED, [(0, 0, 1, 1), (5, 2, 1, 1)])
    assert squared_distances(MIXED, seen, seen)[:, 0, 1].tolist() == [0.25, 1.0, 0.0, 0.0]
    lengths = np.array([0.5, 2.0, 1.0, 1.0])
    first, second = scaled(MIXED, seen, lengths)
    assert np.sum((first - second) ** 2) == pytest.approx((0.5 / 0.5) ** 2 + (1 / 2.0) ** 2)
