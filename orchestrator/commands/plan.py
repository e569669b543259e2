"""`mergeyard plan JOB.yaml`."""

from __future__ import annotations

import argparse

from orchestrator.commands.inputs import print_json, read_job
from orchestrator.commands.workplace import asked_of, check_workers


def plan(options: argparse.Namespace) -> int:
    """`mergeyard plan JOB.yaml`."""
    from orchestrator.evaluating.forecast import evaluation_facts, parents_answers
    from orchestrator.planning.plan import make_plan
    from orchestrator.report.terminal.run import plan_facts, print_plan

    job, folder = read_job(options)
    plan = make_plan(job, relative_to=folder)
    asked = asked_of(plan, folder)
    plan.check_output()
    check_workers(job, options.address)
    evaluation = None if asked is None else evaluation_facts(plan.job, asked, parents_answers(plan.run_url, asked))
    facts = {**plan_facts(plan), "evaluation": evaluation}
    if options.json:
        print_json(facts)
    else:
        print_plan(facts)
    return 0
