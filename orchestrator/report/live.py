"""The page while a run goes on, and at its end: whatever happens to it, the run goes on."""

from __future__ import annotations

import logging
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.evaluating.results import EvaluationResult
    from orchestrator.report.leaderboard import Line
    from orchestrator.report.recommendation import Recommendation

CLOSE_SECONDS = 20.0
"""How long a session that ends waits for a page that is being drawn; it is left unwritten then."""

SHARE = 20
"""A page is drawn in a twentieth of the time at most."""

log = logging.getLogger(__name__)


def written_page(
    run_url: str, result: EvaluationResult | None = None, lines: list[Line] | None = None
) -> tuple[str, Recommendation | None] | None:
    """Writes the page of a run: where it lies, and its recommendation. None, and a warning, if that cannot be."""
    from orchestrator.report.page import write_page
    from orchestrator.report.run import read_run, report_on

    try:
        report = report_on(read_run(run_url, result), lines)
        return write_page(report), report.recommendation
    except Exception as error:  # answers that took hours are worth more than a page that can be drawn again
        log.warning("%s: no page (%s); `mergeyard report` writes it", run_url, error)
        return None


class LivePage:
    """Draws the page of a run now and then, in a thread of its own, from the files of the run."""

    def __init__(self, run_url: str) -> None:
        self._run_url = run_url
        self._thread: threading.Thread | None = None
        self._closed = threading.Event()
        self._not_before = 0.0

    def renew(self) -> None:
        """Begins to draw, unless a page is being drawn or the last one took so long that it is too early."""
        drawing = self._thread is not None and self._thread.is_alive()
        if drawing or self._closed.is_set() or time.monotonic() < self._not_before:
            return
        self._thread = threading.Thread(target=self._draw, name="page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """No page is written from now on; whoever comes next writes the last one."""
        self._closed.set()
        if self._thread is not None:
            self._thread.join(CLOSE_SECONDS)

    def _draw(self) -> None:
        from orchestrator.report.page import page, put_page
        from orchestrator.report.run import read_run, report_on

        began = time.monotonic()
        try:
            text = page(report_on(read_run(self._run_url)))
            if not self._closed.is_set():
                put_page(self._run_url, text)
        except Exception as error:  # as above; the next one may work
            log.warning("%s: no page (%s)", self._run_url, error)
        self._not_before = time.monotonic() + SHARE * (time.monotonic() - began)
