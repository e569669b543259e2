"""Feeds damaged headers, indexes and job files to their readers and says what came of them.

    python -m tests.fuzz --inputs 100000
    python -m tests.fuzz --only jobs --seed 7 --inputs 1      one of them again

Each kind gets its share of the inputs, unless `--only` names one. The process may hold 3 GB and each input may
take 30 seconds. Exit code 1 and the seed at the first input that gives anything but an answer.
"""

from __future__ import annotations

import argparse
import faulthandler
import random
import resource
import time
from typing import Any

from tests.fuzz import headers, indexes, job_texts

MOST_MEMORY_BYTES = 3_000_000_000
MOST_SECONDS = 30.0
READERS: dict[str, Any] = {"headers": headers, "indexes": indexes, "jobs": job_texts}


def feed(reader: str, seeds: range) -> dict[str, float]:
    """Feeds one reader; what came of it."""
    module = READERS[reader]
    known = module.corpus()
    accepted, slowest, began = 0, 0.0, time.perf_counter()
    for seed in seeds:
        given = module.damaged(random.Random(seed), known)
        faulthandler.dump_traceback_later(MOST_SECONDS, exit=True)
        started = time.perf_counter()
        try:
            accepted += module.check(given)
        except BaseException as error:
            raise SystemExit(f"{reader} --seed {seed}: {type(error).__name__}: {error}\n{given[:2000]!r}") from error
        slowest = max(slowest, time.perf_counter() - started)
    faulthandler.cancel_dump_traceback_later()
    return {"inputs": len(seeds), "accepted": accepted, "slowest": slowest, "seconds": time.perf_counter() - began}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0, help="of the first input; the others follow")
    parser.add_argument("--only", choices=tuple(READERS))
    arguments = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY_BYTES, MOST_MEMORY_BYTES))
    readers = [arguments.only] if arguments.only else list(READERS)
    for reader in readers:
        told = feed(reader, range(arguments.seed, arguments.seed + -(-arguments.inputs // len(readers))))
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{reader}: {told['inputs']:,} inputs, {told['accepted']:,} accepted, none wrong, slowest"
            f" {told['slowest']:.2f} s, {told['seconds']:.0f} s in all, {memory:.0f} MB at the most"
        )


if __name__ == "__main__":
    main()
