"""Whether the user has stopped the program: then no thread waits to try again."""

from __future__ import annotations

import time

stopped = False
"""True from the signal on, until another command begins. A lock of an event could hold a signal's handler for ever."""

LOOK_SECONDS = 0.2


def pause(seconds: float) -> bool:
    """Waits so long, or until the program is stopped; whether it is."""
    end = time.monotonic() + seconds
    while not stopped and (left := end - time.monotonic()) > 0:
        time.sleep(min(left, LOOK_SECONDS))
    return stopped
