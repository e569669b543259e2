"""`mergeyard evaluate JOB.yaml|MODEL…`."""

from __future__ import annotations

import argparse
import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from jobs.job import COMMAND_LINE, Job
from jobs.job import read_job as job_at
from jobs.merge_tasks import digest
from jobs.yaml_nodes import node_of
from orchestrator.commands.inputs import print_json, read_job, watched
from orchestrator.commands.workplace import Workplace, asked_of, check_kept, evaluate_points, tell_evaluation


def evaluate(options: argparse.Namespace) -> int:
    """`mergeyard evaluate JOB.yaml|MODEL…`: scores only; nothing is merged to disk."""
    from orchestrator.planning.plan import make_plan
    from orchestrator.watching import Watcher

    job, folder = _read_evaluation(options)
    if job.evaluate is None:
        raise BadInput(f"{job.source}: nothing to evaluate; add `evaluate:`")
    plan = make_plan(job, relative_to=folder)
    asked = asked_of(plan, folder)
    assert asked is not None
    with Workplace(job, options) as workplace, Watcher(visible=watched(options), tells=not options.quiet) as watcher:
        plan, evaluated, verdict = evaluate_points(plan, asked, workplace, watcher)
    facts = tell_evaluation(plan, evaluated, verdict, quiet=options.json)
    if options.json:
        print_json(facts)
    if job.gate is not None:
        check_kept(job, evaluated)
    return 0 if verdict is None else verdict.verdict.exit_code


def _read_evaluation(options: argparse.Namespace) -> tuple[Job, Path]:
    """The job whose points are to be evaluated, or one made of the models that were named."""
    if len(options.models) == 1 and options.models[0].endswith((".yaml", ".yml")):
        options.job = options.models[0]
        return read_job(options)
    names = _model_names(options.models)
    ruler: dict[str, Any] = {"lengths": list(options.lengths), "items": options.items}
    if options.tasks:
        ruler["tasks"] = list(options.tasks)
    job: dict[str, Any] = {
        "name": options.name or _evaluation_name(names),
        "parents": names,
        "recipe": {"merge_method": "passthrough", "models": [{"model": "${model}"}]},
        "grid": {"model": list(names)},
        "point": "{model}",
        "evaluate": {"ruler": ruler},
        "keep": "none",
        "output": options.output or "runs",
    }
    if options.server:
        job["engine"] = {
            "name": "openai",
            "url": options.server,
            "options": {"model": options.served or next(iter(names))},
        }
    return job_at(node_of(job, COMMAND_LINE)), Path.cwd()


def _evaluation_name(names: Mapping[str, str]) -> str:
    """Another name for other models: their scores are another run's."""
    return f"evaluation-{'+'.join(names)}"[:100] + f"-{digest(dict(names))[:8]}"


def _model_names(models: list[str]) -> dict[str, str]:
    """A name for each model: the last part of its URL, numbered where two are alike."""
    names: dict[str, str] = {}
    for url in models:
        last = url.rstrip("/").split("/")[-1].split("@")[0]
        name = re.sub(r"[^A-Za-z0-9._-]", "-", last).lstrip("._-") or "model"
        number = next(number for number in itertools.count(1) if _numbered(name, number) not in names)
        names[_numbered(name, number)] = url
    return names


def _numbered(name: str, number: int) -> str:
    return name if number == 1 else f"{name}-{number}"
