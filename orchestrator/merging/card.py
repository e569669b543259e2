"""The README.md of a merged point."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from jobs.grid import Point
from jobs.recipe import Recipe
from jobs.sources import plain_parameters
from orchestrator.planning.plan import Plan, PlannedPoint
from orchestrator.words import code, token_count
from workers.checkpoints.configs import context_length, rope, text_fields
from workers.checkpoints.dtypes import FLOATS

MOST_NAMES = 6
"""Parents that the first sentence names one by one."""


def model_card(
    plan: Plan,
    planned: PlannedPoint,
    recipe_text: str,
    overflowed: Mapping[str, int],
    collapses: Sequence[str],
) -> str:
    """Markdown with YAML front matter.

    `overflowed` counts by tensor the elements that the merge made NaN or infinite. `collapses` are the lines about
    merges that are not.
    """
    layout, recipe = planned.layout, planned.point.recipe
    parents = plan.sources_of(planned.point)
    methods = dict.fromkeys(stage.merge_method for stage in planned.point.recipes)
    stages, adapters = len(planned.point.recipes), planned.point.adapters()
    front: dict[str, Any] = {
        "base_model": [*dict.fromkeys(map(repository, parents.values()))],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergeyard", "mergekit", "merge", *methods],
    }
    theta, _ = rope(text_fields(layout.config))
    parameters = sum(tensor.elements for shard in layout.shards for tensor in shard.tensors if tensor.dtype in FLOATS)
    facts = {
        "Method": ", then ".join(f"`{stage.merge_method}`" for stage in planned.point.recipes),
        "Parameters": f"{_count(parameters)} ({parameters:,})",
        "Stored as": f"{layout.config.get('dtype', layout.config.get('torch_dtype'))}, {layout.bytes / 1e9:.2f} GB",
        "Architecture": ", ".join(
            map(code, layout.config.get("architectures") or [str(layout.config.get("model_type"))])
        ),
        "Context length (claimed by the config)": token_count(context_length(layout.config)),
        "RoPE": "default" if theta is None else f"theta {theta:g}",
        "Arithmetic": "float32, rounded once" if plan.job.numerics == "float32" else "as mergekit, in the dtype",
        "Seed": str(plan.job.seed),
    }
    if overflowed:
        listed = ", ".join(f"{code(name)} ({elements:,})" for name, elements in overflowed.items())
        facts["NaN or infinite, finite in every parent"] = listed
    if collapses:
        facts["No merge"] = "; ".join(line.partition(": ")[2] for line in collapses)
    if layout.left_out:
        facts["Not copied from the parents"] = ", ".join(map(code, layout.left_out))
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", recipe_text)), default=0))
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {planned.name}",
        "",
        f"A `{recipe.merge_method}` merge{f' in {stages} stages' if stages > 1 else ''} of"
        f" {_listed([name for name in planned.point.parents() if name not in adapters])}, made by mergeyard.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "## Parents",
        "",
        "| parent | where | weight |",
        "|---|---|---|",
        *(f"| {code(name)} | {code(url)} | {_weight(planned.point, name)} |" for name, url in parents.items()),
        "",
        "## Recipe",
        "",
        f"{fence}yaml",
        recipe_text.strip(),
        fence,
        "",
        "`manifest.json` holds the pinned parents and the digest of every tensor; `mergeyard verify` checks them.",
        "",
    ]
    return "\n".join(lines)


def _weight(point: Point, name: str) -> str:
    """A parent's weight, in each stage that has one."""
    if name not in point.parents() or name in point.adapters():
        return "adapter"
    of_stages = {stage: _weight_in(recipe, name) for stage, recipe in point.stages.items()}
    found = [f"{weight} in {code(stage)}" for stage, weight in of_stages.items() if weight]
    return ", ".join(filter(None, [*found, _weight_in(point.recipe, name)])) or "–"


def _weight_in(recipe: Recipe, name: str) -> str:
    weights = [
        str(plain_parameters(source.parameters)["weight"])
        for source in recipe.sources()
        if source.model == name and "weight" in source.parameters
    ]
    if weights:
        return code(", ".join(dict.fromkeys(weights)))
    return "base" if recipe.base_model == name else ""


def repository(url: str) -> str:
    """`org/name` of a hub URL, which is how the hub links to it; other URLs as they are."""
    return url.removeprefix("hf://").split("@")[0] if url.startswith("hf://") else url


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)


def _listed(names: list[str]) -> str:
    quoted = [*map(code, names)]
    if len(names) > MOST_NAMES:
        return f"{quoted[0]}, {quoted[1]} … {quoted[-1]} ({len(names)} checkpoints)"
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
