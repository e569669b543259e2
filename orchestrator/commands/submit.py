"""`mergeyard submit JOB.yaml --address URL`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from jobs.errors import BadInput, Interrupted
from orchestrator.commands.inputs import print_json, read_job

if TYPE_CHECKING:
    from orchestrator.ray_submission import RayJobs, Submission
    from orchestrator.submitting import Shipment


def submit(options: argparse.Namespace) -> int:
    """`mergeyard submit JOB.yaml --address URL`: the job's own exit code; 0 with `--no-wait` and `--cancel`."""
    from orchestrator.ray_submission import RayJobs
    from orchestrator.submitting import shipment

    job, folder = read_job(options)
    sent = shipment(job, folder, options.address)
    cluster = RayJobs(options.address)
    if options.cancel:
        return _cancel(options, cluster, sent)
    submission, news = _submitted(cluster, sent)
    _tell(options, f"{submission.id}: {news}")
    if submission.state == "succeeded" or options.no_wait:
        _result(options, sent, submission)
        return 0
    try:
        ended = cluster.follow(submission, lambda text: _tell(options, text, end=""))
    except KeyboardInterrupt:
        raise Interrupted(
            f"{submission.id} is no longer followed, and goes on; the same command follows it again, --cancel stops it"
        ) from None
    _result(options, sent, ended)
    code = ended.outcome()
    if code and (options.quiet or options.json):
        print(*cluster.log(ended).splitlines()[-1:], file=sys.stderr)
    return code


def _submitted(cluster: RayJobs, sent: Shipment) -> tuple[Submission, str]:
    """The submission of this job that counts now, and what to say of it."""
    earlier = cluster.latest(sent.name)
    if earlier is None:
        return cluster.submit(sent, 1), f"submitted, its run is {sent.run}"
    if earlier.state == "succeeded":
        return earlier, f"succeeded already, its run is {sent.run}"
    if not earlier.ended:
        return earlier, f"{earlier.state} already, its run is {sent.run}"
    return cluster.submit(sent, earlier.number + 1), f"submitted again after {earlier.id} {earlier.state}"


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
