"""The real command in a process of its own, watched from outside: its descendants, its end, what it leaves."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import chdir, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from orchestrator.cli import main

ROOT = Path(__file__).parents[2]
POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Ended:
    """How a command ended: exit code, standard output, standard error."""

    code: int
    out: str
    err: str

    @property
    def facts(self) -> dict[str, Any]:
        """What `--json` printed, when the command succeeded."""
        assert self.code == 0, self.err
        return json.loads(self.out)

    def refused_with(self, code: int) -> str:
        """The one line it ended with, after those of its progress, and with this exit code."""
        assert self.code == code, (self.code, self.err)
        lines = [line for line in self.err.splitlines() if not line.startswith(("merging ", "making ", "evaluating "))]
        assert len(lines) == 1, self.err
        assert self.out == ""
        return lines[0]


def run_here(*arguments: str | Path, folder: Path) -> Ended:
    """The command in this process, which has imported its libraries already; for what Ray and signals do not change."""
    out, err = io.StringIO(), io.StringIO()
    with chdir(folder), redirect_stdout(out), redirect_stderr(err):
        code = main([str(argument) for argument in arguments])
    return Ended(code, out.getvalue(), err.getvalue())


def _heed_interrupts() -> None:
    """What a shell puts into the background ignores SIGINT, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Command:
    """A running `mergeyard …`, the leader of a process group of its own, as a terminal would start it.

    `within` is put before it, to run it in a network namespace.
    """

    def __init__(
        self, arguments: tuple[str, ...], folder: Path, environment: Mapping[str, str], within: tuple[str, ...] = ()
    ) -> None:
        self._files = tuple(folder / f"{time.monotonic_ns()}.{name}" for name in ("out", "err"))
        with self._files[0].open("wb") as out, self._files[1].open("wb") as err:
            self.process = subprocess.Popen(
                [*within, sys.executable, "-P", "-m", "orchestrator.cli", *arguments],
                stdout=out,
                stderr=err,
                cwd=folder,
                env=dict(environment),
                start_new_session=True,
                preexec_fn=_heed_interrupts,
            )
        self._seen: dict[int, psutil.Process] = {}

    def look(self) -> list[psutil.Process]:
        """The processes below it now; all that were ever seen are remembered."""
        with suppress(psutil.NoSuchProcess):
            below = psutil.Process(self.process.pid).children(recursive=True)
            self._seen.update({process.pid: process for process in below})
            return below
        return []

    def until(self, condition: Callable[[], Any], seconds: float = 120) -> Any:
        """What the condition says, once that is true; the command must not end before."""
        deadline = time.monotonic() + seconds
        while not (said := condition()):
            self.look()
            assert self.process.poll() is None, f"ended before its time: {self.ended()}"
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {condition}"
            time.sleep(POLL_SECONDS)
        return said

    def said(self) -> str:
        """What it has printed so far."""
        return self._files[0].read_text()

    def ended(self, seconds: float = 240) -> Ended:
        """How it ended, waiting for that."""
        deadline = time.monotonic() + seconds
        while self.process.poll() is None:
            self.look()
            assert time.monotonic() < deadline, f"still running after {seconds:g} s: {self._files[1].read_text()}"
            time.sleep(POLL_SECONDS)
        return Ended(self.process.returncode, *(file.read_text() for file in self._files))

    def workers(self) -> list[psutil.Process]:
        """The Ray workers, busy or idle."""
        return [process for process in self.look() if _name(process).startswith(("ray::_merge", "ray::IDLE"))]

    def merging(self) -> list[psutil.Process]:
        """The Ray workers that are at a merge task now."""
        return [process for process in self.look() if _name(process).startswith("ray::_merge")]

    def survivors(self, seconds: float, but: Collection[str] = ()) -> list[str]:
        """What still runs of it when all had this long to end; returns as soon as nothing does `but` what is named."""
        deadline = time.monotonic() + seconds
        while True:
            left = [_name(process) for process in self._seen.values() if _lives(process)]
            if time.monotonic() > deadline or set(left) <= set(but):
                return left
            time.sleep(POLL_SECONDS)

    def clean_up(self) -> None:
        """Ends all that is left of it."""
        self.look()
        self.process.kill()
        self.process.wait()
        for process in self._seen.values():
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _name(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):
        return process.name()
    return ""


def _lives(process: psutil.Process) -> bool:
    with suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False
