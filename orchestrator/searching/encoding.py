"""Points of a space as numbers: features for distances, and points from the unit cube for sequences and draws."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from jobs.search import Choice, Space

FloatArray = NDArray[np.float64]


def features(space: Space, choices: Sequence[Choice]) -> FloatArray:
    """One number for each axis [points, axes]: the place in the range from 0 to 1, or the index of a word."""
    table = np.asarray(choices, dtype=np.intp).reshape(len(choices), len(space.axes))
    columns: list[FloatArray] = []
    for column, axis in zip(table.T, space.axes, strict=True):
        if axis.kind == "words":
            places = np.arange(len(axis.values), dtype=np.float64)
        else:
            values = np.array([float(value) for value in axis.values if isinstance(value, Fraction)])
            places = (values - values[0]) / (float(values[-1] - values[0]) or 1.0)
        columns.append(places[column])
    return np.stack(columns, axis=1)


def squared_distances(space: Space, first: FloatArray, second: FloatArray) -> FloatArray:
    """Squared distance along each axis [axes, first, second]; 1 between different words (half of one-hot's 2)."""
    gaps = (first[:, None, :] - second[None, :, :]).transpose(2, 0, 1)
    words = np.array([axis.kind == "words" for axis in space.axes])
    return np.where(words[:, None, None], (gaps != 0).astype(np.float64), gaps**2)


def scaled(space: Space, places: FloatArray, lengths: FloatArray) -> FloatArray:
    """Features in units of their length scales [points, columns]: Euclidean distances are those of the kernel.

    A word is a column for each word of its axis, so that two words are at a distance of 1 before the scaling.
    """
    columns: list[FloatArray] = []
    for column, axis, length in zip(places.T, space.axes, lengths.tolist(), strict=True):
        if axis.kind == "words":
            columns += [np.sqrt(0.5) / length * (column == word) for word in range(len(axis.values))]
        else:
            columns.append(column / length)
    return np.stack(columns, axis=1)


def decoded(space: Space, cube: FloatArray) -> list[Choice]:
    """The points at these places of the unit cube [points, axes]; uniform over the space if the places are.

    The axes of a simplex take −log u as weights, which are uniform on the simplex, rounded to its steps by the
    largest remainders. An empty subset takes the member with the largest u.
    """
    inside = np.clip(cube, 1e-9, 1 - 1e-9)
    sizes = np.array([len(axis.values) for axis in space.axes])
    table = np.floor(inside * sizes).astype(np.intp)
    number = {axis.name: index for index, axis in enumerate(space.axes)}
    for group in space.simplexes:
        columns = [number[name] for name in group]
        table[:, columns] = _rounded(-np.log(inside[:, columns]), int(sizes[columns[0]]) - 1)
    for group in space.subsets.values():
        columns = np.array([number[name] for name in group])
        empty = np.flatnonzero(table[:, columns].sum(axis=1) == 0)
        table[empty, columns[np.argmax(inside[np.ix_(empty, columns)], axis=1)]] = 1
    return [tuple(row) for row in table.tolist()]


def _rounded(weights: FloatArray, steps: int) -> NDArray[np.intp]:
    """Whole numbers [points, axes] in the ratio of the weights that sum to `steps`."""
    shares = weights / weights.sum(axis=1, keepdims=True) * steps
    whole = np.floor(shares).astype(np.intp)
    order = np.argsort(np.argsort(whole - shares, axis=1, kind="stable"), axis=1, kind="stable")
    return whole + (order < (steps - whole.sum(axis=1, keepdims=True)))


def encoded(space: Space, choice: Choice) -> FloatArray:
    """A place in the unit cube [axes] that `decoded` turns into this point."""
    sizes = np.array([len(axis.values) for axis in space.axes])
    place = (np.array(choice) + 0.5) / sizes
    number = {axis.name: index for index, axis in enumerate(space.axes)}
    for group in space.simplexes:
        columns = [number[name] for name in group]
        place[columns] = np.exp(-(np.array(choice)[columns] + 1e-6) / (sizes[columns[0]] - 1))
    return place


def all_choices(space: Space) -> Iterator[Choice]:
    """Every point, for spaces that are small enough."""
    number = {axis.name: index for index, axis in enumerate(space.axes)}
    grouped = [*space.simplexes, *space.subsets.values()]
    tied = {name for group in grouped for name in group}
    parts: list[list[tuple[tuple[int, int], ...]]] = [
        [((number[axis.name], index),) for index in range(len(axis.values))]
        for axis in space.axes
        if axis.name not in tied
    ]
    for group in space.simplexes:
        columns, steps = [number[name] for name in group], len(space.axes[number[group[0]]].values) - 1
        parts.append([tuple(zip(columns, row, strict=True)) for row in _sums(steps, len(group))])
    for group in space.subsets.values():
        columns = [number[name] for name in group]
        rows = itertools.islice(itertools.product((0, 1), repeat=len(group)), 1, None)
        parts.append([tuple(zip(columns, row, strict=True)) for row in rows])
    for combination in itertools.product(*parts):
        chosen = dict(itertools.chain.from_iterable(combination))
        yield tuple(chosen[index] for index in range(len(space.axes)))


def _sums(total: int, count: int) -> Iterator[tuple[int, ...]]:
    if count == 1:
        yield (total,)
        return
    for first in range(total + 1):
        yield from ((first, *rest) for rest in _sums(total - first, count - 1))
