"""`mergeyard status`."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from jobs.errors import BadInput
from orchestrator.commands.inputs import print_json, run_url

if TYPE_CHECKING:
    from orchestrator.report.run import Report


def status(options: argparse.Namespace) -> int:
    """`mergeyard status RUN`: how far it is, and how its points stand so far."""
    from orchestrator.report.terminal.leaderboard import print_leaderboard, print_sentence
    from orchestrator.report.terminal.run import print_status, status_facts

    url = run_url(options.run)
    facts, found = status_facts(url), _report(url)
    if options.json:
        document = {} if found is None else found.document()
        print_json(facts | {name: document.get(name) for name in ("finished", "verdict", "leaderboard")})
        return 0
    print_status(facts)
    if found is not None and found.recommendation is not None:
        print()
        print_leaderboard(found.lines, found.run.result)
        print_sentence(found.recommendation.sentence)
    return 0


def _report(url: str) -> Report | None:
    """The report so far; None before the first answers."""
    from orchestrator.report.run import read_run, report_on

    try:
        return report_on(read_run(url, costs=False))
    except BadInput:
        return None
