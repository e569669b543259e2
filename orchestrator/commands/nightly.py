"""`mergeyard nightly JOB.yaml`."""

from __future__ import annotations

import argparse
import getpass
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.errors import printable
from orchestrator.commands.inputs import check_file, print_json, read_job, watched
from orchestrator.commands.workplace import Workplace

if TYPE_CHECKING:
    from jobs.job import Job
    from orchestrator.nightly.book import Blessed, Book, Night
    from orchestrator.nightly.tonight import Tonight


def nightly(options: argparse.Namespace) -> int:
    """`mergeyard nightly JOB.yaml`: 0 pass, 1 fail, 3 inconclusive; if nothing has changed, as the last night."""
    from orchestrator.judging.gate import EXIT_CODES
    from orchestrator.nightly.tonight import Nightly
    from orchestrator.nightly.words import junit
    from orchestrator.watching import Watcher

    job, folder = read_job(options)
    if options.bless is not None:
        return _bless(job, options)
    check_file("--junit", options.junit)
    with Workplace(job, options) as workplace, Watcher(visible=watched(options), tells=not options.quiet) as watcher:
        tonight = Nightly(job, folder, workplace.evaluators, lambda: workplace.pool, watcher, _conclude).run()
    if options.junit:
        Path(options.junit).write_text(junit(tonight.night), encoding="utf-8")
    if options.json:
        print_json(_facts(tonight))
    else:
        _print(tonight)
    return EXIT_CODES[tonight.night.outcome]


def _bless(job: Job, options: argparse.Namespace) -> int:
    """`mergeyard nightly JOB.yaml --bless NIGHT`: 0 if the pointer names that night's point now."""
    from orchestrator.nightly.tonight import bless

    book, blessed = bless(job, options.bless, f"{_user()}@{socket.gethostname()}")
    _write_page(book, book.nights(), blessed)
    if options.json:
        print_json({"blessed": asdict(blessed)})
    elif not options.quiet:
        print(f"blessed: {blessed.words}")
    return 0


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        return str(os.getuid())


def _conclude(book: Book, night: Night, history: Sequence[Night]) -> None:
    """Calls the webhook, then renews the page: a missing page is noticed, a missing message is not."""
    from orchestrator.nightly.page import PAGE
    from orchestrator.nightly.webhook import tell
    from orchestrator.nightly.words import headline, reasons

    name = book.store.url.rsplit("/", 1)[-1]
    blessed = book.blessed()
    warning = tell(f"{name}: {headline(night, blessed)}", ["\n".join([*reasons(night), f"{book.store.url}/{PAGE}"])])
    if warning is not None:
        print(printable(f"mergeyard: warning: {warning}"), file=sys.stderr)
    _write_page(book, history, blessed)


def _write_page(book: Book, history: Sequence[Night], blessed: Blessed | None) -> None:
    from jobs.sealing import stamped_text
    from orchestrator.nightly.page import PAGE, nights_page

    name = book.store.url.rsplit("/", 1)[-1]
    book.store.write(PAGE, stamped_text(nights_page(name, history, blessed), "<!-- {} -->"))


def _facts(tonight: Tonight) -> dict[str, object]:
    return {
        "ending": tonight.ending,
        "outcome": tonight.night.outcome,
        "blessed": None if tonight.blessed is None else asdict(tonight.blessed),
        "night": asdict(tonight.night),
    }


def _print(tonight: Tonight) -> None:
    from orchestrator.nightly.words import headline, reasons

    night = tonight.night
    if tonight.ending == "unchanged":
        print(f"nothing has changed since night {night.night} (that ended: {night.outcome}); nothing done")
    else:
        print(headline(night, tonight.blessed))
        print(*(f"  {reason}" for reason in reasons(night)), sep="\n")
    print("nothing is blessed yet" if tonight.blessed is None else f"blessed: {tonight.blessed.words}")
