"""Replays searches on stored answers: how far the found point is below the best, and by how much its score flatters.

    python -m tests.benchmarks.search.truth FOLDER                # makes the answers; hours
    python -m tests.benchmarks.search.replay FOLDER --seeds 100   # needs cmaes and optuna beside mergeyard

Three spaces. `line` (101 points between two parents) and `triangle` (231 mixtures of three) have the measured answers
of FOLDER; between measured mixtures an item has the answer of one of the nearest, the nearer the likelier, so that the
truth is linear there. `eight` (8 axes of 21 values) is synthetic: items of uneven difficulty around a smooth hill.

The truth is the mean over all stored items. A search sees a random part of them, in random order. The budget B is what
a grid of 11 points (66 in the triangle, 16 random ones in `eight`) with the shipped race costs. Peers ask 40 items
a candidate, the same for all, and show the best score seen, as they do: `random`; `evolve`, the rule of mergekit-evolve
(CMA-ES from the middle, σ 1/6); Optuna's TPE and GP. `sobol` and `gp` are the shipped search.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from jobs.search import Axis, Budget, Choice, SearchSpec, Space
from orchestrator.judging.race import Race
from orchestrator.judging.samples import Cell
from orchestrator.searching.encoding import all_choices, decoded
from orchestrator.searching.search import Search

ITEMS, PEERS_ITEMS = 200, 40
Array = np.ndarray[Any, Any]


def axis(name: str, steps: int) -> Axis:
    """0, 1/steps, … 1."""
    return Axis(name, tuple(Fraction(index, steps) for index in range(steps + 1)), "numbers", "")


LINE = Space((axis("w", 100),))
TRIANGLE = Space((axis("a", 20), axis("b", 20), axis("c", 20)), simplexes=(("a", "b", "c"),))
EIGHT = Space(tuple(axis(f"x{index}", 20) for index in range(8)))


class Measured:
    """The answers of the three parents' mixtures, with random switches between measured neighbours."""

    def __init__(self, folder: Path, space: Space, seed: int) -> None:
        rounds = [np.load(path) for path in sorted(folder.glob("round-*.npz"))]
        self._row = {tuple(point): row for row, point in enumerate(rounds[0]["points"].tolist())}
        self._answers = np.concatenate([each["scores"] for each in rounds], axis=2)
        self._steps = sum(rounds[0]["points"][0].tolist())
        self._space, random = space, np.random.default_rng(seed)
        self.cells, self.count = self._answers.shape[1:]
        self.order = random.permutation(self.count)
        self._switch = random.random((self.cells, self.count))
        self.grid = [c for c in all_choices(space) if all(index % (10 if space is LINE else 2) == 0 for index in c)]

    def all_scores(self, choice: Choice) -> Array:
        """Of all items [cells, items], in the order of this seed."""
        shares = np.array([float(each) for each in self._space.bindings(choice).values() if isinstance(each, Fraction)])
        weights = np.array([shares[0], 1 - shares[0], 0.0]) if self._space is LINE else shares
        exact = weights * self._steps
        floor = np.floor(exact + 1e-9)
        rest, missing = exact - floor, round(self._steps - floor.sum())
        corners: list[tuple[float, tuple[int, ...]]] = []
        if missing == 0:
            corners.append((1.0, tuple(floor.astype(int).tolist())))
        for index in range(3):
            up = np.eye(3)[index]
            corner, weight = (floor + up, rest[index]) if missing == 1 else (floor + 1 - up, 1 - rest[index])
            if missing and weight > 1e-9:
                corners.append((float(weight), tuple(corner.astype(int).tolist())))
        edges = np.cumsum([weight for weight, _ in corners])
        chosen = np.minimum(np.searchsorted(edges, self._switch), len(corners) - 1)
        stacked = np.stack([self._answers[self._row[corner]] for _, corner in corners])
        return np.take_along_axis(stacked, chosen[None], axis=0)[0][:, self.order]

    def truth(self, choice: Choice) -> float:
        """Mean over all items."""
        return float(self.all_scores(choice).mean())

    def best(self) -> float:
        """The highest truth of the space."""
        return max(self.truth(choice) for choice in all_choices(self._space))


