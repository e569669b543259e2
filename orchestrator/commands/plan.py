"""`mergeyard plan JOB.yaml`."""

from __future__ import annotations

import argparse

from orchestrator.commands.inputs import print_json, read_job
from orchestrator.commands.workplace import asked_of


def plan(options: argparse.Namespace) -> int:
    """`mergeyard plan JOB.yaml`."""
    from orchestrator.planning import make_plan
    from orchestrator.summary import plan_facts, print_plan

    job, folder = read_job(options)
    plan = make_plan(job, relative_to=folder)
    asked_of(plan, folder)
    facts = plan_facts(plan)
    if options.json:
        print_json(facts)
    else:
        print_plan(facts)
    return 0
