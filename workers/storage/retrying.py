"""Patience with a service: how often to ask again, how long to wait, when to give up."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import TypeVar

from jobs.errors import BadInput, MergeyardError, StorageUnavailable
from jobs.stopping import pause as paused

PATIENCE_VARIABLE = "MERGEYARD_STORAGE_PATIENCE_SECONDS"
PATIENCE_SECONDS = 60.0
STALL_SECONDS = 20.0
CONNECT_SECONDS = 5.0
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 8.0

Result = TypeVar("Result")


def patience_seconds() -> float:
    """How long one request may be tried again and again; the environment may say otherwise."""
    text = os.environ.get(PATIENCE_VARIABLE, "")
    try:
        return float(text) if text else PATIENCE_SECONDS
    except ValueError:
        raise BadInput(f"{PATIENCE_VARIABLE}={text!r} is not a number of seconds; set one or unset it") from None


def stall_seconds() -> float:
    """How long a connection may stay silent before it is given up and the request is sent again."""
    return min(STALL_SECONDS, patience_seconds() / 3)


def patiently(
    action: Callable[[], Result],
    most: float | None = None,
    *,
    translated: Callable[[Exception], MergeyardError] | None = None,
) -> Result:
    """The action's result, tried again with growing random pauses for as long as it raises `StorageUnavailable`.

    A pause is as long as the service asks for, if it asks. It gives up after the seconds of `patience_seconds`; after
    `most`, if those are fewer, unless the service asked for a pause: then it is there. `translated` makes an error
    of ours of what a library raises; the original, whose text may hold a signed address, is then dropped. Once the
    user has stopped the program, it raises without a further try.
    """
    began = time.monotonic()
    pause, tries = FIRST_PAUSE_SECONDS, 0
    while True:
        tries += 1
        try:
            return _attempted(action, translated)
        except StorageUnavailable as error:
            wait = max(random.uniform(pause / 2, pause), error.pause)
            spent = time.monotonic() - began
            patience = patience_seconds() if most is None or error.pause else min(most, patience_seconds())
            if spent + wait > patience:
                later = f"in {error.pause:.0f} s, as it asks" if error.pause > patience else "later"
                raise StorageUnavailable(f"{error} (tried {tries} times in {spent:.0f} s); run again {later}") from None
            if paused(wait):
                raise
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


def _attempted(action: Callable[[], Result], translated: Callable[[Exception], MergeyardError] | None) -> Result:
    try:
        return action()
    except MergeyardError:
        raise
    except Exception as error:
        if translated is None:
            raise
        raise translated(error) from None
