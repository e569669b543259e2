"""`mergeyard prune RUN`."""

from __future__ import annotations

import argparse

from orchestrator.commands.inputs import print_json, run_url


def prune(options: argparse.Namespace) -> int:
    """`mergeyard prune RUN`: lists a run's points; with `--yes`, removes those that lost."""
    from orchestrator.points import pruning
    from orchestrator.words import size

    run = run_url(options.run)
    held, swept = pruning.prune(run, options.keep) if options.yes else (pruning.holdings(run, options.keep), 0)
    if options.json:
        print_json(held.document() | {"removed": options.yes, "leftovers_removed": swept})
        return 0
    pruning.print_holdings(held)
    freed = sum(point.bytes for point in held.lost)
    what = f"{len(held.lost)} points, {size(freed)}"
    print(f"removed: {what}; {swept} leftovers of broken uploads" if options.yes else f"--yes removes {what}")
    return 0
