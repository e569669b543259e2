"""Progress of a run on stderr: points, bytes, GB/s, items, time left. Silent unless stderr is a terminal."""

from __future__ import annotations

import sys
import threading
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class Watcher:
    """Bars on stderr: merged bytes and finished points, then answered tokens; only there when `visible`.

    With `tells`, decisions during the run are printed even without bars.
    """

    def __init__(self, *, visible: bool, tells: bool = False) -> None:
        self._visible = visible
        self._tells = tells
        self._bars: Progress | None = None
        self._merging: TaskID | None = None
        self._lock = threading.Lock()
        self._done = 0
        self._points = 0
        self._stages: Progress | None = None
        self._stage: TaskID | None = None

    def __enter__(self) -> Watcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for bars in (self._bars, self._stages):
            if bars is not None:
                bars.stop()

    def begin(self, points: int, total_bytes: int) -> None:
        """Starts the bar of a merge that writes `total_bytes` bytes for `points` points."""
        self._points = points
        if not self._visible or not total_bytes:
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(compact=True),
            console=Console(file=sys.stderr),
            transient=True,
        )
        self._merging = self._bars.add_task(self._title(), total=total_bytes)
        self._bars.start()

    def moved(self, read: int, written: int) -> None:
        """Bytes went in or out; called from any thread."""
        if self._bars is not None and self._merging is not None and written:
            self._bars.advance(self._merging, written)

    def point_done(self, name: str) -> None:
        """A point has its manifest."""
        with self._lock:
            self._done += 1
        if self._bars is not None and self._merging is not None:
            self._bars.update(self._merging, description=self._title())

    # progress of an evaluation

    def begin_stage(self, total_tokens: int, text: str) -> None:
        """A stage of an evaluation begins: this many context tokens are to be answered."""
        if not self._visible:
            return
        if self._stages is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._stages = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("k tokens"),
                TimeRemainingColumn(compact=True),
                console=Console(file=sys.stderr),
                transient=True,
            )
            self._stages.start()
        if self._stage is not None:
            self._stages.remove_task(self._stage)
        self._stage = self._stages.add_task(text, total=total_tokens // 1000)

    def advance(self, tokens: int) -> None:
        """So many of them are."""
        if self._stages is not None and self._stage is not None:
            self._stages.advance(self._stage, tokens / 1000)

    def tell(self, text: str) -> None:
        """A line for whoever watches, even where no bar is drawn."""
        if self._stages is not None:
            self._stages.console.print(text, highlight=False)
        elif self._tells:
            print(text, file=sys.stderr)

    def _title(self) -> str:
        return f"merging {self._done}/{self._points} points"