class Synthetic:
    """A hill in eight dimensions: two axes matter most; items differ in difficulty and in what they ask of the axes."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.cells, self.count = 5, 2000
        self._top = random.random(8) * 0.6 + 0.2
        self._steep = random.permutation([9.0, 6.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.5])
        self._ease = random.normal(1.5, 1.5, (5, self.count))
        self._slope = random.normal(0, 0.7, (8, 5, self.count))
        self._seed = seed
        self.grid = decoded(EIGHT, random.random((16, 8)))

    def _chances(self, choice: Choice) -> Array:
        place = np.array(choice) / 20 - self._top
        logit = self._ease - float(self._steep @ place**2) + np.tensordot(place, self._slope, axes=1)
        return 1 / (1 + np.exp(-logit))

    def all_scores(self, choice: Choice) -> Array:
        """Of all items [cells, items]."""
        random = np.random.default_rng([self._seed, *choice])
        return (random.random((self.cells, self.count)) < self._chances(choice)).astype(float)

    def truth(self, choice: Choice) -> float:
        """Mean chance over all items."""
        return float(self._chances(choice).mean())

    def best(self) -> float:
        """The highest truth that a climb along the axes from the top finds."""
        choice = tuple(round(20 * float(each)) for each in self._top)
        while True:
            near = [(*choice[:at], choice[at] + by, *choice[at + 1 :]) for at in range(8) for by in (-1, 1)]
            better = max((each for each in near if min(each) >= 0 and max(each) <= 20), key=self.truth)
            if self.truth(better) <= self.truth(choice):
                return self.truth(choice)
            choice = better


World = Measured | Synthetic


def grid_and_race(world: World) -> tuple[Choice, float, float]:
    """Winner, shown score and cost (items of a cell) of the shipped race over the grid."""
    names = {f"{number:04d}": choice for number, choice in enumerate(world.grid)}
    cells = [Cell(f"t{index}", 1) for index in range(world.cells)]
    race = Race([*names], cells, rungs=[10, 25, 60, 150, ITEMS], alpha=0.05)
    known = {name: world.all_scores(choice) for name, choice in names.items()}
    while blocks := race.next_blocks():
        for block in blocks:
            scores = known[block.point][cells.index(block.cell), block.items.start : block.items.stop]
            race.record(block.point, block.cell, block.items, scores)
        race.eliminate()
    winner = race.standing()[0]
    return names[winner.point], winner.score, race.spent() / world.cells


def shipped(world: World, space: Space, by: Any, budget: float, seed: int) -> tuple[Choice, float, bool]:
    """Winner, shown score and whether it is sure, of the shipped search."""
    cells = [Cell(f"t{index}", 1) for index in range(world.cells)]
    spec = SearchSpec(space=space, by=by, budget=Budget(), batch=8)
    search = Search(spec, cells, items=ITEMS, seed=seed, limit=budget * world.cells)
    while not search.finished:
        while search.due is not None:
            search.add(search.propose())
        for block in search.next_blocks():
            scores = world.all_scores(search.choices[block.point])[cells.index(block.cell)]
            search.record(block.point, block.cell, block.items, scores[block.items.start : block.items.stop])
        search.close()
    winner = search.standing()[0]
    return winner.choice, winner.score, winner.best >= 0.95


def peer(world: World, space: Space, budget: float, ask: Callable[..., Any]) -> tuple[Choice, float]:
    """The best score seen, over candidates from `ask(asked)`, which may look at the earlier ones."""
    seen: list[tuple[Choice, float]] = []
    known: dict[Choice, float] = {}
    for _ in range(int(budget / PEERS_ITEMS)):
        choice = decoded(space, np.asarray(ask(seen))[None])[0]
        if choice not in known:
            known[choice] = float(world.all_scores(choice)[:, :PEERS_ITEMS].mean())
        seen.append((choice, known[choice]))
    return max(seen, key=lambda each: each[1])


def evolve(space: Space, seed: int) -> Callable[..., Any]:
    """mergekit-evolve's rule: CMA-ES from the middle, σ 1/6, its own population."""
    from cmaes import CMA

    size = len(space.axes)
    optimizer = CMA(np.full(size, 0.5), 1 / 6, bounds=np.tile([0.0, 1.0], (size, 1)), seed=seed)
    asked: list[Array] = []

    def ask(seen: list[tuple[Choice, float]]) -> Array:
        if seen and len(seen) % optimizer.population_size == 0:
            told = list(zip(asked[-optimizer.population_size :], seen[-optimizer.population_size :], strict=True))
            optimizer.tell([(place, -score) for place, (_, score) in told])
        asked.append(optimizer.ask())
        return asked[-1]

    return ask


