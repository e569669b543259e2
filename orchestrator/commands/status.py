"""`mergeyard status`."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from jobs.errors import BadInput, Unavailable, printable
from orchestrator.commands.inputs import print_json, run_url

if TYPE_CHECKING:
    from orchestrator.report.run import Report

FOLLOW_SECONDS = 5.0


def status(options: argparse.Namespace) -> int:
    """`mergeyard status RUN`: the progress of a run and its leaderboard so far; of a folder of runs, a line each."""
    from orchestrator.report.terminal.status import print_runs, runs_below, status_facts

    url = run_url(options.run)
    runs = runs_below(url)
    if runs != [url]:
        if options.follow:
            raise BadInput(f"--follow: {url} has {len(runs)} runs; name one, such as {runs[0]}")
        found = [status_facts(run) for run in runs]
        print_json(found) if options.json else print_runs(found)
        return 0
    if options.follow:
        _follow(url)
    return _print(url, as_json=options.json)


def _print(url: str, *, as_json: bool) -> int:
    from orchestrator.report.terminal.leaderboard import print_leaderboard, print_sentence
    from orchestrator.report.terminal.status import print_status, status_facts

    facts, found = status_facts(url), _report(url)
    if as_json:
        document = {} if found is None else found.document()
        print_json(facts | {name: document.get(name) for name in ("finished", "verdict", "leaderboard")})
        return 0
    print_status(facts)
    if found is not None and found.recommendation is not None:
        print()
        print_leaderboard(found.lines, found.run.result)
        print_sentence(found.recommendation.sentence, found.recommendation.why)
    return 0


def _follow(url: str) -> None:
    """Prints the stage while the driver runs; `Unavailable` if it died or went silent."""
    from orchestrator.report.terminal.status import stage_line, status_facts

    shown = None
    while (facts := status_facts(url))["driver"] is not None:
        driver = facts["driver"]
        if driver["state"] != "running":
            raise Unavailable(
                f"{url}: its driver, process {driver['process']} on {driver['host']}, is {driver['state']};"
                " the same command continues"
            )
        if (line := stage_line(facts)) is not None and line != shown:
            print(printable(line), flush=True)
            shown = line
        time.sleep(FOLLOW_SECONDS)


def _report(url: str) -> Report | None:
    """The report so far; None before the first answers."""
    from orchestrator.report.run import read_run, report_on

    try:
        return report_on(read_run(url, costs=False))
    except BadInput:
        return None
