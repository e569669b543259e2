"""A run's figures for an MLflow server or a folder of `mlflow ui`: an MLflow run a point, under one of the whole.

Parameters are the point's axes; metrics its score, its interval and its effective length, and the score at each length
as a step. A tag names the benchmarks of the score, and their weights. The page is an artifact. Logged again, the same
MLflow runs are renewed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.errors import BadInput, writing
from jobs.expressions import format_number
from orchestrator.report.leaderboard import Line
from orchestrator.report.page import page
from orchestrator.report.run import Report
from orchestrator.words import benchmark_words

MOST_PARAMETER_CHARACTERS = 500
SCORE_OF = "mergeyard.score_of"
"""The tag with the benchmarks of the score, and their weights."""


def log_run(report: Report, uri: str) -> None:
    """Logs everything; `BadInput` where MLflow is not installed, or refuses the URI or cannot be reached."""
    client = _client(uri)
    with _refusals(uri):
        experiment = client.get_experiment_by_name(report.run.name)
    with writing(), _refusals(uri):
        _log(report, client, experiment)


@contextmanager
def _refusals(uri: str) -> Generator[None]:
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise BadInput(f"--mlflow {uri}: {str(error).splitlines()[0]}") from None


def _client(uri: str) -> Any:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # the user asked for no telemetry
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # the user may name a folder
    os.environ.setdefault(
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2"
    )  # seven would keep a typing mistake waiting for minutes
    try:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
    except ImportError:
        raise BadInput("--mlflow: MLflow is not installed; pip install 'mergeyard[mlflow]'") from None
    try:
        return MlflowClient(tracking_uri=uri if "://" in uri else Path(uri).resolve().as_uri())
    except MlflowException as error:
        raise BadInput(f"--mlflow {uri}: {str(error).splitlines()[0]}") from None


def _log(report: Report, client: Any, experiment: Any) -> None:
    number = client.create_experiment(report.run.name) if experiment is None else experiment.experiment_id
    top = _run(client, number, report.run.url, "", report.run.name)
    if report.recommendation is not None:
        client.set_tag(top, "mlflow.note.content", report.recommendation.sentence)
    client.set_tag(top, SCORE_OF, benchmark_words(report.run.result.weights))
    client.log_text(top, page(report), "index.html")
    client.set_terminated(top)
    for line in report.lines:
        _log_point(report, client, number, top, line)


def _log_point(report: Report, client: Any, experiment: str, top: str, line: Line) -> None:
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    run = _run(client, experiment, report.run.url, line.name, line.name, {"mlflow.parentRunId": top})
    values = {"score": line.score, "half_width": line.half_width, **line.beside}
    values |= {f"guard {guarded.guard}": guarded.score for guarded in line.guards}
    if line.effective is not None:
        values["effective_length"] = float(line.effective.length)
    metrics = [Metric(_key(name), value, now, 0) for name, value in values.items()]
    metrics += [Metric("score_by_length", score, now, length) for length, score in line.by_length.items()]
    parameters = [
        Param(name, value[:MOST_PARAMETER_CHARACTERS]) for name, value in _bindings(report, line.name).items()
    ]
    client.log_batch(run, metrics=metrics, params=parameters)
    client.set_tag(run, SCORE_OF, benchmark_words(report.run.result.weights))
    client.set_terminated(run)


def _run(client: Any, experiment: str, url: str, point: str, name: str, more: dict[str, str] | None = None) -> str:
    """The MLflow run of this point: the one it was logged to before, or a new one."""
    tags = {"mergeyard.run": url, "mergeyard.point": point}
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items() if "'" not in value)
    found = client.search_runs([experiment], wanted, max_results=1)
    if found:
        return found[0].info.run_id
    return client.create_run(experiment, tags={**tags, **(more or {})}, run_name=name).info.run_id


def _bindings(report: Report, name: str) -> dict[str, str]:
    points = () if report.run.job is None else report.run.job.points
    return {
        axis: value if isinstance(value, str) else format_number(value)
        for point in points
        if point.name == name
        for axis, value in point.bindings.items()
    }


def _key(name: str) -> str:
    """MLflow allows letters, digits and _ - . / : and spaces in names of metrics."""
    return "".join(letter if letter.isalnum() or letter in "_-./ " else "_" for letter in name)
