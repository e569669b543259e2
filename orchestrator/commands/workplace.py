"""The place of a command's work, and its evaluation."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import ExitStack, closing
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import BadInput, CorruptData, NothingKept
from jobs.job import Job
from orchestrator.cluster.reaching import check_address
from orchestrator.commands.devices import best_device
from workers.gpu_memory import take_part

if TYPE_CHECKING:
    from jobs.evaluation_tasks import ModelSpec
    from orchestrator.cluster.pool import Evaluators, Pool
    from orchestrator.cluster.ray_cluster import RayCluster
    from orchestrator.evaluating.confirming import Gated
    from orchestrator.evaluating.results import EvaluationResult
    from orchestrator.evaluating.session import Session
    from orchestrator.evaluating.subjects import Questions
    from orchestrator.planning.plan import Plan
    from orchestrator.watching import Watcher


class Workplace:
    """Where a command's work is done: a Ray cluster or this process. Started when first used, closed at the end."""

    def __init__(self, job: Job, options: argparse.Namespace) -> None:
        if options.address is not None:
            check_address(options.address)
        self._job, self._options = job, options
        self._opened = ExitStack()

    def __enter__(self) -> Workplace:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()

    @cached_property
    def pool(self) -> Pool:
        """The workers that merge."""
        if self._options.in_process:
            from orchestrator.cluster.in_process import InProcessPool

            return InProcessPool(device=self._device())
        from orchestrator.cluster.ray_merging import RayPool

        return RayPool(self._cluster)

    def evaluators(self, models: Mapping[str, ModelSpec]) -> Evaluators:
        """The workers that answer items."""
        if self._options.in_process:
            from orchestrator.cluster.in_process import InProcessEvaluators

            return InProcessEvaluators(models, device=self._device())
        from orchestrator.cluster.ray_evaluating import RayEvaluators

        return RayEvaluators(models, self._cluster)

    def _device(self) -> str:
        """The device of this process, which is the only worker, held to its part of it."""
        gpus = self._job.workers.gpus
        device = best_device() if gpus > 0 else "cpu"
        take_part(device, gpus)
        return device

    @cached_property
    def _cluster(self) -> RayCluster:
        from orchestrator.cluster.ray_cluster import RayCluster

        return self._opened.enter_context(closing(RayCluster(self._job.workers, address=self._options.address)))


def check_workers(job: Job, address: str | None) -> None:
    """Refuses workers that the cluster at `address`, or a Ray started here, has no node for.

    The address of a dashboard, as `submit` takes it, only says that the job does not run here.
    """
    if address is not None and "://" in address:
        return
    if address is not None:
        from orchestrator.cluster.ray_cluster import RayCluster

        RayCluster(job.workers, address=address).close()
        return
    from orchestrator.cluster.this_machine import lacking

    if lack := lacking(job.workers):
        raise BadInput(
            f"{job.place_of('workers')}: {lack}; ask for less under `workers:`, or name a larger cluster with --address"
        )


def asked_of(plan: Plan, folder: Path) -> Questions | None:
    """The items of the job's evaluation, if it has one; refused here if it cannot work."""
    from orchestrator.evaluating.subjects import questions

    try:
        return None if plan.job.evaluate is None else questions(plan, folder)
    except CorruptData as error:  # nothing is written yet: a damaged tokenizer is a wrong input
        raise BadInput(str(error)) from error


def evaluate_points(
    plan: Plan, asked: Questions, workplace: Workplace, watcher: Watcher
) -> tuple[Plan, EvaluationResult, Gated | None]:
    """The plan with the points that were asked, their scores and, if the job has a gate, the verdict on the best."""
    from orchestrator.evaluating.forecast import evaluation_facts, parents_answers
    from orchestrator.evaluating.session import Session
    from orchestrator.report.live import LivePage
    from orchestrator.report.terminal.run import can_show, gate_forecast, guards_forecast, not_asked

    facts = evaluation_facts(plan, asked, parents_answers(plan.run_url, asked))
    for line in not_asked(facts["too_long"]):
        watcher.tell(f"not asked: {line}")
    if facts["sees"] is not None:
        watcher.tell(f"can show {can_show(facts['sees'])}")
    if facts["guards"] is not None:
        watcher.tell(f"guards: {guards_forecast(facts['guards'])}")
    if facts["gate"] is not None and facts["gate"]["remedy"] is not None:
        watcher.tell(f"gate: {gate_forecast(facts['gate'])}")
    with (
        closing(LivePage(plan.run_url)) as page,
        Session.of(plan, asked, workplace.evaluators, watcher, page.renew) as session,
    ):
        result = session.run()
        plan = plan if plan.job.search is None else plan.of_search(session.planned)
        if plan.job.gate is None or result.unkept:
            return plan, result, None
        return plan, result, gated(session, plan, result.standing[0].point)


def gated(session: Session, plan: Plan, point: str) -> Gated:
    """The verdict on a point, which is left in the run as `gate/verdict.json` as well."""
    from orchestrator.evaluating.confirming import gate

    assert plan.job.gate is not None
    asked = session.asked
    verdict = gate(session, asked, plan.job.gate, point, chosen=len(asked.points) > 1)
    session.conclude(verdict.document())
    return verdict


def check_kept(job: Job, result: EvaluationResult) -> None:
    """Raises `NothingKept` where a point should be written or judged, and none is likely to keep `at_least:`."""
    if result.unkept and (job.keep.kind == "best" or job.gate is not None):
        judge = "" if job.gate is None else ", or judge one by `mergeyard gate --point`"
        raise NothingKept(
            "no point is likely to keep `at_least:`; none is written or judged: allow a larger `margin:` in a job of"
            f" another name{judge}"
        )


def tell_verdict(verdict: Gated) -> None:
    """Prints the verdict and the reason of each of its lines."""
    found = verdict.verdict
    print(f"gate: {found.outcome}: {found.new} against {found.old}")
    for line in found.lines:
        print(f"  {line.reason}")
    if verdict.fresh:
        print("  on items that no point was chosen by")
    if verdict.chosen:
        print("  on the very items that the point was chosen by: part of its lead may be luck")


def tell_evaluation(
    plan: Plan, result: EvaluationResult, verdict: Gated | None = None, *, quiet: bool
) -> dict[str, Any]:
    """Prints the leaderboard and the verdict, and returns all there is to know as facts."""
    from orchestrator.report.leaderboard import leaderboard
    from orchestrator.report.live import written_page
    from orchestrator.report.searched import facts
    from orchestrator.report.terminal.leaderboard import print_leaderboard, print_sentence

    lines = leaderboard(result)
    page, recommendation = written_page(plan.run_url, result, lines) or (None, None)
    if not quiet:
        print_leaderboard(lines, result)
        if recommendation is not None:
            print_sentence(recommendation.sentence, recommendation.why)
        elif result.noise is not None:
            print_sentence(result.noise.words)
        if result.search is not None:
            print_sentence(" ".join(facts(result.search, None if verdict is None else verdict.document())))
        if verdict is not None:
            tell_verdict(verdict)
        if page is not None:
            print(page)
    return {
        "run": plan.run_url,
        "results": f"{plan.run_url}/report/results.parquet",
        "page": page,
        "leaderboard": [line.document() for line in lines],
        **result.race_document(),
        "gate": None if verdict is None else verdict.document(),
    }
