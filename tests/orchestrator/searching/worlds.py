"""Spaces, and points whose answers follow a known surface: for tests of the search."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from jobs.search import Axis, Choice, Space
from orchestrator.judging.samples import Cell
from orchestrator.searching.search import Batch, Search

CELLS = [Cell("niah", 256, "ruler"), Cell("niah", 512, "ruler"), Cell("json", 256, "needle")]
ITEMS = 160


def numbers(name: str, steps: int) -> Axis:
    """0, 1/steps, … 1."""
    return Axis(name, tuple(Fraction(index, steps) for index in range(steps + 1)), "numbers", "here")


LINE = Space((numbers("w", 100),))
TRIANGLE = Space((numbers("a", 20), numbers("b", 20), numbers("c", 20)), simplexes=(("a", "b", "c"),))
MIXED = Space(
    (
        numbers("w", 10),
        Axis("method", ("linear", "ties", "ram"), "words", "here"),
        numbers("p.x", 1),
        numbers("p.y", 1),
    ),
    subsets={"p": ("p.x", "p.y")},
)


class World:
    """Answers that are right with a chance that falls with the distance from `best`, on items of uneven difficulty."""

    def __init__(self, space: Space, height: Callable[[NDArray[np.float64]], float], seed: int = 0) -> None:
        self._space, self._height, self._seed = space, height, seed
        random = np.random.Generator(np.random.Philox(key=seed))
        self._ease = random.normal(0, 1, (len(CELLS), ITEMS))

    def chances(self, choice: Choice) -> NDArray[np.float64]:
        """Of each item [cells, items]."""
        place = np.array(
            [index / max(1, len(axis.values) - 1) for index, axis in zip(choice, self._space.axes, strict=True)]
        )
        return 1 / (1 + np.exp(-(self._height(place) + self._ease)))

    def scores(self, choice: Choice) -> NDArray[np.float64]:
        """Of all items [cells, items]."""
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed, *choice])))
        return (random.random(self._ease.shape) < self.chances(choice)).astype(np.float64)


def run(
    search: Search,
    world: World,
    *,
    shuffled: np.random.Generator | None = None,
    parents: dict[str, Choice] | None = None,
    written: list[Batch] | None = None,
) -> Search:
    """Runs it to its end: blocks in the order given or shuffled, batches as proposed or as written before."""
    while not search.finished:
        while (number := search.due) is not None:
            search.add(written[number] if written and number < len(written) else search.propose())
        blocks = search.next_blocks()
        if shuffled is not None:
            shuffled.shuffle(blocks)
            blocks = blocks[: max(1, len(blocks) // 2)]
        for block in blocks:
            choice = (parents or {}).get(block.point) or search.choices[block.point]
            scores = world.scores(choice)[CELLS.index(block.cell), block.items.start : block.items.stop]
            search.record(block.point, block.cell, block.items, scores)
        search.close()
    return search
