"""The state of a run or of a folder of runs: first as plain facts (for `--json`), then as lines for a terminal."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Mapping
from typing import Any

from jobs.errors import BadInput, MergeyardError, ObjectMissing
from jobs.job import Job, load_job
from orchestrator.evaluating.batches import asked_points
from orchestrator.evaluating.results import EvaluationResult, read_results, read_verdict
from orchestrator.records.lease import driver_of
from orchestrator.records.places import Places
from orchestrator.words import count, counted, duration, print_rows, shortlist, size
from workers.storage import Store, open_store
from workers.storage.records import read_record

BLOCK = re.compile(r"-(\d+)-(\d+)\.parquet$")
"""The end of the name of a block of scores: its first item, and the one after its last."""


def runs_below(url: str) -> list[str]:
    """The URLs of the runs in a folder: that of the run itself if `url` is one. `ObjectMissing` if there is none."""
    store = open_store(url)
    if next((info for info in store.list("plan.json") if info.key == "plan.json"), None):
        return [store.url]
    folders = sorted(info.key.removesuffix("/plan.json") for info in store.list() if info.key.endswith("/plan.json"))
    if not folders:
        raise ObjectMissing(f"{store.url}: no run there; `mergeyard run` starts one")
    return [f"{store.url}/{folder}" for folder in folders]


def status_facts(run_url: str) -> dict[str, Any]:
    """The progress of a run, from the files under its prefix.

    `waiting` are the points that are still to be written: neither those that `keep:` leaves out, nor pruned ones, nor
    those of a night that did not pass.
    """
    store, places = open_store(run_url), Places()
    plan = read_record(store, places.record("plan.json"))
    sizes = {info.key: info.size for info in store.list("points/")}
    done = {key.split("/")[1] for key in sizes if key.endswith("/manifest.json")}
    points = [entry["name"] for entry in plan["points"]] or asked_points(store)
    pruned = set(_pruned(store)) - done
    job, result = _job(store), _result(run_url)
    wanted = sorted(done, key=points.index) if _is_concluded_night(store) else _wanted(points, job, result)
    driver = driver_of(store, places.record("lease.json"))
    return {
        "run": run_url,
        "points": len(points),
        "points_done": sum(1 for name in points if name in done),
        "points_wanted": len(wanted),
        "keep": None if job is None else job.keep.kind,
        "waiting": [name for name in wanted if name not in done and name not in pruned],
        "pruned": [name for name in points if name in pruned],
        "shards_done": sum(1 for _ in store.list("receipts/")),
        "bytes": sum(sizes.values()),
        "evaluation": _evaluation(store, job, result),
        "driver": driver,
    }


def _pruned(store: Store) -> list[str]:
    try:
        return list(read_record(store, Places().record("pruned.json"))["points"])
    except ObjectMissing:
        return []


def _is_concluded_night(store: Store) -> bool:
    """Whether the run is one of `mergeyard nightly`, which writes nothing more after its verdict."""
    book, _, night = store.url.rpartition("/nights/")
    number = night.partition("-")[0]
    if not book or not number.isdecimal():
        return False
    told = f"concluded/{int(number):06d}"
    return any(info.key == told for info in open_store(book).list(told))


def _job(store: Store) -> Job | None:
    """The run's job; None if another version of mergeyard wrote it."""
    try:
        return load_job(bytes(store.read("job.yaml")).decode(), "job.yaml")
    except (ObjectMissing, BadInput, UnicodeDecodeError):
        return None


def _wanted(points: list[str], job: Job | None, result: EvaluationResult | None) -> list[str]:
    """The points that the job keeps, as far as that is decided."""
    if job is None or job.keep.kind == "all":
        return points
    if job.keep.kind == "best" and result is not None and result.finished:
        return [standing.point for standing in result.candidates[: job.keep.count]]
    return []


def _evaluation(store: Store, job: Job | None, result: EvaluationResult | None) -> dict[str, Any] | None:
    """How far the evaluation is; None for a job without one."""
    if job is None or job.evaluate is None:
        return None
    gate = None if job.gate is None else (read_verdict(store) or {"outcome": "open"})["outcome"]
    blocks = [match for info in store.list("scores/") if (match := BLOCK.search(info.key))]
    return {
        "finished": result is not None and result.finished,
        "items_answered": sum(int(match[2]) - int(match[1]) for match in blocks),
        "gate": gate,
    }


