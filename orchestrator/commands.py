"""What each verb of the command line does: read its input, call the one function that knows, say what came of it."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import BadInput
from jobs.job import Job, WorkerSpec, load_job, load_merge_document
from jobs.loading import load_document
from jobs.tasks import digest

if TYPE_CHECKING:
    from jobs.evaluation import ModelSpec
    from orchestrator.dispatching import Evaluators
    from orchestrator.evaluation import EvaluationResult
    from orchestrator.planning import Plan
    from orchestrator.pool import Pool
    from orchestrator.questions import Questions
    from orchestrator.watching import Watcher


def plan(options: argparse.Namespace) -> int:
    """`mergeyard plan JOB.yaml`."""
    from orchestrator.planning import make_plan
    from orchestrator.summary import plan_facts, print_plan

    job, folder = _read_job(options)
    plan = make_plan(job, relative_to=folder)
    _asked(plan, folder)
    facts = plan_facts(plan)
    if options.json:
        _print_json(facts)
    else:
        print_plan(facts)
    return 0


def run(options: argparse.Namespace) -> int:
    """`mergeyard run JOB.yaml`: merges, evaluates if the job says so, and keeps the points it says."""
    from orchestrator.driver import drive
    from orchestrator.planning import make_plan
    from orchestrator.summary import print_result, result_facts
    from orchestrator.watching import Watcher

    job, folder = _read_job(options)
    plan = make_plan(job, relative_to=folder)
    asked = _asked(plan, folder)
    result = evaluated = None
    with Workplace(job, options) as workplace, Watcher(visible=_watched(options), tells=not options.quiet) as watcher:
        if job.keep.kind == "all":
            plan.check_room()
            result = drive(plan, workplace.pool, watcher)
        if asked is not None:
            evaluated = _evaluated(plan, asked, workplace, watcher)
        if job.keep.kind == "best" and evaluated is not None:
            best = [standing.point for standing in evaluated.standing[: job.keep.count]]
            plan = plan.keeping(best)
            plan.check_room()
            result = drive(plan, workplace.pool, watcher)
    facts = _tell_evaluation(plan, evaluated, quiet=options.quiet or options.json) if evaluated is not None else {}
    if options.json:
        _print_json((result_facts(result) if result is not None else {}) | facts)
    elif result is not None and not options.quiet:
        print_result(result)
    return 0


def evaluate(options: argparse.Namespace) -> int:
    """`mergeyard evaluate JOB.yaml|MODEL…`: scores only; nothing is merged to disk."""
    from orchestrator.planning import make_plan
    from orchestrator.watching import Watcher

    job, folder = _read_evaluation(options)
    if job.evaluate is None:
        raise BadInput(f"{job.source}: nothing to evaluate; add `evaluate:`")
    plan = make_plan(job, relative_to=folder)
    asked = _asked(plan, folder)
    assert asked is not None
    with Workplace(job, options) as workplace, Watcher(visible=_watched(options), tells=not options.quiet) as watcher:
        evaluated = _evaluated(plan, asked, workplace, watcher)
    facts = _tell_evaluation(plan, evaluated, quiet=options.quiet or options.json)
    if options.json:
        _print_json(facts)
    return 0


class Workplace:
    """Where a command's work is done: Ray, or this process. Started when first used, closed at the end."""

    def __init__(self, job: Job, options: argparse.Namespace) -> None:
        self._job, self._options = job, options
        self._pool: Pool | None = None

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.close()

    @property
    def pool(self) -> Pool:
        """Where merge tasks run."""
        if self._pool is None:
            if self._options.in_process:
                from orchestrator.pool import InProcessPool

                self._pool = InProcessPool()
            else:
                from orchestrator.ray_pool import RayPool

                self._pool = RayPool(self._job.workers, address=self._options.address)
        return self._pool

    def evaluators(self, models: Mapping[str, ModelSpec]) -> Evaluators:
        """Where items are answered."""
        if self._options.in_process:
            import torch

            from orchestrator.evaluators import InProcessEvaluators

            gpu = self._job.workers.gpus > 0 and torch.cuda.is_available()
            return InProcessEvaluators(models, device="cuda" if gpu else "cpu")
        from orchestrator.ray_evaluators import RayEvaluators
        from orchestrator.ray_pool import RayPool

        pool = self.pool
        assert isinstance(pool, RayPool)
        return RayEvaluators(models, pool)


def _asked(plan: Plan, folder: Path) -> Questions | None:
    """What the job's evaluation asks, if it has one; refused here if it cannot work."""
    from orchestrator.questions import questions

    return None if plan.job.evaluate is None else questions(plan, folder)


def _evaluated(plan: Plan, asked: Questions, workplace: Workplace, watcher: Watcher) -> EvaluationResult:
    from orchestrator.evaluation import evaluate as evaluate_points

    return evaluate_points(plan, workplace.evaluators, watcher, asked)


def _tell_evaluation(plan: Plan, result: EvaluationResult, *, quiet: bool) -> dict[str, Any]:
    """Prints the leaderboard, and returns all there is to know as facts."""
    from orchestrator.leaderboard import leaderboard, print_leaderboard

    lines = leaderboard(result, plan.job.seed)
    if not quiet:
        print_leaderboard(lines, result)
    return {
        "run": plan.run_url,
        "results": f"{plan.run_url}/report/results.parquet",
        "leaderboard": [line.document() for line in lines],
        **result.race_document(),
    }


def _read_evaluation(options: argparse.Namespace) -> tuple[Job, Path]:
    """The job whose points are to be evaluated, or one made of the models that were named."""
    if len(options.models) == 1 and options.models[0].endswith((".yaml", ".yml")):
        options.job = options.models[0]
        return _read_job(options)
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
    text = "".join(f"{json.dumps(key)}: {json.dumps(value)}\n" for key, value in job.items())
    return load_job(text, "mergeyard evaluate"), Path.cwd()


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


def merge(options: argparse.Namespace) -> int:
    """`mergeyard merge CONFIG OUT`."""
    from orchestrator.driver import drive
    from orchestrator.ledger import Ledger
    from orchestrator.planning import make_plan
    from orchestrator.pool import InProcessPool
    from orchestrator.summary import print_merge
    from orchestrator.watching import Watcher

    _check_device(options.device)
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


def _check_device(name: str) -> None:
    if name == "cpu":
        return
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise BadInput(f"--device {name}: not to be had here ({reason}); leave it out to compute on the CPU") from None


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
