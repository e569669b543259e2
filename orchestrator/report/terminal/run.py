"""Plans and results of a run: first as plain facts (for `--json`), then as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orchestrator.merging.driver import RunResult
from orchestrator.planning.devices import BUS_RATE, READ_RATE, WRITE_RATE, merging
from orchestrator.planning.plan import Plan
from orchestrator.records.ledger import Ledger
from orchestrator.words import count, counted, duration, print_rows, short_length, shortlist, size
from workers.digests import short
from workers.merging.shard import FIXED_BYTES

MOST_LINES = 12
"""Points that a terminal table names one by one."""


def plan_facts(plan: Plan) -> dict[str, Any]:
    """Everything `mergeyard plan` knows; bytes, seconds and counts as plain numbers."""
    ledger = Ledger(plan.run_url, plan.places)
    found = ledger.trusted(plan.units)
    workers = plan.job.workers.count or 1
    tasks = plan.tasks(found.keys(), workers)
    read, written = sum(task.bytes_read for task in tasks), sum(task.bytes_written for task in tasks)
    spec = plan.job.workers
    writes = plan.job.keep.kind != "none"
    device = merging(tasks, spec) if spec.gpus > 0 and writes else None
    return {
        "job": plan.job.name,
        "run": plan.run_url,
        "parents": {
            name: {
                "url": checkpoint.url,
                "bytes": sum(file.size for file in checkpoint.files),
                "tensors": len(checkpoint.tensors),
            }
            for name, checkpoint in plan.parents.items()
        },
        "trajectories": {
            name: [parent for parent in checkpoints if parent in plan.parents]
            for name, checkpoints in plan.job.trajectories.items()
        },
        "points": [planned.name for planned in plan.points],
        "remarks": list(plan.remarks),
        "same_merge": {planned.name: planned.same_as for planned in plan.points if planned.same_as is not None},
        "shards_a_point": max(len(planned.layout.shards) for planned in plan.merges),
        "units": len(plan.units),
        "units_done": len(found),
        "tasks": len(tasks),
        "bytes_to_read": read,
        "bytes_to_write": written,
        "memory_a_worker": plan.job.workers.memory_bytes,
        "buffers_a_worker": plan.job.workers.memory_bytes - FIXED_BYTES,
        "seconds_with_one_worker": round(max(read / READ_RATE, written / WRITE_RATE), 1),
        "device": None
        if device is None
        else {"gpu_is_faster": device.gpu_is_faster, "cpus": max(1, int(spec.cpus)), "bytes_a_second": device.rate},
    }


def print_plan(facts: Mapping[str, Any]) -> None:
    """The plan as a person reads it; `evaluation` as `forecast.evaluation_facts` has it, if there is one."""
    rows = [
        ("run", facts["run"]),
        *_parent_rows(facts["parents"], facts["trajectories"]),
        (
            "kinds" if (facts.get("evaluation") or {}).get("search") else "points",
            f"{len(facts['points'])}: {shortlist(facts['points'])}",
        ),
        ("shards", f"{facts['shards_a_point']} a point"),
        ("done already", f"{facts['units_done']} of {facts['units']} shards"),
        ("tasks", str(facts["tasks"])),
        ("to read", size(facts["bytes_to_read"])),
        ("to write", size(facts["bytes_to_write"])),
        ("memory", f"{size(facts['memory_a_worker'])} a worker"),
        (
            "time",
            f"about {duration(facts['seconds_with_one_worker'])} with one worker that reads"
            f" {READ_RATE / 1e9:g} GB/s and writes {WRITE_RATE / 1e9:g} GB/s",
        ),
    ]
    if facts["device"] is not None:
        rows.append(("device", _device(facts["device"])))
    for name, same_as in list(facts["same_merge"].items())[:MOST_LINES]:
        rows.append(("same merge", f"{name} is {same_as}; merged once"))
    rows += [("note", remark) for remark in facts["remarks"][:MOST_LINES]]
    if facts.get("evaluation") is not None:
        rows += _evaluation_rows(facts["evaluation"])
    print(f"{facts['job']}\n")
    print_rows(rows)


def _device(device: Mapping[str, Any]) -> str:
    """The device that merges written points faster, and the reason."""
    cpus = f"{device['cpus']} CPU{'s' if device['cpus'] > 1 else ''}"
    verb = "merge" if device["cpus"] > 1 else "merges"
    merge = f"{cpus} {verb} {device['bytes_a_second'] / 1e9:.2g} GB/s of parents"
    storage = f"storage reads {READ_RATE / 1e9:g} GB/s and writes {WRITE_RATE / 1e9:g} GB/s"
    if device["gpu_is_faster"]:
        return f"a GPU merges written points faster: {merge}, {storage}, the bus carries {BUS_RATE / 1e9:g} GB/s"
    return f"CPUs merge written points as fast as a GPU: {merge}, {storage}"


def _parent_rows(
    parents: Mapping[str, Mapping[str, Any]], trajectories: Mapping[str, Sequence[str]]
) -> list[tuple[str, str]]:
    """One row a parent, and one for all checkpoints of a trajectory."""
    checkpoints = {parent for of in trajectories.values() for parent in of}
    rows = [
        (f"parent {name}", f"{parent['url']}  ({size(parent['bytes'])}, {parent['tensors']} tensors)")
        for name, parent in parents.items()
        if name not in checkpoints
    ]
    for name, of in trajectories.items():
        urls, whole = [parents[parent]["url"] for parent in of], sum(parents[parent]["bytes"] for parent in of)
        tensors = f"{size(whole)}, {parents[of[0]]['tensors']} tensors each"
        rows.append((f"parents {name}", f"{len(of)} checkpoints: {shortlist(urls)}  ({tensors})"))
    return rows


def _evaluation_rows(asked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The items of the evaluation, and the smallest difference that they can show."""
    points = f"{asked['points']} point{'s' if asked['points'] > 1 else ''}"
    beside = f" and {asked['baselines']} parents" if asked["baselines"] else ""
    if asked["search"] is not None:
        return [*_search_rows(asked["search"], asked), *_sight_rows(asked)]
    rows = [
        (
            "to ask",
            f"{points}{beside}, {asked['items_a_point']:,} items and at most"
            f" {count(asked['tokens_a_point'])} tokens each: {asked['items']:,} items, {count(asked['tokens'])} tokens",
        )
    ]
    if asked["tasks_of_unknown_size"]:
        rows.append(("and", f"{shortlist(asked['tasks_of_unknown_size'])}, as many items as they have"))
    rows += [("not asked", line) for line in not_asked(asked["too_long"])]
    for thought in asked["thinking"]:
        rows.append(("thinking", _thinking(thought)))
    if asked["samples"] > 1:
        rows.append(("samples", f"up to {asked['samples']} answers to each item, whose mean is its score"))
    if asked["thinking"] or asked["samples"] > 1:
        each, of_all = count(asked["generated_a_point"]), count(asked["generated"])
        rows.append(("to generate", f"at most {each} of these tokens each: {of_all} tokens"))
    if asked["faster_engine"]:
        name, long = asked["faster_engine"], "thoughts" if asked["thinking"] else "long answers"
        rows.append(("engine", f"{long} make decoding most of the work; `engine: {name}` decodes faster on a GPU"))
    if asked["race"] is not None:
        least = asked["race"]["least_tokens"]
        share = f"{least / asked['tokens']:.0%}" if asked["tokens"] else "all"
        rows.append(("race", f"{share} of that where all that lose leave at once ({count(least)} tokens), at most all"))
    return [*rows, *_sight_rows(asked)]


