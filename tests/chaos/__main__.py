"""Strikes a running grid in every way we know, and says whether the result was the same, byte by byte.

    python -m tests.chaos                      every fault as often as it says
    python -m tests.chaos --only 'killed|cut' --seed 7

A cluster of a head, two nodes and an S3 server, each in a network namespace. Needs root on Linux. A run that ends with
exit code 75, or whose driver was killed, is run again, as its user would. A run has recovered when the shards are done
that were at hand when it was struck, an evaluation when its next scores are there; where the user has to do something
first, such as to start a head again, the seconds for that are in it. Exit code 1 if anything came out wrong, or a fault
did not hit.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import time
from dataclasses import dataclass, replace

from tests.chaos.cluster import started
from tests.chaos.faults import FAULTS, HELD, Fault, moment
from tests.chaos.faulty_cluster import FaultyCluster, Trial, Wrong
from tests.chaos.network import why_not


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="the faults whose names match this expression")
    parser.add_argument("--times", type=int, help="how often each, whatever it says")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if reason := why_not():
        print(f"chaos: {reason}", file=sys.stderr)
        return 1
    faults = [fault for fault in FAULTS if re.search(options.only, fault.name)]
    with started(2, megabits=10) as cluster:
        yard = FaultyCluster(cluster, options.seed)
        try:
            undisturbed = strike(yard, yard.trial(), UNDISTURBED)
            print(
                f"undisturbed, what is at hand at a random moment takes {undisturbed.recovered:.0f} s, what is left"
                f" of the run {undisturbed.whole:.0f} s\n"
            )
            print(
                "| fault | times | right bytes | seconds to recover: median, most | seconds to the end: median, most |"
            )
            print("|---|---|---|---|---|", flush=True)
            right = [_line(yard, fault, options.times or fault.times) for fault in faults]
        finally:
            yard.close()
    return 0 if all(right) else 1


@dataclass(frozen=True)
class Struck:
    """Seconds from a fault until lost work was given out again, until the run had recovered, and to its end."""

    again: float
    recovered: float
    whole: float


UNDISTURBED = Fault("nothing", lambda trial: None)


def _line(yard: FaultyCluster, fault: Fault, times: int) -> bool:
    """Prints one line of the table, and says whether all came out right."""
    right: list[Struck] = []
    for _ in range(times):
        trial = yard.trial(fault.work)
        try:
            right.append(strike(yard, trial, fault))
        except Exception as wrong:  # whatever it is, the other faults are tried
            print(f"WRONG: {fault.name}, {trial.name}: {type(wrong).__name__}: {wrong}", file=sys.stderr, flush=True)
        for command in trial.commands:
            command.clean_up()
        yard.cluster.repair()
    again = max((struck.again for struck in right), default=0)
    name = f"{fault.name}, given out again after {again:.0f} s at most" if again else fault.name
    recovered = _median_and_most([struck.recovered for struck in right])
    whole = _median_and_most([struck.whole for struck in right])
    print(f"| {name} | {times} | {len(right)} | {recovered} | {whole} |", flush=True)
    return len(right) == times


def _median_and_most(seconds: list[float]) -> str:
    return f"{statistics.median(seconds):.0f}, {max(seconds):.0f}" if seconds else ""


def strike(yard: FaultyCluster, trial: Trial, fault: Fault) -> Struck:
    """Runs the work, lets the fault happen to it, and checks that it hit and what the run came to."""
    cluster, proxy = yard.cluster, yard.cluster.proxy
    yard.expected(replace(fault.work, on_disk=False))
    if fault.driver != "head":
        cluster.begin(fault.driver)
        cluster.wait_for(fault.driver)
    if fault.when == "held":
        proxy.fail("PUT", "hold", times=10**9, key=HELD)
    trial.start(fault.driver)
    moment(trial, fault)
    trial.strikes()
    served, struck = proxy.broken, set(cluster.busy())
    later = fault.strike(trial)
    again = 0.0
    if fault.loses:
        trial.until(lambda: set(cluster.busy()) - struck)
        again = time.monotonic() - trial.struck_at
        proxy.heal()
    ended = trial.finish(later)
    if fault.served and proxy.broken - served != fault.served:
        raise Wrong(f"{proxy.broken - served} requests were made to fail, not {fault.served}")
    proxy.heal()
    yard.check(trial, ended)
    if trial.recovered_at is None:
        raise Wrong("the run ended without what was at hand")
    return Struck(again, trial.recovered_at - trial.struck_at, trial.ended_at - trial.struck_at)


if __name__ == "__main__":
    raise SystemExit(main())
