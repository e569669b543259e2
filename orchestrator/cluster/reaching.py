"""Whether anything listens at an address."""

from __future__ import annotations

import socket

from jobs.errors import Unavailable

REACH_SECONDS = 10.0


def reach(place: str, seconds: float = REACH_SECONDS) -> None:
    """Connects to host:port and hangs up; OSError where nothing answers."""
    host, _, port = place.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def check_reachable(address: str, place: str, who: str, remedy: str) -> None:
    """`Unavailable` where nothing answers at `place` (host:port) now, which Ray would try for minutes."""
    try:
        reach(place)
    except OSError as error:
        raise Unavailable(f"--address {address}: {who} answers there ({error}); {remedy}") from None
