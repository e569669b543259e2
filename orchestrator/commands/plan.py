"""`mergeyard plan JOB.yaml`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jobs.job import Job
from orchestrator.commands.inputs import print_json, read_job
from orchestrator.commands.workplace import asked_of, check_workers


def plan(options: argparse.Namespace) -> int:
    """`mergeyard plan JOB.yaml`."""
    from orchestrator.report.terminal.run import print_plan

    facts = planned(*read_job(options), options.address)
    if options.json:
        print_json(facts)
    else:
        print_plan(facts)
    return 0


def planned(job: Job, folder: Path, address: str | None = None) -> dict[str, Any]:
    """The facts of a plan; relative parents count from `folder`."""
    from orchestrator.evaluating.forecast import evaluation_facts, parents_answers
    from orchestrator.planning.plan import make_plan
    from orchestrator.report.terminal.run import plan_facts

    plan = make_plan(job, relative_to=folder)
    asked = asked_of(plan, folder)
    plan.check_output()
    check_workers(job, address)
    evaluation = None if asked is None else evaluation_facts(plan, asked, parents_answers(plan.run_url, asked))
    return {**plan_facts(plan), "evaluation": evaluation}
