"""`mergeyard schema`."""

from __future__ import annotations

import argparse

from jobs.job import job_schema
from orchestrator.commands.inputs import print_json


def schema(options: argparse.Namespace) -> int:
    """`mergeyard schema`: the JSON Schema of a job file on standard output."""
    print_json(job_schema())
    return 0
