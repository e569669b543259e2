"""Replays searches on drawn answers: how far the found point is below the best, and by how much its score flatters.

    python -m tests.benchmarks.search.replay ROWS.jsonl --seeds 100   # needs cmaes, optuna and pymoo beside mergeyard

Five spaces. `line` (101 points between two parents) and `triangle` (231 mixtures of three) have surfaces that are
fitted to measured answers of the example parents (`counts.csv`, which `truth.py` makes). The best points of both lie
beside the grid's; `coarse` is the triangle with a coarser grid. `flat` is a line on which all points are equally good.
`eight` has shares of two parents by layer, in attention and MLPs (`eight.py`), and measured surfaces as well.

The truth is the mean over 2,000 items of each of five cells. A search may see the first 200. The budget B is what a
grid of 11 points (66 in the triangle, 21 in `coarse`, 16 random ones in `eight`) with the shipped race costs. Peers ask
40 items of each cell for a candidate, the same for all, and show the best score seen, as they do: `random`; `evolve`,
the rule of mergekit-evolve (CMA-ES from the middle, σ 1/6); Optuna's TPE and GP. `mergenetic` is its genetic algorithm
on estimates by item response theory from 20 items (`estimated`). `sobol` and `gp` are the shipped search; `gp-middle`
begins in the middle of the space alone, as CMA-ES does, and not at its ends too.

Two rows show what remains where nothing is searched. `three-best` asks only the three best points, as many items of
each as B allows. `all-items` asks the 200 items of every point, whatever that costs. Both take the highest mean.

Each run of a method is a line of ROWS.jsonl. Runs that stand there are not repeated.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit, ndtr, ndtri

from jobs.search import Axis, Budget, Choice, SearchSpec, Space
from orchestrator.judging.race import Race
from orchestrator.judging.samples import Cell
from orchestrator.searching.encoding import all_choices, decoded
from orchestrator.searching.search import Search
from tests.benchmarks.search import eight
from tests.benchmarks.search.eight import PARTS, matern, measured

COUNTS = Path(__file__).with_name("counts.csv")
ITEMS, PEERS_ITEMS, ANCHORS = 200, 40, 20
DRAWN = 2000
"""Items of a cell."""
SURFACE_LENGTH, ITEM_LENGTH = 0.3, 0.8
"""Length scales (1 is the distance of two parents) of a cell's surface, and of an item's deviation from it. With the
latter, right answers of two mixtures at distances 0.05, 0.2, 0.4, 0.6 and 1 have the correlations 0.73, 0.54, 0.37,
0.23 and 0.19; `truth.py` measures 0.76, 0.51, 0.35, 0.23 and 0.12."""
EIGHT_ITEM_LENGTH, FREQUENCIES = 1.8, 200
"""The length scale of an item's deviation in the eight axes (1 is an axis), and random frequencies. With these, right
answers of two points at distances 0.4, 0.8, 1.2 and 1.6 have the correlations 0.65, 0.47, 0.34 and 0.25; measured were
0.64, 0.49, 0.37 and 0.27."""
Array = np.ndarray[Any, Any]


def axis(name: str, steps: int) -> Axis:
    """0, 1/steps, … 1."""
    return Axis(name, tuple(Fraction(index, steps) for index in range(steps + 1)), "numbers", "")


LINE = Space((axis("w", 100),))
TRIANGLE = Space((axis("a", 20), axis("b", 20), axis("c", 20)), simplexes=(("a", "b", "c"),))
EIGHT = Space(tuple(axis(f"x{index}", 20) for index in range(8)))


def smoothness(first: Array, second: Array, length: float) -> Array:
    """Matérn 3/2 between mixtures [points, 3]."""
    return matern(np.linalg.norm(first[:, None] - second[None], axis=-1) / math.sqrt(2) / length)


def surface(table: Array, places: Array) -> Array:
    """Probits of the cells' scores [places, cells] at mixtures [places, 3], from rows of `counts.csv`.

    A Gaussian process for each cell, with the binomial error of the counts as its noise.
    """
    known, asked, right = table[:, :3], table[:, 3:4], table[:, 4:]
    share = (right + 0.5) / (asked + 1)
    level = ndtri(share)
    error = share * (1 - share) / (asked + 1) * (2 * math.pi) * np.exp(level**2)
    found = np.empty((len(places), right.shape[1]))
    for cell in range(right.shape[1]):
        middle = float(level[:, cell].mean())
        prior = 4 * smoothness(known, known, SURFACE_LENGTH) + np.diag(error[:, cell])
        weights = np.linalg.solve(prior, level[:, cell] - middle)
        found[:, cell] = middle + 4 * smoothness(places, known, SURFACE_LENGTH) @ weights
    return found


class Fitted:
    """Mixtures of the example parents: an item is right where the cell's surface plus its own deviation is positive.

    Both are Gaussian processes over the mixtures. So an answer depends on the mixture alone, as a greedy decoding does.
    """

    def __init__(self, space: Space, seed: int, *, flat: bool = False, every: int = 0) -> None:
        random = np.random.default_rng(seed)
        self.points = list(all_choices(space))
        self._rows = {choice: row for row, choice in enumerate(self.points)}
        places = np.array([mixture(space, choice) for choice in self.points])
        surfaces = surface(np.loadtxt(COUNTS, delimiter=",", skiprows=1), places)
        self.cells, self.count = surfaces.shape[1], DRAWN
        if flat:
            surfaces[:] = ndtri(0.8)
        factor = np.linalg.cholesky(smoothness(places, places, ITEM_LENGTH) + 1e-9 * np.eye(len(places)))
        deviations = factor @ random.standard_normal((len(places), self.cells * self.count))
        self._right = deviations.reshape(len(places), self.cells, self.count) > -surfaces[:, :, None]
        self._truth = self._right.mean(axis=(1, 2))
        every = every or (10 if len(space.axes) == 1 else 2)
        self.grid = [choice for choice in self.points if all(index % every == 0 for index in choice)]
        self.ease = ndtri((self._right.sum(axis=0) + 0.5) / (len(places) + 1)) * 1.7
        """Of each item [cells, items], as logit: 1.7 turns a probit into one."""

    def all_scores(self, choice: Choice) -> Array:
        """Of all items [cells, items]."""
        return self._right[self._rows[choice]].astype(float)

    def truth(self, choice: Choice) -> float:
        """Mean over all items."""
        return float(self._truth[self._rows[choice]])

    def best(self) -> float:
        """The highest truth of the space."""
        return float(self._truth.max())


def mixture(space: Space, choice: Choice) -> Array:
    """The shares of the three parents."""
    shares = [float(each) for each in space.bindings(choice).values() if isinstance(each, Fraction)]
    return np.array(shares if len(shares) == 3 else [shares[0], 1 - shares[0], 0.0])


class Layers:
    """Eight axes (`eight.py`): an item is right where the cell's surface plus its own deviation is positive.

    The deviation is a Gaussian process too, drawn by random frequencies (Rahimi & Recht 2007): its covariance is that
    of Matérn 3/2 but for the finite number of frequencies. The truth is the mean chance of an item to be right.
    """

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.cells, self.count = len(measured()), DRAWN
        degrees = random.chisquare(3, FREQUENCIES) / 3
        self._turns = random.standard_normal((8, FREQUENCIES)) / np.sqrt(degrees) / EIGHT_ITEM_LENGTH
        weights = random.standard_normal((2 * FREQUENCIES, self.cells * self.count)) / math.sqrt(FREQUENCIES)
        self._weights = weights.astype(np.float32)
        self.grid = decoded(EIGHT, random.random((16, 8)))
        self.points = highest()
        some = [self.all_scores(choice) for choice in decoded(EIGHT, random.random((200, 8)))]
        self.ease = ndtri((np.sum(some, axis=0) + 0.5) / (len(some) + 1)) * 1.7

    def all_scores(self, choice: Choice) -> Array:
        """Of all items [cells, items]."""
        angles = np.array(choice) / PARTS @ self._turns
        deviation = np.concatenate([np.cos(angles), np.sin(angles)]).astype(np.float32) @ self._weights
        level = np.array([each.mean(np.array([choice]) / PARTS)[0] for each in measured()])
        return (deviation.reshape(self.cells, self.count) > -level[:, None]).astype(float)

    def truth(self, choice: Choice) -> float:
        """Mean chance over all cells."""
        return float(scores_at([choice])[0])

    def best(self) -> float:
        """The highest truth of `points`."""
        return self.truth(self.points[0])


def scores_at(choices: list[Choice]) -> Array:
    """The mean chance over all cells [choices] at these points of the eight axes."""
    return np.mean([ndtr(each.mean(np.array(choices) / PARTS)) for each in measured()], axis=0)


@functools.cache
def highest() -> list[Choice]:
    """Where the climbs along the axes end, from the 30 best of 20,000 random points and of the measured ones."""
    random = np.random.default_rng(0)
    starts = decoded(EIGHT, random.random((20_000, 8))) + eight.points()
    scores = scores_at(starts)
    ends: set[Choice] = set()
    for at in np.argsort(-scores)[:30]:
        choice = starts[at]
        while True:
            near = [(*choice[:of], value, *choice[of + 1 :]) for of in range(8) for value in range(PARTS + 1)]
            better = near[int(np.argmax(scores_at(near)))]
            if better == choice or scores_at([better])[0] <= scores_at([choice])[0]:
                break
            choice = better
        ends.add(choice)
    order = np.argsort(-scores_at(sorted(ends)))
    return [sorted(ends)[at] for at in order]


World = Fitted | Layers


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


Traced = list[tuple[float, Choice]]
"""The best point so far, by the items a cell that were spent."""


def shipped(world: World, space: Space, by: Any, budget: float, seed: int) -> tuple[Choice, float, bool, Traced]:
    """Winner, shown score, whether it is sure, and the trace of the shipped search."""
    cells = [Cell(f"t{index}", 1) for index in range(world.cells)]
    start = (space.middle(),) if by == "gp-middle" else ()
    spec = SearchSpec(space=space, by="gp" if start else by, budget=Budget(), batch=8, start=start)
    search = Search(spec, cells, items=ITEMS, seed=seed, limit=budget * world.cells)
    trace: Traced = []
    known: dict[str, Array] = {}
    while not search.finished:
        while search.due is not None:
            search.add(search.propose())
        for block in search.next_blocks():
            if block.point not in known:
                known[block.point] = world.all_scores(search.choices[block.point])
            scores = known[block.point][cells.index(block.cell), block.items.start : block.items.stop]
            search.record(block.point, block.cell, block.items, scores)
        search.close()
        trace.append((search.committed / world.cells, search.standing()[0].choice))
    winner = search.standing()[0]
    return winner.choice, winner.score, winner.best >= 0.95, trace


def peer(
    world: World, space: Space, budget: float, ask: Callable[..., Any], scored: Callable[..., float], items: int
) -> tuple[Choice, float, bool, Traced]:
    """The best score seen, over candidates from `ask(asked)`, which may look at the earlier ones."""
    seen: list[tuple[Choice, float]] = []
    known: dict[Choice, float] = {}
    trace: Traced = []
    for number in range(int(budget / items)):
        choice = decoded(space, np.asarray(ask(seen))[None])[0]
        if choice not in known:
            known[choice] = scored(world, choice)
        seen.append((choice, known[choice]))
        trace.append(((number + 1) * items, max(seen, key=lambda each: each[1])[0]))
    return *max(seen, key=lambda each: each[1]), False, trace


def averaged(world: World, choice: Choice) -> float:
    """The mean of the first items."""
    return float(world.all_scores(choice)[:, :PEERS_ITEMS].mean())


def estimated(world: World, choice: Choice) -> float:
    """gmp-IRT of MERGE³ (arXiv 2502.10436) over the items of a search, from the first `ANCHORS` of each cell.

    The bank of the items is the world's own, which favours it; ability is the most likely one. The ability that the
    paper combines of those of the parents takes the same value, where there is one ability and the weights are free.
    """
    answers, total = world.all_scores(choice)[:, :ANCHORS], 0.0
    for cell in range(world.cells):
        ability = 0.0
        for _ in range(30):  # Newton's steps; an ability that is all right or all wrong stays within ±30
            chance = expit(ability + world.ease[cell, :ANCHORS])
            slope = float(np.sum(answers[cell] - chance))
            ability = float(np.clip(ability + slope / max(float(np.sum(chance * (1 - chance))), 0.1), -30, 30))
        unseen = float(expit(ability + world.ease[cell, ANCHORS:ITEMS]).mean())
        mean = float(answers[cell].mean())
        total += 0.5 * mean + 0.5 * (ANCHORS / ITEMS * mean + (1 - ANCHORS / ITEMS) * unseen)
    return total / world.cells


def genetic(space: Space, seed: int) -> Callable[..., Any]:
    """mergenetic's searcher: pymoo's genetic algorithm with SBX and polynomial mutation; a population of ten."""
    from pymoo.algorithms.soo.nonconvex.ga import GA
    from pymoo.core.problem import Problem

    size = len(space.axes)
    algorithm = GA(pop_size=10, eliminate_duplicates=True)
    algorithm.setup(Problem(n_var=size, n_obj=1, xl=0.0, xu=1.0), termination=("n_gen", 10_000), seed=seed)
    asked: list[Any] = []

    def ask(seen: list[tuple[Choice, float]]) -> Array:
        if not asked or len(seen) == asked[0]:
            if asked:
                population = asked[1]
                scores = [[-score] for _, score in seen[-len(population) :]]
                population.set("F", np.array(scores))
                for each in population:
                    each.evaluated.add("F")
                algorithm.tell(infills=population)
            population = algorithm.ask()
            asked[:] = [len(seen) + len(population), population]
        return asked[1][len(seen) - asked[0] + len(asked[1])].X

    return ask


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
    if method == "mergenetic":
        return genetic(space, seed)
    if method in ("tpe", "optuna-gp"):
        return optuna_study(space, seed, method)
    random = np.random.default_rng(seed)
    return lambda seen: random.random(len(space.axes))


def told(world: World, points: list[Choice], items: int, seed: int) -> tuple[Choice, float, bool, Traced]:
    """The point with the highest mean over its first items of each cell; of equal ones, a random one."""
    means = np.array([world.all_scores(point)[:, :items].mean() for point in points])
    chosen = int(np.random.default_rng(seed).choice(np.flatnonzero(means == means.max())))
    return points[chosen], float(means[chosen]), False, []


def played(world: World, space: Space, method: str, budget: float, seed: int) -> tuple[Choice, float, bool, Traced]:
    """Winner, shown score, whether it is sure, and the trace of a method."""
    if method in ("gp", "gp-middle", "sobol"):
        return shipped(world, space, method, budget, seed)
    if method == "all-items":
        return told(world, world.points, ITEMS, seed)
    if method == "three-best":
        best = sorted(world.points, key=world.truth)[-3:]
        return told(world, best, min(ITEMS, int(budget / len(best))), seed)
    scored, items = (estimated, ANCHORS) if method == "mergenetic" else (averaged, PEERS_ITEMS)
    return peer(world, space, budget, asker(method, space, seed), scored, items)


NEVER = 99.0
METHODS = "gp,gp-middle,sobol,random,evolve,mergenetic,tpe,optuna-gp,three-best,all-items"
SPACES = {"line": LINE, "triangle": TRIANGLE, "coarse": TRIANGLE, "flat": LINE, "eight": EIGHT}
Key = tuple[str, int, float, str]
"""Space, seed, budget in units of B, method."""


def replay(name: str, seed: int, wanted: list[tuple[float, str]]) -> list[dict[str, Any]]:
    """A row for each of these budgets and methods. Regret and flattery are in points of 100, budgets in units of B."""
    space = SPACES[name]
    every = 4 if name == "coarse" else 0
    world = Layers(seed) if name == "eight" else Fitted(space, seed, flat=name == "flat", every=every)
    choice, shown, cost = grid_and_race(world)
    best, aim = world.best(), world.truth(choice)
    rows: list[dict[str, Any]] = []
    for share, method in wanted:
        began = time.process_time()
        found = (choice, shown, False, []) if method == "grid" else played(world, space, method, share * cost, seed)
        point, score, sure, trace = found
        reached = min((spent / cost for spent, each in trace if world.truth(each) >= aim), default=NEVER)
        row = {"space": name, "seed": seed, "share": share, "method": method, "B": cost, "sure": bool(sure)}
        row["regret"] = 100 * (best - world.truth(point))
        row["flattery"] = 100 * (score - float(world.all_scores(point)[:, ITEMS:].mean()))
        rows.append(row | {"reached": reached, "seconds": time.process_time() - began})
    return rows


def key_of(row: dict[str, Any]) -> Key:
    """What a row is about."""
    return row["space"], row["seed"], row["share"], row["method"]


def table(rows: list[dict[str, Any]]) -> list[str]:
    """A line for each space, budget and method; ± is a standard error.

    `gp better` is the share of the common seeds, `at` the median spending until the point is as good as the grid's.
    """
    groups: dict[Any, dict[int, dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["space"], row["share"], row["method"]), {})[row["seed"]] = row
    lines: list[str] = []
    for (space, share, method), found in sorted(groups.items()):
        names = ("regret", "flattery", "reached", "sure", "seconds")
        each = {name: np.array([row[name] for row in found.values()], dtype=float) for name in names}
        mean = {name: float(values.mean()) for name, values in each.items()}
        error = {name: float(values.std()) / math.sqrt(len(found)) for name, values in each.items()}
        gp = groups.get((space, share, "gp"), {})
        better = [gp[seed]["regret"] < row["regret"] for seed, row in found.items() if seed in gp] or [False]
        middle, ever = np.median(each["reached"]), np.mean(each["reached"] < NEVER)
        lines.append(
            f"{space:8s} {share:3.1f} B {method:10s} {len(found):3d} seeds: regret median "
            f"{np.median(each['regret']):5.2f}, mean {mean['regret']:5.2f} ± {error['regret']:.2f}; shown - fresh "
            f"{mean['flattery']:+5.2f} ± {error['flattery']:.2f}; gp better {np.mean(better):.2f}; sure "
            f"{mean['sure']:.2f}; at {middle:5.2f} B, ever in {ever:.2f}; {mean['seconds']:.2f} s"
        )
    return lines


def main() -> None:
    """Reads the arguments, replays what is missing, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", type=Path)
    parser.add_argument("--seeds", type=int, default=100, help="how many")
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--spaces", default=",".join(SPACES))
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--budgets", default="0.5,1,2")
    arguments = parser.parse_args()
    file: Path = arguments.rows
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    known = {key_of(row) for row in rows}
    for name in arguments.spaces.split(","):
        asked = [(1.0, "grid")]
        asked += [
            (share, each) for share in map(float, arguments.budgets.split(",")) for each in arguments.methods.split(",")
        ]
        asked = [each for each in asked if (name, each[1]) != ("eight", "all-items")]
        for seed in range(arguments.first_seed, arguments.first_seed + arguments.seeds):
            missing = [each for each in asked if (name, seed, *each) not in known]
            new = replay(name, seed, missing) if missing else []
            rows += new
            with file.open("a") as out:
                out.writelines(json.dumps(row) + "\n" for row in new)
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
