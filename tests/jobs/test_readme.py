"""The reference of the job file is true: every YAML block loads, every key is there with its default."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.engine import ENGINE_OPTIONS
from jobs.errors import BadInput
from jobs.evaluate import Evaluation, LmEvalSpec, NeedleSpec, PerplexitySpec, RaceSpec, RulerSpec
from jobs.job import KEYS, GateSpec, WorkerSpec, load_job, load_merge_document
from jobs.recipe import KEYS as RECIPE_KEYS

README = (Path(__file__).parents[2] / "jobs" / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```yaml ?(\w*)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
ROWS: dict[str, str] = dict(re.findall(r"^\| `([\w.]+)` \| [^|]* \| ([^|]*) \|", README, re.MULTILINE))


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
    return {"name": "fragment", "parents": parents, "recipe": recipe, "output": "runs"} | fragment


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


def test_every_key_is_in_a_table() -> None:
    assert set(KEYS) <= ROWS.keys()
    assert set(RECIPE_KEYS) <= ROWS.keys()
    assert {field.name for field in dataclasses.fields(GateSpec)} - {"place"} <= ROWS.keys()
    for section in dataclasses.fields(Evaluation):
        if section.name not in ("race", "place"):
            assert any(row.startswith(f"{section.name}.") for row in ROWS)


@pytest.mark.parametrize(
    ("section", "spec"),
    [
        ("ruler.", RulerSpec(lengths=(64,))),
        ("needle.", NeedleSpec(lengths=(64,))),
        ("perplexity.", PerplexitySpec(lengths=(64,))),
        ("lm_eval.", LmEvalSpec(tasks=("x",))),
        ("race.", RaceSpec()),
        ("workers.", WorkerSpec()),
        ("", GateSpec(baseline="x")),
    ],
)
def test_every_default_is_the_one_in_the_code(section: str, spec: Any) -> None:
    for field in dataclasses.fields(spec):
        default = getattr(spec, field.name)
        written = ROWS.get(f"{section}{field.name.removesuffix('_bytes')}")
        if field.name == "place":
            continue
        assert written is not None, f"{section}{field.name} is in no table"
        if isinstance(default, bool):
            assert yaml.safe_load(written.strip("`")) is default
        elif isinstance(default, int | float) and field.name != "memory_bytes":
            assert float(written.strip("`")) == default
    assert ROWS["workers.memory"] == "`4GB`"


def test_the_options_of_the_engines_are_told_as_they_are() -> None:
    table = README.split("### Options of an engine")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.*) \|$", table, re.MULTILINE)
    assert {engine: tuple(re.findall(r"`(\w+)`", options)) for engine, options in rows} == ENGINE_OPTIONS


def test_the_refusal_shown_is_the_one_given() -> None:
    shown = re.search(r"^```\n(job\.yaml:.*)\n```$", README, re.MULTILINE)
    with pytest.raises(BadInput) as caught:
        load_job(BLOCKS[0][1] + "evalute: {}\n", "job.yaml")
    assert shown is not None and shown[1] == str(caught.value)
