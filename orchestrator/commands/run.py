"""`mergeyard run JOB.yaml`."""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.errors import writing
from jobs.job import Job
from orchestrator.commands.inputs import print_json, read_job, watched
from orchestrator.commands.workplace import Workplace, asked_of, check_kept, evaluate_points, tell_evaluation
from orchestrator.words import shortlist


def run(options: argparse.Namespace) -> int:
    """`mergeyard run JOB.yaml`: merges, evaluates, judges and keeps the points of a job."""
    return run_job(*read_job(options), options)


def run_job(job: Job, folder: Path, options: argparse.Namespace) -> int:
    """The same of a job that was read; its relative paths count from `folder`. Returns the exit code."""
    from orchestrator.judging.race import left_by_name
    from orchestrator.merging.driver import drive
    from orchestrator.planning.plan import make_plan
    from orchestrator.report.terminal.run import print_result, result_facts
    from orchestrator.watching import Watcher

    plan = make_plan(job, relative_to=folder)
    asked = asked_of(plan, folder)
    result = evaluated = verdict = None
    with Workplace(job, options) as workplace, Watcher(visible=watched(options), tells=not options.quiet) as watcher:
        if job.keep.kind == "all":
            plan.check_room()
            result = drive(plan, workplace.pool, watcher)
        if asked is not None:
            plan, evaluated, verdict = evaluate_points(plan, asked, workplace, watcher)
        if job.keep.kind == "best" and evaluated is not None and not evaluated.unkept:
            best = [standing.point for standing in evaluated.candidates[: job.keep.count]]
            if left := left_by_name(evaluated.candidates, len(best)):
                watcher.tell(f"names decide which points are kept: {shortlist(left)} scored as much as {best[-1]}")
            if len(best) < (job.keep.count or 0) and evaluated.broken:
                watcher.tell(f"points kept: {len(best)}; {shortlist(sorted(evaluated.broken))} surely lost a guard")
            if len(best) < (job.keep.count or 0) and evaluated.infeasible:
                watcher.tell(f"points kept: {len(best)}; no other is likely to keep `at_least:`")
            if best:
                plan = plan.keeping(best)
                with writing():  # the evaluation has written its scores
                    plan.check_room()
                    result = drive(plan, workplace.pool, watcher)
    quiet = options.quiet or options.json
    if result is not None and not quiet:
        print_result(result)
    facts = tell_evaluation(plan, evaluated, verdict, quiet=quiet) if evaluated else {}
    if options.json:
        print_json((result_facts(result) if result is not None else {}) | facts)
    if result is not None:
        result.check_finite()
    if evaluated is not None:
        check_kept(job, evaluated)
    return 0 if verdict is None else verdict.verdict.exit_code
