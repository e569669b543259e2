"""Ray's Jobs API: the same job is one submission, whoever submits it and however often, and its log is followed.

A submission that failed or was stopped is followed by one with a number: `…-2`. The ledger finds its work.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from jobs.errors import AccessDenied, BadInput, Interrupted, MergeyardError, Unavailable, WorkerLost
from orchestrator.cluster.reaching import check_reachable
from orchestrator.cluster.shipment import Shipment
from workers.fingerprint import fingerprint

if TYPE_CHECKING:
    from ray.job_submission import JobDetails, JobSubmissionClient


POLL_SECONDS = 1.0
PATIENCE_SECONDS = 120.0
"""How long a dashboard may be away while its job is followed."""

LOG_BYTES_A_SECOND = 100_000
"""How much of a job's log is asked for while it is followed: it always comes whole, from its first line on."""

STOP_SECONDS = 60.0
OUR_CODES = (1, 2, 3, 75)
LARGEST_CODE = 128
"""Above it, and below 0, an exit code tells of the signal that ended a process."""

OVERRIDES = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")
"""Ray lets these decide in place of the address that it is given."""

TALKATIVE = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")
"""Loggers that tell of every package that they send."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Submission:
    """One submission of a job: its id on the cluster, its number from 1, and how it stands.

    `state` is Ray's, in lower case; `exit_code` is the driver's, None while it runs or when it never ran; `code` is the
    fingerprint of the code that was sent. `lost` says that the process that watched over it died.
    """

    id: str
    number: int
    state: str
    exit_code: int | None
    message: str
    code: str
    lost: bool

    @property
    def ended(self) -> bool:
        """Whether it neither runs nor waits."""
        return self.state in ("succeeded", "failed", "stopped")

    def outcome(self) -> int:
        """The exit code of the job, when it has ended; raises an error if the job ended without one of our codes."""
        if self.state == "succeeded":
            return 0
        if self.state == "stopped":
            raise Interrupted(f"{self.id} was stopped; submit the job again to go on")
        if self.exit_code in OUR_CODES:
            return self.exit_code
        reason = next(iter(self.message.splitlines()), "no reason given")
        killed = self.exit_code is not None and not 0 <= self.exit_code <= LARGEST_CODE
        if killed or self.lost:
            raise WorkerLost(f"{self.id} was lost: {reason}; submit the job again to go on")
        raise MergeyardError(f"{self.id} failed: {reason}")


class RayJobs:
    """The jobs of the cluster whose dashboard is at `address`, asked with the token that this user has, if any.

    `Unavailable` for an address where nothing answers now, `AccessDenied` for a cluster that wants another token.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        check_reachable(address, _place(address), "nothing", "is the dashboard's port forwarded?")
        if _has_token():
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        self._client = self._asked(lambda: _client(address))

    def latest(self, name: str) -> Submission | None:
        """The newest submission of the job, None where it was never submitted here."""
        pattern = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
        found: list[Submission] = []
        for details in self._asked(lambda: self._client.list_jobs()):
            if match := pattern.fullmatch(details.submission_id or ""):
                found.append(_submission(details, int(match[1] or 1)))
        return max(found, key=lambda submission: submission.number, default=None)

    def submit(self, shipment: Shipment, number: int) -> Submission:
        """Submits the job, or finds the submission that another client made a moment ago."""
        submission_id = shipment.name if number == 1 else f"{shipment.name}-{number}"
        with TemporaryDirectory(prefix="mergeyard-submit-") as folder:
            shipment.pack(Path(folder))
            try:
                self._asked(
                    lambda: self._client.submit_job(
                        entrypoint=shipment.entrypoint,
                        submission_id=submission_id,
                        runtime_env={"working_dir": folder},
                        metadata={"run": shipment.run, "code": fingerprint()},
                        entrypoint_num_cpus=0,
                    )
                )
            except MergeyardError:
                if (now := self.latest(shipment.name)) is None or now.number < number:
                    raise
        return self._standing(submission_id, number)

    def follow(self, submission: Submission, say: Callable[[str], None]) -> Submission:
        """Gives the job's log to `say`, piece by piece, until it ends; how it ended."""
        told, not_before = 0, 0.0
        while True:
            now = self._patiently(lambda: self._standing(submission.id, submission.number))
            if now.ended or time.monotonic() >= not_before:
                log = self.log(submission)
                if len(log) > told:
                    say(log[told:])
                    told = len(log)
                not_before = time.monotonic() + told / LOG_BYTES_A_SECOND
            if now.ended:
                return now
            time.sleep(POLL_SECONDS)

    def log(self, submission: Submission) -> str:
        """All that the job has printed; empty before it starts."""
        try:
            return self._asked(lambda: self._client.get_job_logs(submission.id))
        except MergeyardError:
            return ""

    def stop(self, submission: Submission) -> Submission:
        """Stops the job and waits for its end."""
        self._asked(lambda: self._client.stop_job(submission.id))
        deadline = time.monotonic() + STOP_SECONDS
        while not (now := self._standing(submission.id, submission.number)).ended:
            if time.monotonic() > deadline:
                raise Unavailable(f"{submission.id} has not stopped within {STOP_SECONDS:.0f} s; try again")
            time.sleep(POLL_SECONDS)
        return now

    def _standing(self, submission_id: str, number: int) -> Submission:
        return _submission(self._asked(lambda: self._client.get_job_info(submission_id)), number)

    def _patiently(self, ask: Callable[[], Result]) -> Result:
        """The answer, asked for again while the dashboard is away."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                return ask()
            except Unavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(POLL_SECONDS)

    def _asked(self, ask: Callable[[], Result]) -> Result:
        """Ray's answer, or its refusal in one line."""
        from ray.exceptions import AuthenticationError

        try:
            return ask()
        except AuthenticationError:
            raise AccessDenied(
                f"--address {self._address}: the cluster wants its token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN"
            ) from None
        except (ConnectionError, OSError):  # requests' own are OSErrors
            raise Unavailable(
                f"--address {self._address}: the cluster no longer answers; its runs continue from stored results,"
                " see `mergeyard status`"
            ) from None
        except (RuntimeError, ValueError) as error:
            raise MergeyardError(f"--address {self._address}: {str(error).splitlines()[0][:300]}") from None


def _client(address: str) -> JobSubmissionClient:
    from ray.job_submission import JobSubmissionClient

    for name in TALKATIVE:
        logging.getLogger(name).setLevel(logging.WARNING)
    with _unset(OVERRIDES):
        return JobSubmissionClient(address)


@contextmanager
def _unset(names: tuple[str, ...]) -> Generator[None, None, None]:
    kept = {name: os.environ.pop(name) for name in names if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _submission(details: JobDetails, number: int) -> Submission:
    state: Any = details.status
    return Submission(
        id=str(details.submission_id),
        number=number,
        state=str(state.value).lower(),
        exit_code=details.driver_exit_code,
        message=details.message or "",
        code=(details.metadata or {}).get("code", ""),
        lost=(details.error_type or "").startswith("JOB_SUPERVISOR"),
    )


def _has_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN") or os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(named) or Path("~/.ray/auth_token").expanduser().is_file()


def _place(address: str) -> str:
    """host:port of a dashboard's URL."""
    parts = urlsplit(address)
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError:
        port = 0
    if parts.scheme not in ("http", "https") or not parts.hostname or not port:
        raise BadInput(f"--address {address}: give the URL of the cluster's dashboard, such as http://127.0.0.1:8265")
    return f"{parts.hostname}:{port}"
