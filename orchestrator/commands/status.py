"""`mergeyard status`."""

from __future__ import annotations

import argparse

from orchestrator.commands.inputs import print_json, run_url


def status(options: argparse.Namespace) -> int:
    """`mergeyard status RUN`."""
    from orchestrator.summary import print_status, status_facts

    facts = status_facts(run_url(options.run))
    if options.json:
        print_json(facts)
    else:
        print_status(facts)
    return 0
