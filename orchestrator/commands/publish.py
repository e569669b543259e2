"""`mergeyard publish RUN/POINT DESTINATION`."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from jobs.errors import BadInput, ObjectMissing, printable
from orchestrator.commands.inputs import print_json, run_url, watched
from orchestrator.words import shortlist

if TYPE_CHECKING:
    from orchestrator.points.finding import FoundPoint


def publish(options: argparse.Namespace) -> int:
    """`mergeyard publish RUN/POINT DESTINATION`: to the hub with card and results, elsewhere the same bytes."""
    from orchestrator.points.copying import copy_point
    from orchestrator.points.publishing import publish_to_hub

    point, visible = _point(options.point), watched(options)

    def say(news: str) -> None:
        if visible:
            print(printable(news), file=sys.stderr, flush=True)

    if options.to.startswith("hf://"):
        facts = publish_to_hub(point, options.to, say, public=options.public, licence=options.license, visible=visible)
    else:
        if options.public or options.license:
            raise BadInput(f"{options.to}: --public and --license are for the hub; elsewhere go the very bytes")
        facts = copy_point(point, options.to, say)
    if options.json:
        print_json(facts)
    elif not options.quiet:
        same = f" (the same merge as {facts['same_as']})" if facts["same_as"] else ""
        news = "published" if facts["bytes_sent"] else "already there"
        weights = facts["weights"][:12]
        print(printable(f"{facts['point']}{same}: {facts['files']} files {news} at {facts['url']}, weights {weights}"))
        if options.public and facts["private"]:
            print(f"{facts['url']} was private before and stays so; its settings on the hub change that")
    return 0


def _point(text: str) -> FoundPoint:
    """A finished point, given as RUN/POINT, as its folder, or as the folder of a lone merge."""
    from orchestrator.points.finding import find_merge, find_point, finished_points
    from workers.storage import open_store

    run, _, point = text.rstrip("/").rpartition("/")
    run = "" if run.endswith(("/points", ":/")) else run
    if run and any(open_store(run_url(run)).list(f"points/{point}/manifest.json")):
        return find_point(run_url(run), point)
    try:
        return find_merge(text)
    except ObjectMissing:
        for place in (text, run):  # a run without a point, or a point that the run did not write
            if place and (names := finished_points(run_url(place))):
                raise ObjectMissing(f"{text}: no finished point there; {place} has {shortlist(names)}") from None
        raise
