"""`mergeyard report RUN`."""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TextIO

from jobs.errors import BadInput, writing
from jobs.evaluation_tasks import ScoreRow
from orchestrator.commands.inputs import check_file, print_json, run_url


def report(options: argparse.Namespace) -> int:
    """`mergeyard report RUN`: the leaderboard and the sentence on it; writes the page into the run."""
    from orchestrator.report.page import write_page
    from orchestrator.report.run import read_run, report_on
    from orchestrator.report.terminal.leaderboard import print_leaderboard, print_sentence

    check_file("--csv", None if options.csv == "-" else options.csv)
    run = read_run(run_url(options.run))
    if options.csv == "-":
        _write_csv(run.result.rows, "-")
        return 0
    found = report_on(run)
    if options.mlflow:  # first: a server that refuses does so before anything is written
        from orchestrator.report.mlflow_log import log_run

        log_run(found, options.mlflow)
    if options.json:
        print_json(found.document())
    else:
        print_leaderboard(found.lines, run.result)
        if found.recommendation is not None:
            print_sentence(found.recommendation.sentence, found.recommendation.why)
        if found.searched:
            print_sentence(" ".join(found.searched))
    page = write_page(found)  # last: a run on a read-only disk can be read
    if options.csv:
        with writing():
            _write_csv(run.result.rows, options.csv)
    if not options.json:
        print(page)
    return 0


def _write_csv(rows: Sequence[ScoreRow], path: str) -> None:
    """A row an item, the columns of results.parquet; `-` is standard output."""
    if path == "-":
        _write_rows(rows, sys.stdout)
        return
    try:
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            _write_rows(rows, file)
    except OSError as error:
        raise BadInput(f"--csv {path}: cannot be written ({error.strerror})") from None


def _write_rows(rows: Sequence[ScoreRow], file: TextIO) -> None:
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([field.name for field in fields(ScoreRow)])
    writer.writerows([getattr(row, field.name) for field in fields(ScoreRow)] for row in rows)
