"""CMA-ES over many axes: the next points are drawn around the mean of the best, with a covariance learned from them.

The optimiser is CMA-ES with margin (Hamano et al. 2022, arXiv 2205.13482; the library cmaes), which keeps steps apart
on axes that have steps. No state is kept: it is made anew for each batch from the points in the order of asking, a
generation at a time, and draws by a key of its own. Points of a generation are sorted by the expected weight of their
rank over joint draws of the posterior, so that a lucky score of few items counts little (expected rank weights under
resampling: arXiv 2606.06555).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from jobs.search import Choice, Space
from orchestrator.searching.encoding import decoded, encoded

FloatArray = NDArray[np.float64]
FIRST_STEP = 1 / 6
"""Standard deviation of the first draws, as a share of each axis; that of mergekit-evolve."""
MOST_DRAWS = 100_000
"""Draws after which a batch takes what it has: the distribution has shrunk to points that were asked."""


def generation_size(space: Space, batch: int) -> int:
    """Points of a generation: whole batches, at least 4 + ⌊3 ln axes⌋ (Hansen 2016, arXiv 1604.00772)."""
    axes = max(1, sum(len(axis.values) > 1 for axis in space.axes))
    return -(-(4 + math.floor(3 * math.log(axes))) // batch) * batch


def evolved(
    space: Space,
    generations: Sequence[tuple[Sequence[Choice], FloatArray]],
    centre: FloatArray,
    *,
    size: int,
    seed: int,
) -> Iterator[Choice]:
    """Points drawn after these generations, without end.

    Args:
        generations: the points of each generation, `size` of them, and joint draws of their values [draws, points].
        centre: the first mean, a place of the unit cube [axes].
        seed: of the draws, below 2³².
    """
    from cmaes import CMAwM

    sizes = np.array([len(axis.values) for axis in space.axes])
    free = np.flatnonzero(sizes > 1)
    tied = {name for group in space.simplexes for name in group}
    cells = np.array([0.0 if space.axes[axis].name in tied else 1 / sizes[axis] for axis in free])
    bounds = np.stack([cells / 2, 1 - cells / 2], axis=1)
    mean = np.clip(centre[free], bounds[:, 0], bounds[:, 1])
    optimizer = CMAwM(mean, FIRST_STEP, bounds, cells, population_size=size)
    for choices, draws in generations:
        worth = expected_weights(draws)
        places = [encoded(space, choice)[free] for choice in choices]
        optimizer.tell([(place, -float(value)) for place, value in zip(places, worth, strict=True)])
    optimizer.reseed_rng(seed)
    place = np.full(len(sizes), 0.5)
    for _ in range(MOST_DRAWS):
        place[free] = optimizer.ask()[0]
        yield from decoded(space, place[None])


def expected_weights(draws: FloatArray) -> FloatArray:
    """Mean over draws [draws, points] of the weight log((n + 1) / 2) − log(rank) of each point, the best of rank 1."""
    count = draws.shape[1]
    weights = math.log((count + 1) / 2) - np.log(np.arange(1, count + 1))
    ranks = np.argsort(np.argsort(-draws, axis=1, kind="stable"), axis=1, kind="stable")
    return weights[ranks].mean(axis=0)
