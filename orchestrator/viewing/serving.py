"""The page over HTTP, for a browser on this machine and nobody else."""

from __future__ import annotations

import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import urlsplit

from jobs.errors import BadInput, MergeyardError, ObjectMissing
from orchestrator.viewing.site import INDEX, RUN, read_site
from workers.storage import open_store

ADDRESS = "127.0.0.1"
LOOK_SECONDS = 5.0
"""The results of a run that goes on are looked at so often at most."""

TYPES = {".html": "text/html; charset=utf-8", ".json": "application/json", ".gz": "application/gzip"}


class ViewServer(ThreadingHTTPServer):
    """Serves the page of one run. `port` 0 takes a free one; `BadInput` if the port is taken."""

    daemon_threads = True

    def __init__(self, run_url: str, port: int) -> None:
        self._run_url = run_url
        self._site = read_site(run_url, live=True)
        self._looking = threading.Lock()
        self._not_before = time.monotonic() + LOOK_SECONDS
        self._etag = self._results()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise BadInput(f"--port {port}: cannot be used ({reason}); give another, or 0 for a free one") from None

    @property
    def url(self) -> str:
        """The address of the page."""
        return f"http://{ADDRESS}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, str]:
        """The names by which a browser may ask: a foreign page cannot reach it under a name of its own."""
        return f"{ADDRESS}:{self.server_port}", f"localhost:{self.server_port}"

    def read(self, path: str) -> bytes:
        """The bytes of a file of the page, of the newest results; `ObjectMissing` for any other."""
        if path == RUN and not self._site.document["finished"]:
            self._renew()
        return self._site.read(path)

    def _renew(self) -> None:
        """Reads the run again if its results changed."""
        with self._looking:
            if time.monotonic() < self._not_before:
                return
            if (etag := self._results()) != self._etag:
                self._site, self._etag = read_site(self._run_url, live=True), etag
            self._not_before = time.monotonic() + LOOK_SECONDS

    def _results(self) -> tuple[str, ...]:
        """The ETags of the files that are renewed: rows first, then `finished`."""
        store = open_store(self._run_url)
        return tuple(store.locate(key).etag for key in ("report/results.parquet", "report/evaluation.json"))


class _Handler(BaseHTTPRequestHandler):
    server_version, sys_version = "mergeyard", ""

    def do_GET(self) -> None:
        server = cast(ViewServer, self.server)
        if self.headers.get("Host", "") not in server.hosts:
            self.send_error(HTTPStatus.FORBIDDEN, "ask by the address that `mergeyard view` printed")
            return
        path = urlsplit(self.path).path.lstrip("/") or INDEX
        try:
            content = server.read(path)
        except ObjectMissing:
            self.send_error(HTTPStatus.NOT_FOUND)
            return
        except MergeyardError as error:
            self.send_error(HTTPStatus.BAD_GATEWAY, explain=str(error))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", TYPES[path[path.rindex(".") :]])
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("Cache-Control", "max-age=3600" if path.endswith(".gz") else "no-store")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal shows the address alone."""
