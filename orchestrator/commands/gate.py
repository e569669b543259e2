"""`mergeyard gate JOB.yaml`."""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.errors import BadInput
from orchestrator.commands.inputs import check_file, print_json, read_job, watched
from orchestrator.commands.workplace import Workplace, asked_of, check_kept, gated, tell_verdict


def gate(options: argparse.Namespace) -> int:
    """`mergeyard gate JOB.yaml`: judges the best point, or the one that is named; 0 pass, 1 fail, 3 inconclusive."""
    from orchestrator.evaluating.session import Session
    from orchestrator.planning.plan import make_plan
    from orchestrator.watching import Watcher

    job, folder = read_job(options)
    check_file("--junit", options.junit)
    if job.gate is None:
        raise BadInput(f"{job.source}: no gate to pass; add `gate: {{baseline: …}}`")
    plan = make_plan(job, relative_to=folder)
    asked = asked_of(plan, folder)
    assert asked is not None, "a job with a gate has an evaluation"
    if options.point is not None and job.search is None:
        asked.subject(options.point)
    with (
        Workplace(job, options) as workplace,
        Watcher(visible=watched(options), tells=not options.quiet) as watcher,
        Session.of(plan, asked, workplace.evaluators, watcher) as session,
    ):
        point = options.point
        if point is None or job.search is not None:  # a search finds the points of its run again
            result = session.run()
            if point is None:
                check_kept(job, result)
            point = point or result.standing[0].point
        verdict = gated(session, plan, point)
    if options.junit:
        Path(options.junit).write_text(verdict.verdict.to_junit_xml(), encoding="utf-8")
    if options.json:
        print_json(verdict.document())
    elif not options.quiet:
        tell_verdict(verdict)
        if verdict.noise is not None:
            print(f"  {verdict.noise.words}")
    return verdict.verdict.exit_code
