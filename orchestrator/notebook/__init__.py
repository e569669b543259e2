"""mergeyard in a notebook: plan, merge and evaluate jobs, and look at runs, as functions that return objects.

Imported as `mergeyard`. Errors are the exceptions of `jobs.errors`, with the line that a command would print. Nothing
heavy is imported before a function needs it.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import BadInput, MergeyardError, writing
from jobs.job import Job, WorkerSpec, load_job, load_merge_document
from jobs.job import read_job as job_at
from jobs.yaml_nodes import node_of, yaml_text
from orchestrator.commands.inputs import read_text

if TYPE_CHECKING:
    from orchestrator.merging.driver import RunResult
    from orchestrator.report.leaderboard import Line
    from orchestrator.report.run import Report
    from orchestrator.report.sections import Section

__all__ = ["Figure", "Leaderboard", "MergeyardError", "Run", "evaluate", "merge", "open_run", "plan"]

Document = Mapping[str, Any] | str | Path
"""A job or a mergekit document: its contents as a mapping, its YAML text (of two lines or more), or its path."""

STYLE = "--paper: #ffffff; --rule: #b8c0c8; color: #1b1f24; background: #ffffff"
"""The colours of charts outside the page: a notebook does not say whether it is dark."""


@dataclass(frozen=True)
class Leaderboard:
    """The models of a run, best point first; a table in a notebook."""

    lines: tuple[Line, ...]

    def table(self) -> Any:
        """A pyarrow table with a row per model: its name, kind, score, half of its 95 % interval, and each length."""
        import pyarrow as pa

        lengths = sorted({length for line in self.lines for length in line.by_length})
        return pa.table(
            {
                "name": [line.name for line in self.lines],
                "kind": [line.kind for line in self.lines],
                "score": [line.score for line in self.lines],
                "half_width": [line.half_width for line in self.lines],
                **{str(length): [line.by_length.get(length) for line in self.lines] for length in lengths},
                "note": [line.note for line in self.lines],
            }
        )

    def to_pandas(self) -> Any:
        """The same as a pandas data frame; `BadInput` without pandas."""
        return _pandas(self.table())

    def html(self) -> str:
        """The table as HTML."""
        from markupsafe import escape

        table = self.table()
        head = "".join(f"<th>{escape(name)}</th>" for name in table.column_names)
        rows = "".join(
            f"<tr>{''.join(f'<td>{escape(_cell(value))}</td>' for value in row.values())}</tr>"
            for row in table.to_pylist()
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"

    def _repr_html_(self) -> str:
        return self.html()


@dataclass(frozen=True)
class Figure:
    """A section of the report's page: its charts, shown in a notebook, and its words."""

    section: Section

    def svgs(self) -> list[str]:
        """Each chart as SVG text."""
        return [str(chart) for choice in self.section.choices for chart in choice.charts]

    def _repr_html_(self) -> str:
        from markupsafe import escape

        charts = "".join(
            f"<h4>{escape(choice.name)}</h4>{''.join(map(str, choice.charts))}" for choice in self.section.choices
        )
        legend = "".join(map(str, self.section.legend))
        heading = f"<h3>{escape(self.section.title)}</h3><p>{escape(self.section.words)}</p>"
        return f'<div style="{STYLE}">{heading}{legend}{charts}</div>'


@dataclass(frozen=True)
class Run:
    """A run with scores, read once when it was opened."""

    report: Report

    @property
    def url(self) -> str:
        """Where the run lies."""
        return self.report.run.url

    @property
    def sentence(self) -> str:
        """The recommendation; empty where there is none."""
        return "" if self.report.recommendation is None else self.report.recommendation.sentence

    @property
    def verdict(self) -> Mapping[str, Any] | None:
        """The verdict of the gate, None without one."""
        return self.report.run.gate

    @property
    def leaderboard(self) -> Leaderboard:
        """The models, best point first."""
        return Leaderboard(tuple(self.report.lines))

    @cached_property
    def figures(self) -> dict[str, Figure]:
        """The figures of the report's page by their id, such as `grid-length` or `importance`."""
        from orchestrator.report.page import sections

        return {section.id: Figure(section) for section in sections(self.report)}

    def answers(self) -> Any:
        """A pyarrow table with a row per point and item: the columns of `report/results.parquet`."""
        from workers.evaluating.scores import score_table

        return score_table(self.report.run.result.answers)

    def to_pandas(self) -> Any:
        """The answers as a pandas data frame; `BadInput` without pandas."""
        return _pandas(self.answers())

    def _repr_html_(self) -> str:
        from markupsafe import escape

        return f"<p><b>{escape(self.sentence)}</b></p>{self.leaderboard.html()}"


