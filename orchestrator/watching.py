"""Progress of a command: bars on a terminal, lines in a pipe, facts for the lease that `mergeyard status` reads."""

from __future__ import annotations

import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from jobs.errors import printable
from orchestrator.words import count, duration, size

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

LINE_SECONDS = 30.0
"""Without a terminal, a stage prints one line when it begins and one per this many seconds."""

FAILURES_KEPT = 3


@dataclass(slots=True)
class _Stage:
    """A stage of a command and its work, in bytes or in tokens; `points` is 0 in an evaluation."""

    text: str
    total: int
    unit: Literal["bytes", "tokens"]
    points: int = 0
    points_done: int = 0
    done: int = 0
    began: float = field(default_factory=time.monotonic)

    @property
    def title(self) -> str:
        return f"{self.text} {self.points_done}/{self.points} points" if self.points else self.text

    @property
    def left(self) -> float | None:
        """Seconds until the end at the present rate; None before anything is done."""
        return (time.monotonic() - self.began) * (self.total - self.done) / self.done if self.done else None

    def amount(self) -> str:
        """Work done and total, and the rate: 1.2 GB of 3.1 GB, 96 MB/s."""
        written, unit = (size, "") if self.unit == "bytes" else (count, " tokens")
        if not self.done:
            return f"{written(self.total)}{unit}"
        rate = self.done / max(time.monotonic() - self.began, 1e-3)
        return f"{written(self.done)} of {written(self.total)}{unit}, {written(rate)}/s"

    def line(self) -> str:
        if not self.total:
            return self.title
        left = f", {duration(self.left)} left" if self.left else ""
        return f"{self.title}: {self.amount()}{left}"


class Watcher:
    """The progress of one command; its methods may be called from any thread.

    With `visible`, stderr has a bar. Else, with `tells`, it gets one line when a stage begins, one per `LINE_SECONDS`,
    and the decisions of `tell`.
    """

    def __init__(self, *, visible: bool, tells: bool = False) -> None:
        self._visible = visible
        self._tells = tells
        self._bars: Progress | None = None
        self._bar: TaskID | None = None
        self._lock = threading.Lock()
        self._stage: _Stage | None = None
        self._failed = 0
        self._failures: deque[str] = deque(maxlen=FAILURES_KEPT)
        self._ended = threading.Event()
        self._repeating: threading.Thread | None = None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self._bars is not None:
            self._bars.stop()

    def begin(self, points: int, total_bytes: int) -> None:
        """A merge begins that writes `total_bytes` bytes for `points` points."""
        self._begin(_Stage("merging", total_bytes, "bytes", points))

    def begin_stage(self, total_tokens: int, text: str) -> None:
        """A stage of an evaluation begins, with this many context tokens to answer."""
        self._begin(_Stage(text, total_tokens, "tokens"))

    def begin_writing(self, total_bytes: int, text: str) -> None:
        """A checkpoint of this many bytes is made and written."""
        self._begin(_Stage(text, total_bytes, "bytes"))

    def moved(self, read: int, written: int) -> None:
        """A merge has read and written these many bytes more."""
        self.advance(written)

    def advance(self, amount: int) -> None:
        """These many bytes or tokens more are done."""
        with self._lock:
            if self._stage is not None and amount:
                self._stage.done += amount
                self._draw(self._stage)

    def point_done(self, name: str) -> None:
        """A point has its manifest."""
        with self._lock:
            if self._stage is not None:
                self._stage.points_done += 1
                self._draw(self._stage)

    def failed(self, error: Exception) -> None:
        """A task failed and will be tried again."""
        with self._lock:
            self._failed += 1
            self._failures.append(" ".join(str(error).split()))

    def tell(self, text: str) -> None:
        """Prints a decision, also where no bar is drawn."""
        if self._bars is not None:
            self._bars.console.print(printable(text), highlight=False, markup=False)
        elif self._tells:
            print(printable(text), file=sys.stderr, flush=True)

    def facts(self) -> dict[str, Any]:
        """The present stage, its work and its rate, and the failed tasks; for `mergeyard status`."""
        with self._lock:
            stage, failures = self._stage, {"failed": self._failed, "failures": list(self._failures)}
            if stage is None:
                return failures
            return {
                "stage": stage.title,
                "unit": stage.unit,
                "done": stage.done,
                "total": stage.total,
                "seconds": round(time.monotonic() - stage.began, 1),
                **failures,
            }

    def _begin(self, stage: _Stage) -> None:
        with self._lock:
            self._stage = stage
            if self._visible and stage.total:
                self._show(stage)
        if not self._visible:
            self.tell(stage.line())
            if self._tells and self._repeating is None:
                self._repeating = threading.Thread(target=self._repeat, name="progress", daemon=True)
                self._repeating.start()

    def _repeat(self) -> None:
        while not self._ended.wait(LINE_SECONDS):
            stage = self._stage
            if stage is not None and stage.done < stage.total:
                self.tell(stage.line())

    def _show(self, stage: _Stage) -> None:
        """Begins a bar, in place of that of the stage before."""
        if self._bars is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[amount]}"),
                TimeRemainingColumn(compact=True),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._bars.start()
        if self._bar is not None:
            self._bars.remove_task(self._bar)
        self._bar = self._bars.add_task(stage.title, total=stage.total, amount=stage.amount())

    def _draw(self, stage: _Stage) -> None:
        if self._bars is not None and self._bar is not None:
            self._bars.update(self._bar, completed=stage.done, description=stage.title, amount=stage.amount())