def is_complete(facts: Mapping[str, Any]) -> bool:
    """Whether all that the job makes is there."""
    evaluation = facts["evaluation"]
    evaluated = evaluation is None or (evaluation["finished"] and evaluation["gate"] != "open")
    return evaluated and not facts["waiting"]


def stage_line(facts: Mapping[str, Any]) -> str | None:
    """The present stage of a running driver with its work and the time left; None without one."""
    driver = facts["driver"]
    if driver is None or driver["state"] != "running" or "stage" not in driver["progress"]:
        return None
    progress = driver["progress"]
    done, total, seconds = progress["done"], progress["total"], progress["seconds"]
    if not total:
        return progress["stage"]
    written, unit = (size, "") if progress["unit"] == "bytes" else (count, " tokens")
    left = f", {duration(seconds * (total - done) / done)} left" if 0 < done < total else ""
    return f"{progress['stage']}: {written(done)} of {written(total)}{unit}{left}"


def run_state(run_url: str) -> str:
    """The state of a run in one line, also if there is none yet or the bucket cannot be read from here."""
    try:
        return _short(status_facts(run_url))
    except ObjectMissing:
        return "not begun"
    except MergeyardError as error:
        return f"not to be seen from here ({error})"


def _result(run_url: str) -> EvaluationResult | None:
    """The evaluation so far, without its rows; None before the first answers."""
    try:
        return read_results(run_url, points=())
    except BadInput:
        return None


def print_status(facts: Mapping[str, Any]) -> None:
    """The state of a run as a person reads it."""
    rows = [
        ("run", facts["run"]),
        ("points", _points(facts)),
        ("shards", f"{facts['shards_done']} done, {size(facts['bytes'])}"),
    ]
    if facts["evaluation"] is not None:
        rows.append(("evaluation", _evaluation_words(facts["evaluation"])))
    if (stage := stage_line(facts)) is not None:
        rows.append(("now", stage))
    rows.append(("driver", _driver_words(facts)))
    progress = (facts["driver"] or {}).get("progress", {})
    if progress.get("failed"):
        rows.append(("tried again", counted(progress["failed"], "task")))
        rows += [("", failure) for failure in progress["failures"]]
    if facts["waiting"]:
        rows.append(("waiting", shortlist(facts["waiting"])))
    _print_wrapped(rows)


def print_runs(runs: list[dict[str, Any]]) -> None:
    """A line a run."""
    _print_wrapped([(facts["run"].rsplit("/", 1)[-1], _short(facts)) for facts in runs])


def _print_wrapped(rows: list[tuple[str, str]]) -> None:
    room = max(shutil.get_terminal_size().columns - max(len(name) for name, _ in rows) - 4, 20)
    wrapped = ((name, textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)) for name, text in rows)
    print_rows([(name if number == 0 else "", line) for name, lines in wrapped for number, line in enumerate(lines)])


def _short(facts: Mapping[str, Any]) -> str:
    """The state of a run in one line."""
    state = stage_line(facts) or ("complete" if is_complete(facts) else _driver_words(facts))
    return f"{_points(facts)}; {state}"


def _points(facts: Mapping[str, Any]) -> str:
    if facts["keep"] == "none":
        return f"{facts['points']}, none is written (keep: none)"
    if facts["keep"] == "all" and not facts["points_wanted"]:
        return f"{facts['points']}, none is written (the night did not pass)"
    kept = f"{facts['points_done']} of {facts['points_wanted']} complete"
    if facts["keep"] == "best":
        undecided = "the best are not known yet" if not facts["points_wanted"] else f"the best of {facts['points']}"
        kept = f"{facts['points']}, {undecided}" if not facts["points_wanted"] else f"{kept}, {undecided}"
    return f"{kept}, {len(facts['pruned'])} pruned" if facts["pruned"] else kept


def _evaluation_words(evaluation: Mapping[str, Any]) -> str:
    state = "finished" if evaluation["finished"] else "not finished"
    gate = "" if evaluation["gate"] is None else f", gate: {evaluation['gate']}"
    return f"{state}, {evaluation['items_answered']:,} items answered{gate}"


def _driver_words(facts: Mapping[str, Any]) -> str:
    driver = facts["driver"]
    if driver is None:
        return "none" if is_complete(facts) else "none; the same command continues"
    who = f"process {driver['process']} on {driver['host']}"
    if driver["state"] == "running":
        return who
    ago = "" if driver["heard"] is None else f", last heard of {duration(driver['heard'])} ago"
    return f"{driver['state']}: {who}{ago}; the same command continues"
