"""How long the compiled loops of a merge take for an element, each beside a copy and beside the torch formula.

    python -m tests.benchmarks.kernels [--elements 16777216] [--rounds 5]

Nanoseconds of CPU time for one element of one point, in one thread: the best of the rounds. Parents and outputs are
bfloat16 and in memory. In the rows "in pieces", the output is written to the same MiB again and again, as in a merge.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np
import torch

from workers.merging.buffers import keep_freed_memory
from workers.methods import METHODS
from workers.methods.kernels.random import random_below, random_bits
from workers.methods.kernels.ranks import magnitudes, magnitudes_bracketed
from workers.methods.kernels.short_products import products_of_two
from workers.methods.kernels.unit_sums import Product
from workers.methods.kernels.unit_sums import unit_sums as compiled_sums
from workers.methods.kernels.weighted_sum import Sum, WeightedSums
from workers.methods.reductions import unit_sums
from workers.methods.tile import TILE_ELEMENTS, Array, Inputs, Tile, as_tensor

POINTS = 16
PIECE = 1 << 19
"""Elements of a MiB."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    arguments.add_argument("--elements", type=int, default=1 << 25)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--json", action="store_true")
    chosen = arguments.parse_args()
    measured = measure(chosen.elements, chosen.rounds)
    if chosen.json:
        print(json.dumps(measured))
    else:
        print(*(f"{nanoseconds:7.3f}  {name}" for name, nanoseconds in measured.items()), sep="\n")


def measure(elements: int, rounds: int) -> Mapping[str, float]:
    """Nanoseconds an element and point, by the name of the work."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as a merge does
    random = np.random.default_rng(0)
    a, b = parents = [random.standard_normal(elements, np.float32).astype(ml_dtypes.bfloat16) for _ in range(2)]
    outputs = [np.zeros(elements, ml_dtypes.bfloat16) for _ in range(POINTS)]
    once = WeightedSums(2, [Sum(((0, 0.3), (1, 0.7)))], "float32")
    often = WeightedSums(2, [Sum(((0, 0.02 * point), (1, 1 - 0.02 * point))) for point in range(POINTS)], "float32")
    deltas = WeightedSums(2, [Sum(((0, 0.3),), base=1)], "float32")
    low, high = (int(each) for each in np.quantile(magnitudes(a, b)[::61], (0.69, 0.71)))

    def tiles(of_tile: Callable[[int, list[Array]], object], step: int = TILE_ELEMENTS) -> Callable[[], None]:
        def run() -> None:
            for start in range(0, elements, step):  # results are dropped: pages of memory are used again
                of_tile(start, [each[start : start + step] for each in parents])

        return run

    work: dict[str, tuple[int, Callable[[], object]]] = {
        "copy of one array": (1, lambda: np.copyto(outputs[0], a)),
        "linear, torch": (1, tiles(lambda _, raw: by_torch(raw, outputs[0]))),
        "linear": (1, lambda: once.run(parents, outputs[:1])),
        "linear, in pieces": (1, tiles(lambda _, raw: once.run(raw, [outputs[0][: raw[0].size]]), PIECE)),
        "task arithmetic, in pieces": (1, tiles(lambda _, raw: deltas.run(raw, [outputs[0][: raw[0].size]]), PIECE)),
        f"copies to {POINTS} arrays": (POINTS, lambda: [np.copyto(each, a) for each in outputs]),
        f"linear, {POINTS} points": (POINTS, lambda: often.run(parents, outputs)),
        f"linear, {POINTS} points, in pieces": (
            POINTS,
            tiles(lambda _, raw: often.run(raw, [each[: raw[0].size] for each in outputs]), PIECE),
        ),
        "dot product, torch": (
            1,
            tiles(lambda _, raw: unit_sums(as_tensor(raw[0]).double() * as_tensor(raw[1]).double())),
        ),
        "dot product": (1, tiles(lambda _, raw: sums(raw, [Product(0, 1)]))),
        "three products of slerp": (1, tiles(lambda _, raw: products_of_two(*raw, unit=TILE_ELEMENTS))),
        "L1 norm of a task vector": (1, tiles(lambda _, raw: sums(raw, [Product((0, 1))]))),
        "magnitudes": (1, tiles(lambda _, raw: magnitudes(*raw))),
        "bracket of a cutoff": (
            1,
            tiles(lambda _, raw: magnitudes_bracketed(*raw, [(low, high)], unit=TILE_ELEMENTS)),
        ),
        "random bits, numpy": (1, tiles(lambda start, _: np.random.Philox(key=start).random_raw(TILE_ELEMENTS // 2))),
        "random bits": (1, tiles(lambda start, _: random_bits((start, 0), 0, TILE_ELEMENTS))),
        f"random bits, against {POINTS} limits": (
            POINTS,
            tiles(lambda start, _: random_below((start, 0), 0, TILE_ELEMENTS, range(1 << 28, 17 << 28, 1 << 28))),
        ),
    }
    best = dict.fromkeys(work, float("inf"))
    for _ in range(rounds):  # in turns, so that load from elsewhere meets them alike
        for name, (points, run) in work.items():
            started = time.thread_time()
            run()
            best[name] = min(best[name], (time.thread_time() - started) / elements / points * 1e9)
    return best


def sums(raw: list[Array], products: list[Product]) -> object:
    return compiled_sums(raw, products, unit=TILE_ELEMENTS, dtype="float32")


def by_torch(raw: list[Array], output: Array) -> None:
    """The formula of `linear`."""
    tile = Tile("x", 0, dict(zip("ab", raw, strict=True)), {})
    merged = METHODS["linear"].merge(Inputs(tile, ("a", "b"), None, "float32"), weight=(0.3, 0.7), normalize=False)
    as_tensor(output[: raw[0].size]).copy_(merged)


if __name__ == "__main__":
    main()
