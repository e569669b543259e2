"""How many requests a server gets at a time: fewer after it was busy, more after its answers.

Additive increase, multiplicative decrease, as in TCP (RFC 5681, 3.1): a busy server halves the window, and a window of
answers widens it by one. Requests that were under way when the window was halved do not halve it again.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

LONGEST_PAUSE_SECONDS = 30.0


class Closed(Exception):
    """The window was closed while a request waited for its turn."""


class Window:
    """The requests under way to one server, `most` at the most; its methods may be called from any thread.

    Requests wait in `enter`. After a busy reply nobody enters for as long as the server asked, or for `first_pause`
    seconds, doubled at each further busy reply up to `LONGEST_PAUSE_SECONDS`, until there is an answer.
    """

    def __init__(self, most: int, first_pause: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._allowed, self._under_way = most, float(most), 0
        self._first_pause, self._busy_replies = first_pause, 0
        self._clock = clock
        self._closed = False
        self._changed = threading.Condition()
        self._halved = float("-inf")
        self.opens = self.answered_at = clock()
        """When requests may begin again, and when the last answer came: both on the given clock."""

    @property
    def size(self) -> int:
        """The requests that may be under way now."""
        return int(self._allowed)

    def enter(self) -> float:
        """Waits for a turn; the time at which it came. Raises `Closed`."""
        with self._changed:
            while not self._closed:
                pause = self.opens - self._clock()
                if pause <= 0 and self._under_way < self.size:
                    self._under_way += 1
                    return self._clock()
                self._changed.wait(pause if pause > 0 else None)
            raise Closed

    def leave(self) -> None:
        """Ends a turn."""
        with self._changed:
            self._under_way -= 1
            self._changed.notify_all()

    def answered(self) -> None:
        """The server gave an answer."""
        with self._changed:
            self._allowed = min(float(self._most), self._allowed + 1 / self._allowed)
            self._busy_replies, self.answered_at = 0, self._clock()

    def busy(self, entered: float, asked: float) -> bool:
        """The server was too busy for a request that entered at `entered`, and asks to wait `asked` seconds.

        Returns whether the window was halved for it.
        """
        with self._changed:
            now = self._clock()
            halves = entered >= self._halved
            if halves:
                self._allowed, self._halved = max(1.0, self._allowed / 2), now
                pause = min(LONGEST_PAUSE_SECONDS, self._first_pause * 2**self._busy_replies)
                self._busy_replies += 1
                self.opens = max(self.opens, now + pause)
            self.opens = max(self.opens, now + asked)
            return halves

    def close(self) -> None:
        """Sends away all who wait."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
