"""`mergeyard diff`."""

from __future__ import annotations

import argparse

from orchestrator.commands.inputs import print_json


def diff(options: argparse.Namespace) -> int:
    """`mergeyard diff A B`."""
    from orchestrator.points.differing import compare_checkpoints, print_differences

    differences = compare_checkpoints(options.a, options.b)
    if options.json:
        print_json([difference.document() for difference in differences])
    else:
        print_differences(differences)
    return 1 if any(difference.differs for difference in differences) else 0
