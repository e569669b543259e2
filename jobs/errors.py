"""Every error mergeyard raises on purpose, and the exit code each one ends the command with.

    MergeyardError               1   something failed; the message says what, where and what to do
    ├── BadInput                 2   the user's input is wrong; nothing was written
    ├── FailedMidway             1   an error of exit code 2 that came after something was written
    ├── NothingKept              1   no point of a search may be kept; the scores of all are written
    ├── StorageError             1
    │   ├── ObjectMissing        2   no such object, repository or revision
    │   │   └── BucketMissing    2   no such bucket
    │   ├── StorageRefused       2   the store refuses a request for good: a wrong region, a request it does not have
    │   │   └── AccessDenied     2   credentials are missing or not enough
    │   ├── ObjectExists         1   a create-only write lost: another writer was first
    │   ├── ObjectChanged        1   the object is no longer the version that was pinned
    │   └── StorageUnavailable  75   a store failed for longer than we were ready to wait; also `Unavailable`
    ├── CorruptData              1   bytes contradict their header, length or digest
    ├── NotFinite                1   a merge of finite numbers has NaN or infinity in it; it is written
    ├── RunBusy                 75   another driver holds this run
    ├── Unavailable             75   a service or a cluster does not answer, or has no room now; try again
    ├── WorkerLost              75   a worker died more often than it may; try again
    └── Interrupted             75   stopped by a signal; the same command continues

Exit code 3 is not an error: a gate ends with it when the scores allow no verdict.

An error carries one line: the thing, the place, the remedy. It travels between processes by its
positional arguments alone, so every class must survive `pickle`.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager


def printable(text: str) -> str:
    """Text from a file or a server on one line, with an escape for each character that a terminal would obey."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


class MergeyardError(Exception):
    """Base of all; `exit_code` ends the command, `retry` says whether the same call may succeed later."""

    exit_code = 1
    retry = False

    def __str__(self) -> str:
        return " ".join(str(argument) for argument in self.args)


class BadInput(MergeyardError):
    """The user's input cannot work; one line names the place and the remedy."""

    exit_code = 2


class FailedMidway(MergeyardError):
    """An error of exit code 2 that came after something was written; its words are those of its cause."""


class NothingKept(MergeyardError):
    """No point of a search may be kept; the scores of all are written."""


class StorageError(MergeyardError):
    """A store could not carry out a request."""


class ObjectMissing(StorageError):
    """There is no such object, repository or revision."""

    exit_code = 2


class BucketMissing(ObjectMissing):
    """There is no such bucket."""


class StorageRefused(StorageError):
    """The store refuses a request, and will refuse it at every other try."""

    exit_code = 2


class AccessDenied(StorageRefused):
    """The store refuses these credentials."""


class ObjectExists(StorageError):
    """A create-only write found the object already there."""


class ObjectChanged(StorageError):
    """The object's ETag is not the one that was pinned."""


class Unavailable(MergeyardError):
    """A service or a cluster does not answer, or has no room now; a later call may succeed."""

    exit_code = 75
    retry = True
    pause = 0.0
    """Seconds that the service asked to wait before the next try (`Retry-After`)."""


class StorageUnavailable(StorageError, Unavailable):
    """A store kept failing in a way that a retry may mend."""


class CorruptData(MergeyardError):
    """Bytes contradict their header, their length or their digest."""


class NotFinite(MergeyardError):
    """A merge of finite numbers gave NaN or infinity; the weights are written as they are."""


class RunBusy(MergeyardError):
    """Another driver holds the lease of this run."""

    exit_code = 75


class WorkerLost(MergeyardError):
    """A worker process died while it held a task."""

    exit_code = 75
    retry = True


class Interrupted(MergeyardError):
    """A signal stopped the command; running it again resumes."""

    exit_code = 75


@contextmanager
def writing() -> Generator[None]:
    """Something is written inside: an error that would end the command with 2 is raised as `FailedMidway`.

    Exit code 2 promises that nothing was written.
    """
    try:
        yield
    except MergeyardError as error:
        if error.exit_code == BadInput.exit_code:
            raise FailedMidway(str(error)) from error
        raise
