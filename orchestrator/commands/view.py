"""`mergeyard view RUN`."""

from __future__ import annotations

import argparse
import threading
import webbrowser
from contextlib import suppress

from jobs.errors import writing
from orchestrator.commands.inputs import print_json, run_url
from orchestrator.words import size


def view(options: argparse.Namespace) -> int:
    """`mergeyard view RUN`: a page with the answers, until Ctrl-C; with `--export`, static files in its place."""
    url = run_url(options.run)
    if options.export is not None:
        return _export(url, options)
    from orchestrator.viewing.serving import ViewServer

    with ViewServer(url, options.port) as server:
        print_json({"url": server.url}) if options.json else print(f"{server.url}  Ctrl-C ends it", flush=True)
        if not options.no_browser:
            address = server.url + (f"#{options.at.lstrip('#')}" if options.at else "")
            # a thread: a browser in the terminal returns at its end, and the page has to be served meanwhile
            threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()
        with suppress(KeyboardInterrupt):
            server.serve_forever()
    return 0


def _export(url: str, options: argparse.Namespace) -> int:
    from orchestrator.viewing.address import EXPORT
    from orchestrator.viewing.exporting import export
    from orchestrator.viewing.site import read_site

    site = read_site(url, live=False)
    found = export(site, options.export or f"{url}/{EXPORT.rstrip('/')}")
    if not options.export:  # the report links to it
        with writing():
            from orchestrator.report.page import write_page
            from orchestrator.report.run import read_run, report_on

            write_page(report_on(read_run(url)))
    if options.json:
        print_json({"export": found.url, "files": found.files, "bytes": found.bytes})
    else:
        print(f"{found.url}/index.html: {found.files:,} files, {size(found.bytes)}")
    return 0
