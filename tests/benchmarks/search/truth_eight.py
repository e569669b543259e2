"""Asks merges of two example parents with eight axes, first everywhere and then where the best ones lie.

    python -m tests.benchmarks.search.truth_eight FOLDER [--processes 2]

256 points of a Sobol sequence answer 72 items of each cell. Then 64 points four times: those that the surfaces fitted
so far promise most, each at least `APART` from the others. At last the 12 best points answer 28 × 72 = 2,016 items. The
rounds lie in FOLDER as those of `truth.py`; rounds that exist are left as they are. It writes FOLDER/counts_eight.csv,
with the answers of both parents, which are the corners of the space, from `counts.csv`.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import ndtr
from scipy.stats import qmc

from tests.benchmarks.search.eight import PARTS, surfaces
from tests.benchmarks.search.truth import CELLS, Point, ask, correlations, file_of, gathered

AXES = ("attention0", "attention1", "attention2", "mlp0", "mlp1", "mlp2", "embeddings", "norms")
FIRST, CLIMBS, EACH, BEST, ROUNDS = 256, 4, 64, 12, 28
COUNTS = Path(__file__).with_name("counts.csv")
APART = 0.2
"""Of new points, in units of an axis: points of one place would show one thing many times."""
Array = np.ndarray[Any, Any]


def rows_of(answers: dict[Point, Any]) -> Array:
    """A row for each point: its parts, the items of a cell, and the right answers of each cell."""
    return np.array([[*point, right.shape[1], *(right == 1).sum(axis=1)] for point, right in answers.items()], float)


def parents() -> Array:
    """The rows of both parents, whose answers to the same items `truth.py` has asked."""
    table = np.loadtxt(COUNTS, delimiter=",", skiprows=1)
    ends = {0: (0, 1, 0), PARTS: (1, 0, 0)}
    return np.array([[*[end] * 8, *table[(table[:, :3] == of).all(axis=1)][0, 3:]] for end, of in ends.items()])


def chosen(file: Path, choose: Callable[[], list[Point]]) -> list[Point]:
    """The points in a file, which is written before any of them is asked: a run that was stopped asks the same."""
    if not file.exists():
        np.savetxt(file, choose(), "%d")
    return [tuple(map(int, row)) for row in np.loadtxt(file, ndmin=2)]


def near(points: Array, random: np.random.Generator, count: int) -> Array:
    """Neighbours [count, 8] of these points: about two axes changed by up to five parts."""
    chosen = points[random.integers(len(points), size=count)]
    moves = random.integers(-5, 6, size=chosen.shape) * (random.random(chosen.shape) < 0.25)
    return np.unique(np.clip(chosen + moves, 0, PARTS), axis=0)


def promising(table: Array, count: int, seed: int) -> list[Point]:
    """New points with the highest mean plus one standard deviation of the score, each apart from the others."""
    random = np.random.default_rng(seed)
    fitted = surfaces(table)

    def promise(places: Array) -> Array:
        means, spreads = zip(*(each.at(places / PARTS) for each in fitted), strict=True)
        return np.mean([ndtr(mean + spread) for mean, spread in zip(means, spreads, strict=True)], axis=0)

    scores = table[:, 9:].sum(axis=1) / table[:, 8] / len(CELLS)
    pool = table[np.argsort(-scores)[:64], :8]
    for _ in range(12):
        pool = np.unique(np.concatenate([pool, near(pool, random, 4000)]), axis=0)
        pool = pool[np.argsort(-promise(pool))[:4096]]
    known = {tuple(map(int, row[:8])) for row in table}
    found: list[Point] = []
    for row in pool[np.argsort(-promise(pool))]:
        point = tuple(map(int, row))
        far = all(np.linalg.norm(np.subtract(point, other)) >= APART * PARTS for other in found)
        if far and point not in known and len(found) < count:
            found.append(point)
    return found


def best(table: Array, count: int) -> list[Point]:
    """The measured points whose fitted score is highest."""
    means = np.mean([ndtr(each.mean(table[:, :8] / PARTS)) for each in surfaces(table)], axis=0)
    return [tuple(map(int, row)) for row in table[np.argsort(-means)[:count], :8]]


def main() -> None:
    """Reads the arguments, asks, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.processes)
    sobol = qmc.Sobol(8, seed=8).random(FIRST)
    points = [tuple(map(int, row)) for row in np.round(sobol * PARTS)]
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:

        def asked(jobs: list[tuple[str, list[Point], int]]) -> None:
            missing = [job for job in jobs if not file_of(folder, job[0], job[2]).exists()]
            for line in pool.map(functools.partial(ask, folder, set()), *zip(*missing, strict=True)) if missing else ():
                print(line, flush=True)

        # One file a 16 points, so that two processes share a round.
        asked([(f"first{at:02d}", points[at * 16 : at * 16 + 16], 0) for at in range(FIRST // 16)])
        for climb in range(CLIMBS):
            name = f"climb{climb}"
            new = chosen(folder / f"{name}.txt", lambda climb=climb: promising(rows_of(gathered(folder)), EACH, climb))
            asked([(f"{name}{letter}", new[at::4], 0) for at, letter in enumerate("wxyz")])
            table = rows_of(gathered(folder))
            top = table[np.argsort(-table[:, 9:].sum(axis=1))[:5]]
            print(climb, [[*map(int, row[:8]), round(100 * row[9:].sum() / row[8] / 5, 1)] for row in top], flush=True)
        top = chosen(folder / "best.txt", lambda: best(rows_of(gathered(folder)), BEST))
        asked([("best", top, number) for number in range(1, ROUNDS)])
    answers = gathered(folder)
    lines = [",".join([*AXES, "items", *(f"{benchmark}@{length}" for benchmark, length in CELLS)])]
    lines += [",".join(str(int(value)) for value in row) for row in (*rows_of(answers), *parents())]
    (folder / "counts_eight.csv").write_text("\n".join(lines) + "\n")
    print({distance: round(value, 2) for distance, value in correlations(answers, 1.0, 0.4).items()})


if __name__ == "__main__":
    main()
