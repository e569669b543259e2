"""The outcome of a job, by the files of its run: a cluster knows that it ran, not the state of its run since."""

from __future__ import annotations

from pathlib import Path

from jobs.errors import MergeyardError, NothingKept
from jobs.job import Job, load_job
from orchestrator.evaluating.results import read_results, read_verdict
from orchestrator.judging.gate import EXIT_CODES
from orchestrator.planning.plan import Plan, make_plan
from workers.storage import Store, open_store
from workers.storage.records import read_record, read_sealed


def recorded_code(job: Job, folder: Path) -> int | None:
    """The exit code of the job, whose relative paths count from `folder`, if all that it makes lies there.

    None where something is missing, was made by another job or of other parents, or cannot be seen from here.
    """
    try:
        store = open_store(f"{open_store(job.output).url}/{job.name}")
        left = load_job(read_sealed(store, "job.yaml").decode(), "job.yaml", job.output)
        plan = make_plan(job, relative_to=folder)
        if left.digest() not in (plan.pinned.digest(), job.digest()):  # older versions left the parents as written
            return None
        if read_record(store, plan.places.record("plan.json"))["digest"] != plan.digest:
            return None
        return _code(plan, store)
    except (MergeyardError, ValueError):
        return None


def _code(plan: Plan, store: Store) -> int | None:
    """As above, of a run that is this plan's."""
    kept = {planned.name for planned in plan.points} if plan.job.keep.kind == "all" else set[str]()
    if plan.job.evaluate is not None:
        result = read_results(plan.run_url, points=())
        if not result.finished:
            return None
        if result.unkept and (plan.job.keep.kind == "best" or plan.job.gate is not None):
            return NothingKept.exit_code
        if plan.job.keep.kind == "best":
            kept = {standing.point for standing in result.candidates[: plan.job.keep.count]}
    written = {info.key for info in store.list("points/")}
    if not all(f"points/{name}/manifest.json" in written for name in kept):
        return None
    if plan.job.gate is None:
        return 0
    verdict = read_verdict(store)
    return None if verdict is None else EXIT_CODES[verdict["outcome"]]
