"""A Ray head of its own: where it listens, its token, and when it is up."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

HOST = "127.0.0.2"  # Ray replaces 127.0.0.1 by the machine's address in the network
TOKEN = "0123456789abcdef" * 4

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="only Linux has 127.0.0.2 without being asked")


def wait_for_runtime(head: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while "Ray runtime started" not in log.read_text():
        assert head.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
