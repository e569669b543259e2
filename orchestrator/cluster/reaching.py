"""Checks whether a server listens at an address."""

from __future__ import annotations

import socket

from jobs.errors import BadInput, Unavailable

REACH_SECONDS = 10.0


def reach(place: str, seconds: float = REACH_SECONDS) -> None:
    """Connects to host:port and disconnects; OSError if there is no answer."""
    host, _, port = place.rpartition(":")
    socket.create_connection((host.strip("[]"), int(port)), seconds).close()


def check_address(address: str) -> None:
    """`BadInput` if this is not what the head of a Ray cluster listens at."""
    host, _, port = address.rpartition(":")
    if address != "auto" and (not port.isdigit() or not 0 < int(port) < 1 << 16 or "/" in host):
        raise BadInput(f"--address {address}: give host:port of the cluster's head (Ray's own port is 6379), or auto")


def check_reachable(address: str, place: str, who: str, remedy: str) -> None:
    """`Unavailable` if `place` (host:port) does not answer; Ray itself would retry for minutes."""
    try:
        reach(place)
    except OSError as error:
        raise Unavailable(f"--address {address}: {who} answers there ({error}); {remedy}") from None
