"""The reference of the job file is true: every YAML block loads, every key is there with its type and default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
import yaml

from jobs.engine import ENGINE_OPTIONS, EngineSpec
from jobs.errors import BadInput
from jobs.evaluate import SPECS, Length, RaceSpec
from jobs.job import GateSpec, Job, WorkerSpec, load_job, load_merge_document
from jobs.recipe import Recipe
from jobs.search import SearchSpec
from jobs.specs import AtLeast, Between, Bytes, Field, Gpus, NotNegative, fields_of
from jobs.yaml_nodes import load_document

README = (Path(__file__).parents[2] / "jobs" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml ?(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
IN_YAML = {"memory_bytes": "memory", "shard_bytes": "shard_size"}
NOT_IN_YAML = ("place", "places", "foreign", "ignored")


def rows() -> dict[str, dict[str, tuple[str, str]]]:
    """Section of the reference → key → type and default."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for section in README.split("\n### ")[1:]:
        listed = re.findall(r"^\| `(\w+)` \| ([^|]+) \| ([^|]+) \| [^|]+ \|$", section, re.MULTILINE)
        found[section.splitlines()[0].strip("`")] = {key: (kind, default) for key, kind, default in listed}
    return found


def tables() -> dict[str, dict[str, str]]:
    """Section of the reference → key → default, without the backticks."""
    return {
        section: {key: default.strip("`") for key, (_, default) in keys.items()} for section, keys in rows().items()
    }


def completed(fragment: dict[str, Any]) -> dict[str, Any]:
    """A fragment with what a job needs around it: two parents, and a recipe that uses every axis of its grid."""
    grid = fragment.get("grid", {})
    axes = [axis for axis in grid if axis not in ("simplex", "points")]
    axes += grid.get("simplex", {}).get("axes", [])
    axes += [axis for axis in grid.get("points", [{}])[0] if axis != "name"]
    parents = {"cos": "s3://models/cos", "fmt": "s3://models/fmt"}
    recipe = {
        "merge_method": "linear",
        "models": [{"model": name} for name in parents],
        "parameters": {axis: f"${{{axis}}}" for axis in axes},
    }
    job = {"name": "fragment", "parents": parents, "recipe": recipe, "output": "runs"} | fragment
    if "search" in job:
        over = job["search"]["over"]
        subsets = {axis: axis_of["subset"] for axis, axis_of in over.items() if "subset" in axis_of}
        recipe["parameters"] = {axis: f"${{{axis}}}" for axis in over if axis not in subsets}
        for axis, models in subsets.items():
            job["parents"] = {name: f"s3://models/{name}" for name in models}
            recipe["models"] = [{"model": f"${{{axis}}}"}]
        job["evaluate"] = {"ruler": {"lengths": [4096]}}
    return job


def type_of(field: Field) -> str | None:
    """The type of a key as the tables write it; None for text and mappings, whose meaning the page adds."""
    match field.rule:
        case AtLeast(minimum, None):
            return f"whole number ≥ {minimum}"
        case Between(below):
            return f"number between 0 and {below:g}"
        case Gpus():
            return "whole number ≥ 0, or a fraction"
        case NotNegative():
            return "number ≥ 0"
        case Bytes():
            return "size"
        case None if field.kind is bool:
            return "boolean"
        case None if field.kind == tuple[Length, ...]:
            return "list of whole numbers"
        case None if get_origin(field.kind) is Literal:
            *others, last = [f"`{choice}`" for choice in get_args(field.kind)]
            return f"{', '.join(others)} or {last}"
        case _:
            return None


@pytest.mark.parametrize(("mark", "block"), BLOCKS)
def test_every_block_loads(mark: str, block: str) -> None:
    if mark == "mergekit":
        assert load_merge_document(block, "README.md", "out").points
        return
    assert mark in ("", "fragment")
    text = yaml.safe_dump(completed(yaml.safe_load(block)), sort_keys=False) if mark else block
    assert load_job(text, "README.md").points


def test_there_are_blocks_of_every_kind() -> None:
    assert {mark for mark, _ in BLOCKS} == {"", "fragment", "mergekit"}


def test_the_top_level_has_every_key() -> None:
    assert tuple(tables()["Top level"]) == tuple(field.name for field in fields_of(Job))


@pytest.mark.parametrize(
    ("section", "spec"),
    [
        ("recipe", Recipe),
        *((f"evaluate.{key}", spec) for key, spec in SPECS.items()),
        ("evaluate.race", RaceSpec),
        ("gate", GateSpec),
        ("engine", EngineSpec),
        ("workers", WorkerSpec),
    ],
)
def test_a_table_has_the_keys_of_its_section_with_the_defaults_of_the_code(section: str, spec: Any) -> None:
    assert {key: meant(key, default) for key, default in tables()[section].items()} == in_code(spec)


SECTIONS = {
    **{f"evaluate.{key}": spec for key, spec in SPECS.items()},
    "evaluate.race": RaceSpec,
    "search": SearchSpec,
    "gate": GateSpec,
    "engine": EngineSpec,
    "workers": WorkerSpec,
    "Top level": Job,
}


@pytest.mark.parametrize(
    ("section", "field"),
    [(section, field) for section, spec in SECTIONS.items() for field in fields_of(spec) if type_of(field)],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_table_has_the_types_and_bounds_of_the_code(section: str, field: Field) -> None:
    assert rows()[section][field.name][0] == type_of(field)


def test_most_types_follow_from_the_code() -> None:
    derived = [field for spec in SECTIONS.values() for field in fields_of(spec) if type_of(field)]
    assert len(derived) >= 25


def test_every_benchmark_is_listed_and_none_is_asked_by_default() -> None:
    assert tables()["evaluate"] == dict.fromkeys((*SPECS, "race", "weights"), "None")


def test_the_defaults_of_the_top_level_are_those_of_the_code() -> None:
    documented = {key: meant(key, default) for key, default in tables()["Top level"].items()}
    of_job = {key: default for key, default in in_code(Job).items() if key in documented}
    sections = {"keep": "all", "engine": EngineSpec().name, "workers": "{}"}
    assert documented == {**of_job, **sections, "recipe": "required", "grid": "None", "point": "None"}


def in_code(spec: Any) -> dict[str, str]:
    """Key → default of a section's class, as the tables write it."""
    return {
        IN_YAML.get(entry.name, entry.name): "required" if made is dataclasses.MISSING else str(made)
        for entry in dataclasses.fields(spec)
        if entry.name not in NOT_IN_YAML
        for made in [entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()]
    }


def meant(key: str, default: str) -> str:
    """A default of a table; a size in bytes."""
    return str(load_document(default, key).size_bytes()) if key in IN_YAML.values() else default


def test_the_options_of_the_engines_are_listed_as_they_are() -> None:
    listed = re.findall(
        r"^- `(\w+)`: ((?:.+\n)(?:  .+\n)*)", README.split("#### Options of an engine")[1], re.MULTILINE
    )
    assert {engine: tuple(re.findall(r"`(\w+)`", options)) for engine, options in listed} == ENGINE_OPTIONS


def test_the_refusal_shown_is_the_one_given() -> None:
    shown = re.search(r"^```\n(job\.yaml:.*)\n```$", README, re.MULTILINE)
    with pytest.raises(BadInput) as caught:
        load_job(BLOCKS[0][1] + "evalute: {}\n", "job.yaml")
    assert shown is not None and shown[1] == str(caught.value)