def optuna_study(space: Space, seed: int, sampler: str) -> Callable[..., Any]:
    """Optuna's TPE or GP over the unit cube."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    made = optuna.samplers.TPESampler(seed=seed) if sampler == "tpe" else optuna.samplers.GPSampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=made)
    trials: list[Any] = []

    def ask(seen: list[tuple[Choice, float]]) -> Array:
        if seen:
            study.tell(trials[-1], seen[-1][1])
        trials.append(study.ask())
        return np.array([trials[-1].suggest_float(each.name, 0.0, 1.0) for each in space.axes])

    return ask


def asker(method: str, space: Space, seed: int) -> Callable[..., Any]:
    """The peer's way to choose the next place of the unit cube, from the candidates so far."""
    if method == "evolve":
        return evolve(space, seed)
    if method in ("tpe", "optuna-gp"):
        return optuna_study(space, seed, method)
    random = np.random.default_rng(seed)
    return lambda seen: random.random(len(space.axes))


def main() -> None:
    """Reads the arguments, replays, and prints a table for each space."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--spaces", default="line,triangle,eight")
    parser.add_argument("--methods", default="gp,sobol,random,evolve,tpe,optuna-gp")
    arguments = parser.parse_args()
    spaces = {"line": LINE, "triangle": TRIANGLE, "eight": EIGHT}
    for name in arguments.spaces.split(","):
        space, regrets, flattery, sure, costs = spaces[name], {}, {}, [], []
        for seed in range(arguments.seeds):
            world = Synthetic(seed) if name == "eight" else Measured(arguments.folder, space, seed)
            best = world.best()
            choice, shown, cost = grid_and_race(world)
            costs.append(cost)
            found = {("grid + race", 1.0): (choice, shown)}
            for share in (0.5, 1.0, 2.0):
                for method in arguments.methods.split(","):
                    if method in ("gp", "sobol"):
                        choice, shown, is_sure = shipped(world, space, method, share * cost, seed)
                        sure += [is_sure] if method == "gp" and share == 1 else []
                        found[method, share] = choice, shown
                        continue
                    found[method, share] = peer(world, space, share * cost, asker(method, space, seed))
            for key, (choice, shown) in found.items():
                regrets.setdefault(key, []).append(100 * (best - world.truth(choice)))
                flattery.setdefault(key, []).append(100 * (shown - float(world.all_scores(choice)[:, ITEMS:].mean())))
        print(
            f"{name}: {arguments.seeds} seeds, B = {np.mean(costs):.0f} items a cell, sure {np.mean(sure or [0]):.2f}"
        )
        for key in sorted(regrets, key=lambda each: (each[1], each[0])):
            mean, error = np.mean(flattery[key]), np.std(flattery[key]) / math.sqrt(arguments.seeds)
            better = np.mean(np.array(regrets.get(("gp", key[1]), regrets[key])) <= np.array(regrets[key]))
            print(
                f"  {key[0]:12s} {key[1]:3.1f} B: regret median {np.median(regrets[key]):5.2f}, mean "
                f"{np.mean(regrets[key]):5.2f}; shown - fresh {mean:+5.2f} ± {error:.2f}; gp as good in {better:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
