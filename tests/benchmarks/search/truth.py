"""Asks many merges of the three example parents the same items, and counts the right answers: a table of truth.

    python -m tests.benchmarks.search.truth FOLDER [--points line,fifths,top] [--rounds 28] [--processes 2]

Points are the linear merges with these weights of long, fmt and base: `line` has 21 between long and fmt, `fifths` the
rest of the simplex in steps of 1/5, and `top` what is left of it in steps of 1/10 where fmt has 0.7 or more: there the
best points lie. Each round asks the points of a set the next 72 items of each cell, each item with a needle and a
haystack of its own. After two rounds, only points near the best one go on (`FAR`).

A round of a set is FOLDER/SET-000.npz, with `points` [points, 3] in twentieths and `right` [points, cells, 72]. Rounds
that exist are left as they are, so that it can be stopped and continued. At the end it writes the right answers of each
cell in all rounds of the folder to FOLDER/counts.csv, which `replay.py` has beside it, and prints how the answers of
two points correlate. With `--rounds 0` it only does this.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from tests.benchmarks.search.batched import Model, Question, groups_of
from tests.benchmarks.search.eight import PARTS
from workers.benchmarks.items import Item
from workers.benchmarks.needle import even_depths, needle_items
from workers.benchmarks.ruler.tasks import ruler_items
from workers.benchmarks.texts.haystacks import NOISE
from workers.benchmarks.texts.tokenizer import Tokenizer

PARENTS = Path(__file__).parents[3] / "jobs" / "examples" / "parents"
NAMES = ("long", "fmt", "base")
CELLS = (("ruler", 256), ("ruler", 512), ("ruler", 1024), ("needle", 256), ("needle", 512))
ROUND = 72
SEED = 17
END = 0
"""The token that ends an answer."""
SETTLING, FAR = 2, 0.05
"""After these rounds, points whose score is so far below the best one are asked no more, nor are cells without a right
answer, which count as wrong."""
Point = tuple[int, ...]
"""In twentieths: the weights of three parents, or the eight shares of one of two (`truth_eight.py`)."""


def simplex(step: int) -> list[Point]:
    """Weights in twentieths, in steps of 1/step, that sum to one."""
    unit = PARTS // step
    return [(a * unit, b * unit, (step - a - b) * unit) for a in range(step + 1) for b in range(step + 1 - a)]


LINE: list[Point] = [(part, PARTS - part, 0) for part in range(PARTS + 1)]
SETS = {
    "line": LINE,
    "fifths": [point for point in simplex(5) if point not in LINE],
    "top": [point for point in simplex(10) if point[1] >= 14 and point not in LINE and point not in simplex(5)],
}


def items_of(tokenizer: Tokenizer, cell: tuple[str, int], indices: range) -> list[Item]:
    """These items of a cell: plain needles, or needles with the answer in JSON."""
    benchmark, length = cell
    if benchmark == "ruler":
        return ruler_items(tokenizer, "niah_single_1", length, indices=indices, seed=SEED, max_new_tokens=12)
    depths, answer = even_depths(3), '{"value": {value}}'
    return needle_items(
        tokenizer, length, depths=depths, indices=indices, seed=SEED, haystack="noise", answer=answer, max_new_tokens=16
    )


@functools.cache
def opened() -> tuple[list[dict[str, Any]], Tokenizer]:
    """The parents' weights and their tokenizer; this process has one thread."""
    torch.set_num_threads(1)
    weights = [load_file(PARENTS / name / "model.safetensors") for name in NAMES]
    return weights, Tokenizer.from_folder(PARENTS / "base")


def question(tokenizer: Tokenizer, item: Item) -> Question:
    """An item with its right answers: the number; or in JSON, which the plain needle takes too and JSON wants whole."""
    ids = functools.partial(np.array, dtype=np.int64)
    prompt = ids(tokenizer.encode(item.prefix + item.prompt + item.answer_prefix))
    [answer] = item.answers
    if item.benchmark == "needle":
        return Question(prompt, (ids([*tokenizer.encode(f" {answer}"), END]),))
    answers = tokenizer.encode(f" {answer}"), tokenizer.encode(f' {{"value": {answer}')
    return Question(prompt, tuple(map(ids, answers)))


def merged(weights: list[dict[str, Any]], point: Point) -> dict[str, Any]:
    """The linear merge of the parents with these weights, in bfloat16."""
    return {
        name: sum(part / PARTS * each[name].float() for part, each in zip(parts, weights, strict=False)).bfloat16()
        for name in weights[0]
        for parts in [point if len(point) == len(NAMES) else two_parts(name, point)]
    }


def two_parts(name: str, point: Point) -> Point:
    """The parts of long and fmt in a tensor. A point has those of long in the attention of each of the three layers, in
    their MLPs, in the embeddings and in the norms."""
    layer = int(name.split(".")[2]) if ".layers." in name else 0
    at = layer if "self_attn" in name else 3 + layer if ".mlp." in name else 6 if "embed" in name else 7
    return point[at], PARTS - point[at]


