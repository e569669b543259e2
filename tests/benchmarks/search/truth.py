"""Asks many merges of the three example parents the same items, and keeps the score of every item: a table of truth.

    python -m tests.benchmarks.search.truth FOLDER [--step 5] [--rounds 3]

Points are the linear merges with weights of a simplex (long, fmt, base), in steps of 1/STEP. Each round asks all points
the next 24 items of each cell and writes FOLDER/round-000.npz with `points` [points, 3] and `scores` [points, cells,
24]. Rounds that exist are left as they are, so that it can be stopped and continued. At the end it writes the right
answers of each cell to FOLDER/counts.csv, which `replay.py` has beside it. On two busy cores, 21 points take about a
minute a round.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from workers.benchmarks.items import Item
from workers.benchmarks.needle import even_depths, needle_items
from workers.benchmarks.ruler.tasks import ruler_items
from workers.benchmarks.scorers import SCORERS
from workers.benchmarks.texts.tokenizer import Tokenizer
from workers.engines.engine import Prompt
from workers.engines.transformers_engine import TransformersEngine

PARENTS = Path(__file__).parents[3] / "jobs" / "examples" / "parents"
NAMES = ("long", "fmt", "base")
CELLS = (("ruler", 256), ("ruler", 512), ("ruler", 1024), ("needle", 256), ("needle", 512))
ROUND = 24
SEED = 17


def simplex(step: int) -> list[tuple[int, int, int]]:
    """Weights in units of 1/step that sum to `step`."""
    return [(a, b, step - a - b) for a in range(step + 1) for b in range(step + 1 - a)]


def items_of(tokenizer: Tokenizer, cell: tuple[str, int], indices: range) -> list[Item]:
    """These items of a cell: plain needles, or needles with the answer in JSON."""
    benchmark, length = cell
    if benchmark == "ruler":
        return ruler_items(tokenizer, "niah_single_1", length, indices=indices, seed=SEED, max_new_tokens=12)
    depths, answer = even_depths(3), '{"value": {value}}'
    return needle_items(
        tokenizer, length, depths=depths, indices=indices, seed=SEED, haystack="noise", answer=answer, max_new_tokens=16
    )


def main() -> None:
    """Reads the arguments and asks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--step", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    weights: list[dict[str, Any]] = [load_file(PARENTS / name / "model.safetensors") for name in NAMES]
    tokenizer, engine = Tokenizer.from_folder(PARENTS / "base"), TransformersEngine.from_folder(PARENTS / "base")
    points = simplex(arguments.step)
    for number in range(arguments.rounds):
        path = arguments.folder / f"round-{number:03d}.npz"
        if path.exists():
            continue
        began = time.monotonic()
        indices = range(number * ROUND, (number + 1) * ROUND)
        asked = [items_of(tokenizer, cell, indices) for cell in CELLS]
        scores = np.zeros((len(points), len(CELLS), ROUND), dtype=np.float32)
        for row, point in enumerate(points):
            shares = [part / arguments.step for part in point]
            merged = {
                name: sum(share * each[name].float() for share, each in zip(shares, weights, strict=True)).bfloat16()
                for name in weights[0]
            }
            engine.swap(merged.items(), f"{point}")
            for column, items in enumerate(asked):
                prompts = [Prompt(item.prefix, item.prompt + item.answer_prefix, item.max_new_tokens) for item in items]
                for at, (item, answer) in enumerate(zip(items, engine.generate(prompts), strict=True)):
                    scores[row, column, at] = SCORERS[item.scorer](answer.text, item.answers)
            if number == 0 and row % 10 == 0:
                print(point, scores[row].mean(axis=1).round(2), f"{time.monotonic() - began:.0f} s", flush=True)
        np.savez_compressed(path, points=np.array(points), scores=scores)
        print(f"round {number}: {time.monotonic() - began:.0f} s", flush=True)
    rounds = [np.load(path)["scores"] for path in sorted(arguments.folder.glob("round-*.npz"))]
    right = np.concatenate(rounds, axis=2).sum(axis=2).astype(int)
    lines = [",".join([*NAMES, "items", *(f"{benchmark}@{length}" for benchmark, length in CELLS)])]
    for point, row in zip(points, right.tolist(), strict=True):
        shares = (f"{part / arguments.step:g}" for part in point)
        lines.append(",".join([*shares, str(ROUND * len(rounds)), *map(str, row)]))
    (arguments.folder / "counts.csv").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
