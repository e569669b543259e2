"""`mergeyard submit JOB.yaml --address URL`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import BadInput, Interrupted, Unavailable
from jobs.job import Job
from orchestrator.commands.inputs import print_json, read_job

if TYPE_CHECKING:
    from orchestrator.cluster.ray_jobs import RayJobs, Submission
    from orchestrator.cluster.shipment import Shipment


def submit(options: argparse.Namespace) -> int:
    """`mergeyard submit JOB.yaml --address URL`: the job's own exit code; 0 with `--no-wait` and `--cancel`."""
    from orchestrator.cluster.ray_jobs import RayJobs
    from orchestrator.cluster.shipment import shipment

    job, folder = read_job(options)
    sent = shipment(job, folder, options.address)
    try:
        cluster = RayJobs(options.address)
    except Unavailable as gone:
        if options.cancel:
            raise
        return _without_cluster(options, job, folder, sent, gone)
    if options.cancel:
        return _cancel(options, cluster, sent)
    earlier = cluster.latest(sent.name)
    over = earlier is not None and earlier.ended and _is_recorded(earlier, job, folder)
    submission, news = (earlier, _ending(earlier)) if earlier and over else _submitted(cluster, sent, earlier)
    _tell(options, f"{submission.id}: {news}, its run is {sent.run}")
    if options.no_wait:
        _result(options, sent, submission)
        return 0
    ended = submission if over else _followed(options, cluster, submission)
    _result(options, sent, ended)
    code = ended.outcome()
    if code and (options.quiet or options.json):
        print(*cluster.log(ended).splitlines()[-1:], file=sys.stderr)
    return code


def _without_cluster(options: argparse.Namespace, job: Job, folder: Path, sent: Shipment, gone: Unavailable) -> int:
    """The exit code of the job by its run in the bucket; `Unavailable`, with its state, if it is not over."""
    from orchestrator.evaluating.outcome import recorded_code
    from orchestrator.report.terminal.status import run_state

    code = recorded_code(job, folder)
    if code is None:
        raise Unavailable(f"{gone}; its run {sent.run}: {run_state(sent.run)}") from None
    _tell(options, f"{gone}; but the job has ended, its run is {sent.run}")
    if options.json:
        print_json({"id": sent.name, "state": "ended", "exit_code": code, "run": sent.run})
    return code


def _is_recorded(submission: Submission, job: Job, folder: Path) -> bool:
    """Whether the run itself says that it ended as the submission did, by this code: nothing is left to do then."""
    from workers.fingerprint import fingerprint

    if submission.exit_code not in (0, 1, 3) or submission.code != fingerprint():
        return False
    from orchestrator.evaluating.outcome import recorded_code

    return recorded_code(job, folder) == submission.exit_code


def _ending(submission: Submission) -> str:
    """In a few words, how a job ended whose run says so too."""
    verdicts = {1: "ended already, the gate says fail", 3: "ended already, the gate is inconclusive"}
    return verdicts.get(submission.exit_code or 0, "succeeded already")


def _submitted(cluster: RayJobs, sent: Shipment, earlier: Submission | None) -> tuple[Submission, str]:
    """The current submission of this job, and a sentence about it."""
    if earlier is None:
        return cluster.submit(sent, 1), "submitted"
    if not earlier.ended:
        return earlier, f"{earlier.state} already"
    why = ", which its run does not confirm from here" if earlier.state == "succeeded" else ""
    return cluster.submit(sent, earlier.number + 1), f"submitted again after {earlier.id} {earlier.state}{why}"


def _followed(options: argparse.Namespace, cluster: RayJobs, submission: Submission) -> Submission:
    """How it ended; its log is printed on the way."""
    try:
        return cluster.follow(submission, lambda text: _tell(options, text, end=""))
    except KeyboardInterrupt:
        raise Interrupted(
            f"{submission.id} continues, but is not followed; the same command follows it again, --cancel stops it"
        ) from None


def _cancel(options: argparse.Namespace, cluster: RayJobs, sent: Shipment) -> int:
    submission = cluster.latest(sent.name)
    if submission is None:
        raise BadInput(f"--cancel: this job was never submitted to {options.address}")
    if submission.ended:
        _tell(options, f"{submission.id}: {submission.state} already")
    else:
        submission = cluster.stop(submission)
        _tell(options, f"{submission.id}: {submission.state}; submit the job again to go on")
    _result(options, sent, submission)
    return 0


def _tell(options: argparse.Namespace, text: str, *, end: str = "\n") -> None:
    if not options.quiet and not options.json:
        print(text, end=end, flush=True)


def _result(options: argparse.Namespace, sent: Shipment, submission: Submission) -> None:
    if options.json:
        print_json({"id": submission.id, "state": submission.state, "exit_code": submission.exit_code, "run": sent.run})