def _sight_rows(asked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What the items can show, and what the gate takes."""
    rows: list[tuple[str, str]] = []
    if asked["sees"] is not None:
        rows.append(("can show", can_show(asked["sees"])))
    if asked["guards"] is not None:
        rows.append(("guards", guards_forecast(asked["guards"])))
    if asked["gate"] is not None:
        rows.append(("gate", gate_forecast(asked["gate"])))
    return rows


def _search_rows(search: Mapping[str, Any], asked: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The space of a search, its first batch and its cost."""
    axes = [f"{name} ({values})" for name, values in search["axes"].items()]
    rungs = ", ".join(map(str, search["rungs"]))
    refused = search["refused"]
    never = refused and (
        f"{refused['points']} of {refused['of']} points that were tried, which cannot be merged, as"
        f" {refused['point']}: {refused['why']}"
    )
    rows = [
        (
            "search",
            f"{search['size']:,} points on {len(axes)} {'axis' if len(axes) == 1 else 'axes'}: {shortlist(axes)}",
        ),
        *([("never asked", never)] if never else []),
        ("first batch", f"{shortlist(search['first_batch'])}; {count(search['tokens_of_first_batch'])} tokens"),
        ("items", f"{rungs} of each task and length: more for points that may be the best"),
    ]
    if search["tokens"] is not None:
        hours = "" if search["hours"] is None else f", {search['hours']:g} hours of one worker"
        rows.append(("to ask", f"at most {asked['points']:,} points, about {count(search['tokens'])} tokens{hours}"))
    else:
        rows.append(("to ask", f"as many points as {search['hours']:g} hours of one worker allow"))
    rows.append(
        (
            "afterwards",
            f"at most {count(search['tokens_afterwards'])} tokens: the best and the parents answer all items",
        )
    )
    return rows


def _thinking(thought: Mapping[str, Any]) -> str:
    """The thought in front of the answers of one benchmark, and how it is switched off where the job did not ask it."""
    begun = ", which the prompt opens" if thought["opened"] else ""
    found = f"; its chat template shows it, `{thought['benchmark']}: {{thinking: off}}` asks without"
    return (
        f"{thought['benchmark']}: a thought of at most {thought['budget']:,} tokens before each answer{begun},"
        f" up to {thought['end']}{found if thought['found'] else ''}"
    )


def not_asked(too_long: Mapping[str, int]) -> list[str]:
    """A line for each task with questions that fit in none of its lengths."""
    return [
        f"{number:,} questions of {task}, as they are too long for the lengths" for task, number in too_long.items()
    ]


def can_show(sees: Mapping[str, Any]) -> str:
    """The smallest differences that an evaluation's items can be expected to show."""
    if all(end is None for end in sees["overall"]):
        return "no difference: the items are too few; ask more"
    lengths = ", ".join(f"{_points(shown)} at {short_length(int(length))}" for length, shown in sees["lengths"].items())
    shared = "" if sees["correlation"] is None else f", those on one haystack correlate by {sees['correlation']:g}"
    assumed = f"if {sees['discordance']:.0%} of their answers differ{shared}"
    answers = "if answers differ as those of the parents" if sees["measured"] else assumed
    among = f" as one of {sees['comparisons']} compared" if sees["comparisons"] > 1 else ""
    ends = ", more if all lengths answer alike" if len(sees["overall"]) > 1 and len(sees["lengths"]) > 1 else ""
    return (
        f"a difference of {_points(sees['overall'])} points from a parent{among}, or {lengths}"
        f" (8 times in 10, {answers}{ends})"
    )


def _points(ends: Sequence[float | None]) -> str:
    """A number of points, or a range."""
    known = [f"{end:.2g}" for end in ends if end is not None]
    if not known:
        return "none"
    return " to ".join(dict.fromkeys(known)) + (" or more" if len(known) < len(ends) else "")


def gate_forecast(gate: Mapping[str, Any]) -> str:
    """How many items the gate needs, and the remedy if it may not ask so many."""
    at_length = ""
    if gate["length_margin"] is not None:
        at_length = f", and {_items(gate['items_needed_a_length'])} a length for {gate['length_margin']:g} there"
    model = f"at the margin of {gate['margin']:g} an equal model"
    needed = f"about {_items(gate['items_needed'])} items{at_length}"
    asks = f"the gate asks {gate['items_at_first']:,} at first, {gate['items_at_most']:,} at most"
    remedy = gate["remedy"]
    if gate["output_tokens"] is not None:
        asks += f", and tokens of output that are surely at most {gate['output_tokens']:g} times the baseline's"
    if remedy is None:
        return f"{model} needs {needed} to pass; {asks}"
    verb = "cannot" if remedy["sure"] else "may not"
    margins = [key for key in ("margin", "length_margin") if gate[key] is not None]
    ways = [f"gate.budget: {remedy['budget']}"] if remedy["budget"] else []
    if all(remedy[key] for key in margins):
        ways.append(" and ".join(f"gate.{key}: {remedy[key]:g}" for key in margins))
    remedies = f"give {' or '.join(ways)}" if ways else "ask more haystacks"
    return f"{model} {verb} pass: it needs {needed}, and {asks}; {remedies}"


def guards_forecast(guards: Mapping[str, Any]) -> str:
    """The loss that a guard sees, and a warning if its margin cannot be decided."""
    needed = f"about {guards['items_needed']:,} items" if guards["items_needed"] else "more items than there are"
    assumed = f"if {guards['discordance']:.0%} of answers differ"
    if guards["items"] is None:
        return f"at the margin of {guards['margin']:g} an equal model needs {needed} each to hold ({assumed})"
    loss = f"a loss of {guards['loss']:g} points" if guards["loss"] is not None else "no loss"
    sees = f"{guards['items']:,} items each rule a point out at {loss}, 8 times in 10 ({assumed})"
    reached = guards["margin_reached"]
    if reached is not None and reached <= guards["margin"]:
        return f"{sees}; an equal model holds the margin of {guards['margin']:g}"
    ways = f"give limit: {guards['items_needed']}" if guards["items_needed"] else ""
    ways += f"{' or ' if ways else 'give '}margin: {reached:g}" if reached is not None else ""
    return f"{sees}, but the margin of {guards['margin']:g} cannot be decided for an equal model; {ways or 'ask more'}"


def _items(ends: Sequence[int | None]) -> str:
    return " to ".join(dict.fromkeys("a million times as many" if end is None else f"{end:,}" for end in ends))


def result_facts(result: RunResult) -> dict[str, Any]:
    """The facts of a finished run."""
    return {
        "run": result.url,
        "points": {name: {"weights": point.weights, "same_as": point.same_as} for name, point in result.points.items()},
        "units_merged": result.units_merged,
        "units_found": result.units_found,
        "bytes_read": result.bytes_read,
        "nonfinite": list(result.nonfinite),
        "collapses": list(result.collapses),
        "overflowed": {point: dict(tensors) for point, tensors in result.overflowed.items()},
    }


def print_result(result: RunResult) -> None:
    """The closing lines of `mergeyard run`."""
    names = list(result.points)
    width = max(len(name) for name in names[:MOST_LINES])
    for name in names[:MOST_LINES]:
        point = result.points[name]
        same = f"  same merge as {point.same_as}" if point.same_as else ""
        print(f"{name:<{width}}  {short(point.weights)}{same}")
    if len(names) > MOST_LINES:
        print(f"… and {len(names) - MOST_LINES} more")
    _warn(result)
    merged = f"{counted(result.units_merged, 'shard')} merged" + (
        f", {result.units_found} found done" if result.units_found else ""
    )
    print(f"\n{counted(len(names), 'point')} in {result.url}/points  ({merged}, {size(result.bytes_read)} read)")


def print_merge(result: RunResult) -> None:
    """The closing lines of `mergeyard merge`, one a result."""
    _warn(result)
    for name, point in result.points.items():
        folder = result.url if len(result.points) == 1 else f"{result.url}/{name}"
        print(f"{folder}: {point.tensors} tensors, weights {short(point.weights)}")


def _warn(result: RunResult) -> None:
    if result.nonfinite:
        print(f"warning: NaN or infinity in a parent's {shortlist(result.nonfinite)}")
    for line in result.collapses:
        print(f"warning: {line}")
