"""Does the race keep the winner of the full evaluation, and for which share of its cost?

    python tests/benchmarks/race_simulation.py --worlds 100

Simulated grids: points × (13 tasks × 6 lengths) × items. An item is answered right with the probability of a
two-parameter logistic model; the points' abilities are scaled so that their true macro scores spread by 3 points
(standard deviation). An item costs what RULER's prompt of that length costs a Qwen2-1.5B model in floating-point
operations. The race is the shipped `orchestrator.judging.race.Race`, fed with the same answers as the full evaluation.

Three regimes: a point's abilities at all lengths rise and fall together (`correlated`), tilt with the length
(`crossing`), or trade short contexts for long ones (`anti-correlated`).

Not covered: engine noise, fractional scores, several questions a haystack.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from orchestrator.judging.race import RUNGS, Race
from orchestrator.judging.samples import Cell
from orchestrator.judging.significance import wilson_interval

LENGTHS = (4096, 8192, 16384, 32768, 65536, 131072)
PETAFLOPS = (0.012, 0.027, 0.066, 0.178, 0.541, 1.821)  # one prompt, 1.31 G parameters, 28 layers, 12 × 128 heads
TASKS = 13
SPREAD = 0.03  # standard deviation of the true macro scores
REGIMES = ("correlated", "crossing", "anti-correlated")

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Result:
    """One regime over many worlds; regrets are in points of the true macro score, against the truly best point.

    `same_kept` is the rate at which the race's best `keep` are, as a set, those of the full evaluation.
    """

    regime: str
    worlds: int
    same_winner: float
    same_winner_low: float
    same_winner_high: float
    same_kept: float
    cost_share: float
    worst_cost_share: float
    worst_regret: float
    worst_regret_of_full_run: float


def abilities(regime: str, points: int, random: np.random.Generator) -> Floats:
    """Logits [points, tasks, lengths] by which each point exceeds the average one, before scaling."""
    depth = np.linspace(0.0, 1.0, len(LENGTHS))
    general, other = random.standard_normal((2, points, 1, 1))
    if regime == "correlated":
        by_length = general + 0.3 * random.standard_normal((points, 1, len(LENGTHS)))
    elif regime == "crossing":
        by_length = 0.7 * general + other * (2 * depth - 1)
    else:
        short, long = general, -0.6 * general + 0.8 * other  # correlation −0.6
        by_length = (1 - depth) * short + depth * long
    by_task = 0.3 * random.standard_normal((points, TASKS, 1))
    by_cell = 0.2 * random.standard_normal((points, TASKS, len(LENGTHS)))
    return (by_length + by_task + by_cell).astype(np.float32)


def probabilities(ability: Floats, slope: Floats, threshold: Floats) -> Floats:
    """Chance of a right answer [points, cells, items] for abilities [points, cells] and items [cells, items]."""
    logits = ability[:, :, None] * slope - slope * threshold
    np.negative(logits, out=logits)
    np.exp(logits, out=logits)
    logits += 1
    return np.reciprocal(logits, out=logits)


def world(regime: str, points: int, items: int, random: np.random.Generator) -> tuple[Floats, NDArray[np.bool_]]:
    """True macro scores [points] and answers [points, cells, items] of one simulated grid."""
    task_ease = 0.8 * random.standard_normal((TASKS, 1))
    length_ease = np.linspace(1.5, -0.5, len(LENGTHS))
    cells = TASKS * len(LENGTHS)
    ease = (task_ease + length_ease).reshape(cells).astype(np.float32)
    slope = np.exp(0.3 * random.standard_normal((cells, items))).astype(np.float32)
    threshold = random.standard_normal((cells, items)).astype(np.float32)
    excess = abilities(regime, points, random).reshape(points, cells)
    few = slice(0, max(1, items // 10))
    unscaled = probabilities(0.2 * excess + ease, slope[:, few], threshold[:, few]).mean(axis=(1, 2))
    scale = np.float32(0.2 * SPREAD / unscaled.std())
    chance = probabilities(scale * excess + ease, slope, threshold)
    answers = random.random(chance.shape, dtype=np.float32) < chance
    return chance.mean(axis=(1, 2)), answers


def run_race(answers: NDArray[np.bool_], z: float, alpha: float | None, keep: int) -> tuple[list[int], float]:
    """Indices of the race's best `keep`, in order, and the share of the full evaluation's cost that it took."""
    points, _, items = answers.shape
    names = [f"{point:04d}" for point in range(points)]
    cells = [Cell(f"task_{task}", length) for task in range(TASKS) for length in LENGTHS]
    costs = dict(zip(cells, TASKS * PETAFLOPS, strict=True))
    rungs = [*(rung for rung in RUNGS if rung < items), items]
    race = Race(names, cells, rungs=rungs, keep=keep, z=z, alpha=alpha, costs=costs)
    column = {cell: index for index, cell in enumerate(cells)}
    while blocks := race.next_blocks():
        for block in blocks:
            scores = answers[int(block.point), column[block.cell], block.items.start : block.items.stop]
            race.record(block.point, block.cell, block.items, scores)
        race.eliminate()
    return [int(row.point) for row in race.standing()[:keep]], race.spent() / race.full_cost()


def simulate(
    regime: str, worlds: int, *, points: int, items: int, z: float, alpha: float | None, keep: int, seed: int
) -> Result:
    """Race every world of a regime; each world is keyed by the seed, the regime and its number."""
    same, same_kept, shares, regrets, full_regrets = 0, 0, [], [], []
    for number in range(worlds):
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, REGIMES.index(regime), number])))
        truth, answers = world(regime, points, items, random)
        full_best = np.argsort(-answers.mean(axis=(1, 2)), kind="stable")[:keep].tolist()
        best, share = run_race(answers, z, alpha, keep)
        same += best[0] == full_best[0]
        same_kept += set(best) == set(full_best)
        shares.append(share)
        regrets.append(100 * float(truth.max() - truth[best[0]]))
        full_regrets.append(100 * float(truth.max() - truth[full_best[0]]))
    low, high = wilson_interval(same, worlds)
    return Result(
        regime=regime,
        worlds=worlds,
        same_winner=same / worlds,
        same_winner_low=low,
        same_winner_high=high,
        same_kept=same_kept / worlds,
        cost_share=float(np.mean(shares)),
        worst_cost_share=max(shares),
        worst_regret=max(regrets),
        worst_regret_of_full_run=max(full_regrets),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", type=int, default=100, help="simulated grids a regime")
    parser.add_argument("--points", type=int, default=200)
    parser.add_argument("--items", type=int, default=500, help="items a cell")
    parser.add_argument("--z", type=float, default=3.0, help="standard errors behind at which a point leaves")
    parser.add_argument("--alpha", type=float, help="chance of dropping the best point, instead of --z")
    parser.add_argument("--keep", type=int, default=1, help="how many of the best are wanted")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    settings = {name: getattr(arguments, name) for name in ("points", "items", "z", "alpha", "keep", "seed")}
    started = time.perf_counter()
    results = [simulate(regime, arguments.worlds, **settings) for regime in REGIMES]
    if arguments.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
        return
    columns = f"{'same winner':>20} {'same kept':>9} {'cost':>7} {'worst':>7} {'regret, full run':>18}"
    print(f"{'regime':<16} {'worlds':>6} {columns}")
    for result in results:
        rate = f"{result.same_winner:.1%} ({result.same_winner_low:.0%} to {result.same_winner_high:.0%})"
        regret = f"{result.worst_regret:.2f}, {result.worst_regret_of_full_run:.2f}"
        print(
            f"{result.regime:<16} {result.worlds:>6} {rate:>20} {result.same_kept:>9.1%} {result.cost_share:>7.1%} "
            f"{result.worst_cost_share:>7.1%} {regret:>18}"
        )
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()