def open_run(url: str | Path) -> Run:
    """The run at a folder or URL, such as `runs/demo` or `s3://bucket/runs/demo`; `BadInput` if it has no scores."""
    from orchestrator.report.run import read_run, report_on
    from workers.storage import open_store

    return Run(report_on(read_run(open_store(str(url)).url)))


def plan(job: Document, *, output: str | None = None) -> dict[str, Any]:
    """The facts that `mergeyard plan --json` prints; `output` replaces the job's."""
    from orchestrator.commands.plan import planned

    return planned(*_job(job, output))


def evaluate(job: Document, *, output: str | None = None, in_process: bool = False, address: str | None = None) -> Run:
    """Scores the points of a job without writing them, as `mergeyard evaluate`, and opens the run.

    The work is done on Ray, here or at `address`, or in this process. An evaluation that was interrupted goes on.
    """
    from orchestrator.commands.workplace import Workplace, asked_of, evaluate_points, tell_evaluation
    from orchestrator.planning.plan import make_plan
    from orchestrator.watching import Watcher

    read, folder = _job(job, output)
    if read.evaluate is None:
        raise BadInput(f"{read.source}: nothing to evaluate; add `evaluate:`")
    made = make_plan(read, relative_to=folder)
    asked = asked_of(made, folder)
    assert asked is not None
    options = argparse.Namespace(in_process=in_process, address=address)
    with Workplace(read, options) as workplace, Watcher(visible=False, tells=False) as watcher:
        made, evaluated, verdict = evaluate_points(made, asked, workplace, watcher)
    tell_evaluation(made, evaluated, verdict, quiet=True)
    return open_run(made.run_url)


def merge(config: Document, out: str | Path) -> RunResult:
    """Merges a mergekit document into the folder or URL `out`, as `mergeyard merge`; relative paths are from here."""
    from orchestrator.cluster.in_process import InProcessPool
    from orchestrator.merging.driver import drive
    from orchestrator.planning.plan import make_plan
    from orchestrator.records.ledger import Ledger
    from orchestrator.watching import Watcher

    text, name, _ = _text(config)
    job = load_merge_document(text, name, str(out))
    made = make_plan(
        replace(job, workers=replace(WorkerSpec(), cpus=float(os.cpu_count() or 1))), relative_to=Path.cwd(), flat=True
    )
    made.check_room()
    with Watcher(visible=False, tells=False) as watcher:
        result = drive(made, InProcessPool(device="cpu"), watcher)
    with writing():
        Ledger(made.run_url, made.places).forget()
    result.check_finite()
    return result


def _job(document: Document, output: str | None) -> tuple[Job, Path]:
    """The job, and the folder that its relative parents count from: the file's, or the current one."""
    if isinstance(document, Mapping):
        return job_at(node_of(document, "job"), output), Path.cwd()
    text, name, folder = _text(document)
    return load_job(text, name, output), folder


def _text(document: Document) -> tuple[str, str, Path]:
    """The YAML text, its name in errors, and its folder."""
    if isinstance(document, Mapping):
        return yaml_text(document), "document", Path.cwd()
    if isinstance(document, str) and "\n" in document:
        return document, "document", Path.cwd()
    return read_text(str(document)), str(document), Path(document).resolve().parent


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)


def _pandas(table: Any) -> Any:
    try:
        return table.to_pandas()
    except ModuleNotFoundError:
        raise BadInput("pandas: not installed; run `pip install pandas`, or use the pyarrow table") from None
