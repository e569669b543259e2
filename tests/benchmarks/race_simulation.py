"""Does the race keep the winner of the full evaluation, for which share of its cost, and does it drop the best?

    python tests/benchmarks/race_simulation.py --worlds 100
    python tests/benchmarks/race_simulation.py --drops --worlds 1000

Simulated grids: points × (13 tasks × 6 lengths) × items. An item is answered right with the probability of a
two-parameter logistic model; the points' abilities are scaled so that their true macro scores spread by 3 points
(standard deviation). An item costs what RULER's prompt of that length costs a Qwen2-1.5B model in floating-point
operations. The race is the shipped `orchestrator.judging.race.Race`, fed with the same answers as the full evaluation.

Three regimes: a point's abilities at all lengths rise and fall together (`correlated`), tilt with the length
(`crossing`), or trade short contexts for long ones (`anti-correlated`).

`--drops` simulates worlds that mislead a race, in which the truly best points are known: several questions share a
haystack, haystacks are few, one task alone tells the points apart, or rivals gain a little on most haystacks and lose a
few completely. It counts the races that drop one of the best points, against `--alpha` (0.05 without it).

Not covered: engine noise.
"""

from __future__ import annotations

import argparse
import json
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

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


def run_race(
    answers: NDArray[Any], lengths: int = len(LENGTHS), questions: int = 1, shared: bool = False, **rule: Any
) -> Race:
    """The race of these answers [points, cells, items], run to its end; the cells of a task are neighbours."""
    points, count, items = answers.shape
    names = [f"{point:04d}" for point in range(points)]
    cells = [Cell(f"task_{at // lengths}", LENGTHS[at % lengths]) for at in range(count)]
    costs = {cell: PETAFLOPS[LENGTHS.index(cell.length)] for cell in cells}
    rungs = [*(rung for rung in RUNGS if -(-rung // questions) * questions < items), items]
    race = Race(
        names,
        cells,
        rungs=rungs,
        costs=costs,
        items_per_haystack=questions,
        items_shared_across_lengths=shared,
        **rule,
    )
    column = {cell: index for index, cell in enumerate(cells)}
    while blocks := race.next_blocks():
        for block in blocks:
            scores = answers[int(block.point), column[block.cell], block.items.start : block.items.stop]
            race.record(block.point, block.cell, block.items, scores)
        race.eliminate()
    return race


def simulate(
    regime: str, worlds: int, *, points: int, items: int, z: float, alpha: float | None, keep: int, seed: int
) -> Result:
    """Race every world of a regime; each world is keyed by the seed, the regime and its number."""
    same, same_kept, shares, regrets, full_regrets = 0, 0, [], [], []
    for number in range(worlds):
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, REGIMES.index(regime), number])))
        truth, answers = world(regime, points, items, random)
        full_best = np.argsort(-answers.mean(axis=(1, 2)), kind="stable")[:keep].tolist()
        race = run_race(answers, z=z, alpha=alpha, keep=keep)
        best, share = [int(row.point) for row in race.standing()[:keep]], race.spent() / race.full_cost()
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


# ---- worlds that mislead a race


@dataclass(frozen=True)
class Misleading:
    """Answers [points, cells, items] in which points 0 … keep − 1 are truly the best; `questions` share a haystack.

    A haystack is the same at all `lengths` of a task.
    """

    name: str
    answers: Callable[[np.random.Generator], NDArray[Any]]
    lengths: int = 1
    questions: int = 1
    keep: int = 1


def clustered(
    *, points: int = 20, tasks: int = 1, telling: int, lengths: int = 1, haystacks: int, questions: int, keep: int = 1
) -> Callable[[np.random.Generator], NDArray[Any]]:
    """Right at 60 % in the `telling` tasks, the points after the best 2 points less; always right in the others.

    A question takes the chance of its haystack with probability 0.6, at all lengths.
    """

    def answers(random: np.random.Generator) -> NDArray[Any]:
        own = random.random((points, telling, lengths, haystacks, questions))
        common = random.random((points, telling, 1, haystacks, 1))
        takes = random.random((points, telling, 1, haystacks, questions)) < 0.6
        skill = np.where(np.arange(points) < keep, 0.6, 0.58)[:, None, None, None, None]
        right = np.ones((points, tasks, lengths, haystacks, questions))
        right[:, :telling] = np.where(takes, common, own) < skill
        return right.reshape(points, tasks * lengths, haystacks * questions)

    return answers


def rarely_lost(*, points: int = 8, lengths: int, haystacks: int) -> Callable[[np.random.Generator], NDArray[Any]]:
    """The best scores 0.5 everywhere. The rivals score 0.02 more on most haystacks and lose 6 % of them completely."""

    def answers(random: np.random.Generator) -> NDArray[Any]:
        scores = np.full((points, lengths, haystacks), 0.5)
        scores[1:] += 0.02 + 0.01 * random.random((points - 1, 1, haystacks))
        scores[1:] *= random.random((1, 1, haystacks)) >= 0.06
        return scores

    return answers


MISLEADING = (
    Misleading("8 haystacks of 8", clustered(telling=1, haystacks=8, questions=8), questions=8),
    Misleading("20 haystacks of 8, 3 lengths", clustered(telling=1, lengths=3, haystacks=20, questions=8), 3, 8),
    Misleading("13 tasks, one tells", clustered(tasks=13, telling=1, haystacks=20, questions=8), questions=8),
    Misleading("13 tasks, one tells, 150 items", clustered(tasks=13, telling=1, haystacks=150, questions=1)),
    Misleading(
        "4 tasks, one tells, 3 lengths", clustered(tasks=4, telling=1, lengths=3, haystacks=20, questions=4), 3, 4
    ),
    Misleading("best 3 of 20", clustered(telling=1, haystacks=150, questions=1, keep=3), keep=3),
    Misleading("rare total losses", rarely_lost(lengths=1, haystacks=150)),
    Misleading("rare total losses, 3 lengths", rarely_lost(lengths=3, haystacks=60), 3),
)


def dropped(world: Misleading, worlds: int, *, alpha: float | None, z: float, seed: int) -> int:
    """The races, of so many, that drop one of the truly best points."""
    count = 0
    for number in range(worlds):
        key = [seed, zlib.crc32(world.name.encode()), number]
        random = np.random.Generator(np.random.Philox(np.random.SeedSequence(key)))
        answers = world.answers(random)
        race = run_race(answers, world.lengths, world.questions, shared=True, alpha=alpha, z=z, keep=world.keep)
        count += any(int(departure.point) < world.keep for departure in race.departures)
    return count


def print_drops(worlds: int, *, alpha: float | None, z: float, seed: int) -> None:
    """A line for each misleading world."""
    for world in MISLEADING:
        count = dropped(world, worlds, alpha=alpha, z=z, seed=seed)
        low, high = wilson_interval(count, worlds)
        print(
            f"{world.name:<32} best dropped in {count / worlds:>5.1%} ({low:.1%} to {high:.1%}) of {worlds}", flush=True
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
    parser.add_argument("--drops", action="store_true", help="simulate the worlds that mislead a race")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    arguments = parser.parse_args()
    if arguments.drops:
        print_drops(arguments.worlds, alpha=arguments.alpha or 0.05, z=arguments.z, seed=arguments.seed)
        return
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
