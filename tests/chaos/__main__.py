"""Strikes a running grid in every way we know, and says whether the result was the same, byte by byte.

    python -m tests.chaos                      every fault as often as it says
    python -m tests.chaos --only 'killed|cut' --seed 7

A cluster of a head, two nodes and an S3 server, each in a network namespace. Needs root on Linux. A run that ends with
exit code 75, or whose driver was killed, is run again, as its user would. Exit code 1 if anything came out wrong.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time

from tests.chaos.cluster import started
from tests.chaos.faults import FAULTS, HELD, Fault, moment
from tests.chaos.network import why_not
from tests.chaos.yard import Trial, Wrong, Yard


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the faults whose names match this expression")
    parser.add_argument("--times", type=int, help="how often each, whatever it says")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if reason := why_not():
        print(f"chaos: {reason}", file=sys.stderr)
        return 1
    with started(2, megabits=10) as cluster:
        yard = Yard(cluster, options.seed)
        undisturbed = _undisturbed(yard)
        print(f"an undisturbed run takes {undisturbed:.0f} s\n")
        print("| fault | times | right bytes | calls of `run`, most | seconds to the end: median | max |")
        print("|---|---|---|---|---|---|", flush=True)
        faults = [fault for fault in FAULTS if re.search(options.only, fault.name)]
        right = [_line(yard, fault, options.times or fault.times) for fault in faults]
    return 0 if all(right) else 1


def _undisturbed(yard: Yard) -> float:
    trial = yard.trial()
    began = time.monotonic()
    trial.start()
    yard.check(trial, trial.finish())
    return time.monotonic() - began


def _line(yard: Yard, fault: Fault, times: int) -> bool:
    """Prints one line of the table, and says whether all came out right."""
    seconds: list[float] = []
    reissued: list[float] = []
    calls, right = 1, 0
    for _ in range(times):
        trial = yard.trial()
        try:
            again = strike(yard, trial, fault, seconds)
            reissued += [again] if fault.holds else []
            right += 1
        except (Wrong, AssertionError, RuntimeError) as wrong:
            print(f"WRONG: {fault.name}, {trial.name}: {wrong}", file=sys.stderr, flush=True)
        calls = max(calls, len(trial.commands))
        for command in trial.commands:
            command.clean_up()
        yard.cluster.repair()
    median, most = (statistics.median(seconds), max(seconds)) if seconds else (0.0, 0.0)
    again = f", given out again after {max(reissued):.0f} s at most" if reissued else ""
    print(f"| {fault.name}{again} | {times} | {right} | {calls} | {median:.0f} | {most:.0f} |", flush=True)
    return right == times


def strike(yard: Yard, trial: Trial, fault: Fault, seconds: list[float]) -> float:
    """Runs the grid, lets the fault happen to it and checks the result; seconds until lost work was given out again."""
    if fault.holds:
        yard.cluster.proxy.fail("PUT", "hold", times=10**9, key=HELD)
    trial.start()
    moment(trial, fault)
    began = time.monotonic()
    struck = set(yard.cluster.busy())
    later = fault.strike(trial)
    again = 0.0
    if fault.holds:
        trial.until(lambda: set(yard.cluster.busy()) - struck)
        again = time.monotonic() - began
        yard.cluster.proxy.heal()
    ended = trial.finish(later)
    seconds.append(trial.ended_at - began)
    yard.cluster.proxy.heal()
    yard.check(trial, ended)
    return again


if __name__ == "__main__":
    raise SystemExit(main())
