"""`mergeyard gate JOB.yaml`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import BadInput
from jobs.yaml_nodes import nearest, quoted
from orchestrator.commands.inputs import check_file, print_json, read_job, watched
from orchestrator.commands.workplace import Workplace, asked_of, check_kept, gated, tell_verdict

if TYPE_CHECKING:
    from orchestrator.evaluating.subjects import Questions
    from orchestrator.planning.plan import Plan


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
    if options.point is not None:
        _check_point(plan, asked, options.point)
    with (
        Workplace(job, options) as workplace,
        Watcher(visible=watched(options), tells=not options.quiet) as watcher,
        Session.of(plan, asked, workplace.evaluators, watcher) as session,
    ):
        point = options.point
        if point is None:
            result = session.run()
            check_kept(job, result)
            point = result.standing[0].point
        elif job.search is not None:
            session.recall()
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


def _check_point(plan: Plan, asked: Questions, name: str) -> None:
    """Refuses a name of neither a parent nor a point, which in a search is one that was asked by now."""
    from orchestrator.evaluating.batches import asked_points
    from workers.storage import open_store

    if plan.job.search is None:
        asked.subject(name)
        return
    points = asked_points(open_store(plan.run_url))
    if name in points or name in asked.parents:
        return
    if not points:
        raise BadInput(
            f"{plan.run_url}: the search has asked no point yet; run the job, then name one, or name a parent"
        )
    near = nearest(name, [*points, *asked.parents])
    raise BadInput(
        f"{plan.run_url}: the search has not asked {quoted(name)}{f', but {quoted(near)}' if near else ''}; to ask it,"
        " put it under `start:` of a job of another name"
    )
