"""`mergeyard verify`."""

from __future__ import annotations

import argparse

from orchestrator.commands.inputs import print_json, run_url


def verify(options: argparse.Namespace) -> int:
    """`mergeyard verify RUN`."""
    from orchestrator.points.verifying import verify_points

    checks = verify_points(run_url(options.run))
    broken = [check for check in checks if check.problems]
    if options.json:
        print_json([{"point": check.point, "problems": list(check.problems)} for check in checks])
    else:
        for check in broken:
            for problem in check.problems:
                print(f"{check.point}: {problem}")
        print(f"{len(checks) - len(broken)} of {len(checks)} points agree with their manifests")
    return 1 if broken else 0