def without_needle(tokenizer: Tokenizer) -> Any:
    """Tokens of the haystack that all items have before their needle."""
    head = items_of(tokenizer, CELLS[0], range(1))[0].prefix.split("\n")[0]
    return np.array(tokenizer.encode(head + f"\n{NOISE}" * 60)[:1024])


def file_of(folder: Path, name: str, number: int) -> Path:
    """Where a round of a set lies."""
    return folder / f"{name}-{number:03d}.npz"


def ask(folder: Path, idle: set[tuple[Point, int]], name: str, points: list[Point], number: int) -> str:
    """Asks these points of a set the items of a round, but for the cells in `idle`; writes the file, says how long.

    A right answer is 1, a wrong one 0; -1 was not asked.
    """
    began, path = time.monotonic(), file_of(folder, name, number)
    weights, tokenizer = opened()
    indices = range(number * ROUND, (number + 1) * ROUND)
    cells = [[question(tokenizer, item) for item in items_of(tokenizer, cell, indices)] for cell in CELLS]
    beginning = without_needle(tokenizer)
    right = np.full((len(points), len(CELLS), ROUND), -1, dtype=np.int8)
    for row, point in enumerate(points):
        asked = [column for column in range(len(CELLS)) if (point, column) not in idle]
        if not asked:
            continue
        questions = [each for column in asked for each in cells[column]]
        answers = Model(merged(weights, point)).right(questions, groups_of(questions, beginning), beginning)
        right[row, asked] = answers.reshape(len(asked), ROUND)
    with path.with_suffix(".part").open("wb") as file:
        np.savez_compressed(file, points=np.array(points), right=right)
    path.with_suffix(".part").replace(path)
    return f"{path.stem}: {np.sum(right >= 0)} answers, {time.monotonic() - began:.0f} s"


def gathered(folder: Path, rounds: int | None = None) -> dict[Point, np.ndarray[Any, Any]]:
    """The answers [cells, items] of each point, in all rounds of the folder or in the first ones; -1: not asked."""
    found: dict[Point, list[Any]] = {}
    for path in sorted(folder.glob("*-*.npz"), key=lambda path: path.stem.split("-")[::-1]):
        if rounds is None or int(path.stem.split("-")[1]) < rounds:
            made = np.load(path)
            for point, right in zip(made["points"].tolist(), made["right"], strict=True):
                if right.max() >= 0:
                    found.setdefault(tuple(point), []).append(right)
    return {point: np.concatenate(each, axis=1) for point, each in sorted(found.items())}


def settled(answers: dict[Point, np.ndarray[Any, Any]]) -> set[tuple[Point, int]]:
    """The cells of points that are asked no more."""
    least = max(float(right.mean()) for right in answers.values()) - FAR
    cells = [(point, cell, right) for point, right in answers.items() for cell in range(len(CELLS))]
    return {(point, cell) for point, cell, right in cells if right.mean() < least or not right[cell].any()}


def correlations(answers: dict[Point, np.ndarray[Any, Any]], unit: float, step: float) -> dict[float, float]:
    """Of the answers of two points to the same items, by their distance in steps; `unit` axes are the distance 1.

    Averages over the pairs and cells of a distance in which both points are right and wrong 5 % of the time or more.
    """
    found: dict[float, list[float]] = {}
    points = [*answers]
    for at, first in enumerate(points):
        for second in points[at + 1 :]:
            distance = float(np.linalg.norm(np.subtract(first, second))) / PARTS / unit
            near = round(round(distance / step) * step, 2)
            count = min(answers[first].shape[1], answers[second].shape[1])
            for left, right in zip(answers[first][:, :count], answers[second][:, :count], strict=True):
                if 0.05 <= left.mean() <= 0.95 and 0.05 <= right.mean() <= 0.95:
                    found.setdefault(near, []).append(float(np.corrcoef(left, right)[0, 1]))
    return {distance: float(np.mean(each)) for distance, each in sorted(found.items())}


def main() -> None:
    """Reads the arguments, asks, and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--points", default=",".join(SETS))
    parser.add_argument("--rounds", type=int, default=28)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        for numbers in (range(min(SETTLING, arguments.rounds)), range(SETTLING, arguments.rounds)):
            idle = settled(gathered(folder, SETTLING)) if numbers.start else set[tuple[Point, int]]()
            asked = [(name, SETS[name], number) for number in numbers for name in arguments.points.split(",")]
            missing = [each for each in asked if not file_of(folder, each[0], each[2]).exists()]
            for line in pool.map(functools.partial(ask, folder, idle), *zip(*missing, strict=True)) if missing else ():
                print(line, flush=True)
    answers = {point: right == 1 for point, right in gathered(folder).items()}
    lines = [",".join([*NAMES, "items", *(f"{benchmark}@{length}" for benchmark, length in CELLS)])]
    for point, right in answers.items():
        shares = (f"{part / PARTS:g}" for part in point)
        lines.append(",".join([*shares, str(right.shape[1]), *map(str, right.sum(axis=1).tolist())]))
    (folder / "counts.csv").write_text("\n".join(lines) + "\n")
    print({distance: round(value, 2) for distance, value in correlations(answers, 2**0.5, 0.01).items()})


if __name__ == "__main__":
    main()
