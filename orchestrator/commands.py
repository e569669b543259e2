"""What each verb of the command line does: read its input, call the one function that knows, say what came of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.errors import BadInput
from jobs.job import Job, WorkerSpec, load_job, load_merge_document
from jobs.loading import load_document


def plan(options: argparse.Namespace) -> int:
    """`mergeyard plan JOB.yaml`."""
    from orchestrator.planning import make_plan
    from orchestrator.summary import plan_facts, print_plan

    job, folder = _read_job(options)
    facts = plan_facts(make_plan(job, relative_to=folder))
    if options.json:
        _print_json(facts)
    else:
        print_plan(facts)
    return 0


def run(options: argparse.Namespace) -> int:
    """`mergeyard run JOB.yaml`."""
    from orchestrator.driver import drive
    from orchestrator.planning import make_plan
    from orchestrator.summary import print_result, result_facts
    from orchestrator.watching import Watcher

    job, folder = _read_job(options)
    plan = make_plan(job, relative_to=folder)
    plan.check_room()
    if options.in_process:
        from orchestrator.pool import InProcessPool

        pool = InProcessPool()
    else:
        from orchestrator.ray_pool import RayPool

        pool = RayPool(job.workers, address=options.address)
    try:
        with Watcher(visible=_watched(options)) as watcher:
            result = drive(plan, pool, watcher)
    finally:
        pool.close()
    if options.json:
        _print_json(result_facts(result))
    elif not options.quiet:
        print_result(result)
    return 0


def merge(options: argparse.Namespace) -> int:
    """`mergeyard merge CONFIG OUT`."""
    from orchestrator.driver import drive
    from orchestrator.ledger import Ledger
    from orchestrator.planning import make_plan
    from orchestrator.pool import InProcessPool
    from orchestrator.summary import print_merge
    from orchestrator.watching import Watcher

    text = _read_text(options.config)
    job = load_merge_document(text, options.config, options.out)
    threads = options.threads or os.cpu_count() or 1
    memory = _size("--memory", options.memory) if options.memory else WorkerSpec().memory_bytes
    job = replace(
        job,
        seed=options.random_seed,
        numerics=options.numerics,
        config_from=options.config_from,
        shard_bytes=_size("--out-shard-size", options.out_shard_size) if options.out_shard_size else job.shard_bytes,
        workers=WorkerSpec(cpus=float(threads), memory_bytes=memory),
    )
    plan = make_plan(job, relative_to=Path.cwd(), flat=True)
    plan.check_room()
    with Watcher(visible=_watched(options)) as watcher:
        result = drive(plan, InProcessPool(device=options.device), watcher)
    Ledger(plan.run_url, plan.places).forget()
    if not options.quiet:
        print_merge(result)
    return 0


def status(options: argparse.Namespace) -> int:
    """`mergeyard status RUN`."""
    from orchestrator.summary import print_status, status_facts

    facts = status_facts(_run_url(options.run))
    if options.json:
        _print_json(facts)
    else:
        print_status(facts)
    return 0


def verify(options: argparse.Namespace) -> int:
    """`mergeyard verify RUN`."""
    from orchestrator.inspecting import verify_points

    checks = verify_points(_run_url(options.run))
    broken = [check for check in checks if check.problems]
    if options.json:
        _print_json([{"point": check.point, "problems": list(check.problems)} for check in checks])
    else:
        for check in broken:
            for problem in check.problems:
                print(f"{check.point}: {problem}")
        print(f"{len(checks) - len(broken)} of {len(checks)} points are what their manifests say")
    return 1 if broken else 0


def diff(options: argparse.Namespace) -> int:
    """`mergeyard diff A B`."""
    from orchestrator.inspecting import compare_checkpoints, print_differences

    differences = compare_checkpoints(options.a, options.b)
    if options.json:
        _print_json([difference.document() for difference in differences])
    else:
        print_differences(differences)
    return 1 if any(difference.differs for difference in differences) else 0


def _read_job(options: argparse.Namespace) -> tuple[Job, Path]:
    """The job, and the folder that its relative parents count from: the job file's."""
    overrides = {"output": options.output} if options.output else {}
    job = load_job(_read_text(options.job), "-" if options.job == "-" else options.job, overrides)
    return job, Path.cwd() if options.job == "-" else Path(options.job).resolve().parent


def _read_text(path: str) -> str:
    if path == "-":
        return sys.stdin.read()
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise BadInput(f"{path}: no such file") from None
    except IsADirectoryError:
        raise BadInput(f"{path}: a folder, not a YAML file") from None
    except UnicodeDecodeError:
        raise BadInput(f"{path}: not a text file in UTF-8") from None
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})") from None


def _size(option: str, text: str) -> int:
    try:
        return load_document(text, option).size_bytes()
    except BadInput:
        raise BadInput(f"{option}: a size such as 500MB or 2GiB, not {text!r}") from None


def _run_url(run: str) -> str:
    """A run's URL: given as such, or through its job file."""
    from workers.storage import open_store

    if run.endswith((".yaml", ".yml")) and "://" not in run and Path(run).is_file():
        job = load_job(_read_text(run), run)
        return f"{open_store(job.output).url}/{job.name}"
    return open_store(run).url


def _watched(options: argparse.Namespace) -> bool:
    return not options.quiet and sys.stderr.isatty()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2))
