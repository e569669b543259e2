"""`mergeyard verify`."""

from __future__ import annotations

import argparse

from jobs.errors import printable
from orchestrator.commands.inputs import print_json, run_url


def verify(options: argparse.Namespace) -> int:
    """`mergeyard verify RUN`."""
    from orchestrator.points import verifying

    points, records = verifying.verify(run_url(options.run))
    broken = [check for check in points if check.problems]
    damaged = [check for check in records if check.problems]
    if options.json:
        found = [{"point": check.point, "problems": list(check.problems)} for check in points]
        print_json(found + [{"record": check.record, "problems": list(check.problems)} for check in records])
        return 1 if broken or damaged else 0
    for check in broken:
        for problem in check.problems:
            print(printable(f"{check.point}: {problem}"))
    for check in damaged:
        print(*map(printable, check.problems))
    sealed = sum(check.sealed for check in records)
    summary = {
        f"{len(points) - len(broken)} of {len(points)} points agree with their manifests": len(points),
        f"{sealed - len(damaged)} of {sealed} records agree with their digests": sealed,
        f"{len(records) - sealed} records of an older version have no digest": len(records) - sealed,
    }
    print("; ".join(text for text, count in summary.items() if count))
    return 1 if broken or damaged else 0
