"""Plays many schedules and says what happened in them.

    python -m tests.simulation --schedules 10000
    python -m tests.simulation --seed 4711 --schedules 1     one of them again

Exit code 1 and the seed at the first schedule that goes wrong.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter

from tests.simulation.schedule import Schedule, cases
from tests.simulation.world import Wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedules", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first schedule; the others follow")
    arguments = parser.parse_args()
    known = cases()
    began = time.perf_counter()
    happened: Counter[str] = Counter()
    steps = 0
    for seed in range(arguments.seed, arguments.seed + arguments.schedules):
        schedule = Schedule(seed, known[seed % len(known)])
        try:
            happened.update(schedule.run())
        except Wrong as wrong:
            print(f"wrong: --seed {seed} ({schedule.case.name}): {wrong}")
            return 1
        steps += schedule.world.steps
    seconds = time.perf_counter() - began
    for what, times in sorted(happened.items()):
        print(f"{times:9,} × {what}")
    print(
        f"{arguments.schedules:,} schedules of {steps / arguments.schedules:.0f} steps in {seconds:.1f} s, none wrong"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
