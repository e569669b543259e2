"""Plays many schedules, on as many processors as there are, and says what happened in them.

    python -m tests.simulation --schedules 10000
    python -m tests.simulation --seed 4711 --schedules 1     one of them again

Exit code 1 and the seed at the first schedule that goes wrong.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import cache

from tests.simulation.schedule import Case, Schedule, cases
from tests.simulation.world import Wrong

AT_ONCE = 100
"""Schedules that a process is given at a time."""


@cache
def known() -> list[Case]:
    """Made once in each process."""
    return cases()


def play(seeds: range) -> tuple[Counter[str], int, str]:
    """What happened in these schedules, in how many steps; and what went wrong, which ends them."""
    happened: Counter[str] = Counter()
    steps = 0
    for seed in seeds:
        schedule = Schedule(seed, known()[seed % len(known())])
        try:
            happened.update(schedule.run())
        except Wrong as wrong:
            return happened, steps, f"wrong: --seed {seed} ({schedule.case.name}): {wrong}"
        steps += schedule.world.steps
    return happened, steps, ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule; the others follow")
    arguments = parser.parse_args()
    seeds = range(arguments.seed, arguments.seed + arguments.schedules)
    began = time.perf_counter()
    happened: Counter[str] = Counter()
    steps = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for counted, taken, wrong in pool.map(play, (seeds[at : at + AT_ONCE] for at in range(0, len(seeds), AT_ONCE))):
            if wrong:
                print(wrong)
                pool.shutdown(wait=False, cancel_futures=True)
                return 1
            happened += counted
            steps += taken
    seconds = time.perf_counter() - began
    for what, times in sorted(happened.items()):
        print(f"{times:9,} × {what}")
    print(f"{len(seeds):,} schedules of {steps / len(seeds):.0f} steps in {seconds:.1f} s, none wrong")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
