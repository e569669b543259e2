"""The README.md of a point: hub front matter, and what a reader of a merge's card looks for.

Front matter as https://huggingface.co/docs/hub/model-cards describes it; `published_card` is what the hub gets.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from orchestrator.judging.effective_length import RULER_THRESHOLD, EffectiveLength
from orchestrator.leaderboard import Line
from orchestrator.planning.compatibility import context_fields
from orchestrator.planning.plan import Plan, PlannedPoint
from orchestrator.words import short_length, token_count
from workers.checkpoint import FLOATS


def model_card(plan: Plan, planned: PlannedPoint, recipe_text: str) -> str:
    """Markdown with YAML front matter."""
    layout, recipe = planned.layout, planned.point.recipe
    parents = {name: plan.parents[name].url for name in layout.parents}
    front: dict[str, Any] = {
        "base_model": [_repository(url) for url in parents.values()],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mergeyard", "mergekit", "merge", recipe.merge_method],
    }
    context = context_fields(layout.config)
    parameters = sum(tensor.elements for shard in layout.shards for tensor in shard.tensors if tensor.dtype in FLOATS)
    facts = {
        "Method": f"`{recipe.merge_method}`",
        "Parameters": f"{_count(parameters)} ({parameters:,})",
        "Stored as": f"{layout.config.get('dtype', layout.config.get('torch_dtype'))}, {layout.bytes / 1e9:.2f} GB",
        "Architecture": ", ".join(layout.config.get("architectures") or [str(layout.config.get("model_type"))]),
        "Context length (claimed by the config)": token_count(context.get("max_position_embeddings")),
        "RoPE": f"theta {context.get('rope_theta', 'default'):g}"
        if isinstance(context.get("rope_theta"), float)
        else "default",
        "Arithmetic": "float32, rounded once" if plan.job.numerics == "float32" else "as mergekit, in the dtype",
        "Seed": str(plan.job.seed),
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False).strip(),
        "---",
        "",
        f"# {planned.name}",
        "",
        f"A `{recipe.merge_method}` merge of {_listed(list(parents))}, made by mergeyard.",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in facts.items()),
        "",
        "## Parents",
        "",
        "| parent | where | weight |",
        "|---|---|---|",
        *(f"| {name} | {url} | {_weight(plan, planned, name)} |" for name, url in parents.items()),
        "",
        "## Recipe",
        "",
        "```yaml",
        recipe_text.strip(),
        "```",
        "",
        "`manifest.json` holds the pinned parents and the sha256 of every tensor; `mergeyard verify` checks them.",
        "",
    ]
    return "\n".join(lines)


def front_matter(card: str) -> dict[str, Any]:
    """What a model card says between its `---` lines; empty where it says nothing that is YAML."""
    found = FRONT.match(card)
    try:
        told = yaml.safe_load(found["yaml"]) if found else None
    except yaml.YAMLError:
        return {}
    return told if isinstance(told, dict) else {}


FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(?P<yaml>.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


def published_card(
    card: str,
    licence: Mapping[str, str],
    config: Mapping[str, Any],
    line: Line | None,
    ranked: Sequence[str],
    not_on_hub: Sequence[str] = (),
) -> str:
    """A point's card as the hub gets it: with its licence, and with its results where there are any.

    Only parents that the hub knows stay in `base_model`: it refuses paths and buckets there. `not_on_hub` are names
    that only look like its own.
    """
    front = front_matter(card)
    bases = [base for base in front.pop("base_model", []) if HUB_NAME.fullmatch(base) and base not in not_on_hub]
    relation = front.pop("base_model_relation", "merge")
    head = {**({"base_model": bases, "base_model_relation": relation} if bases else {}), **front, **licence}
    body = FRONT.sub("", card, count=1)
    if line is not None:
        title = re.search(r"^# (.+)$", body, re.MULTILINE)
        head["model-index"] = [{"name": title[1] if title else line.name, "results": _index(line, ranked)}]
        before, mark, after = body.partition("## Parents\n")
        body = before + _results(line, ranked, context_fields(config).get("max_position_embeddings")) + mark + after
    return f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---\n{body}"


def _index(line: Line, ranked: Sequence[str]) -> list[dict[str, Any]]:
    """The results of a `model-index`, each a score from 0 to 100."""
    benchmark = " and ".join(ranked)
    rows = [("mean", f"{benchmark}, mean", line.score)]
    rows += [
        (str(length), f"{benchmark} at {length:,} tokens", score) for length, score in sorted(line.by_length.items())
    ]
    entries = [("-".join(ranked), config, name, score) for config, name, score in rows]
    entries += [("lm_eval", task, task, score) for task, score in line.beside.items()]
    return [
        {
            "task": {"type": "text-generation", "name": "Text Generation"},
            "dataset": {"type": dataset, "name": name, "config": config},
            "metrics": [{"type": "score", "name": "score (0 to 100)", "value": round(score, 2)}],
        }
        for dataset, config, name, score in entries
    ]


def _results(line: Line, ranked: Sequence[str], claimed: Any) -> str:
    spread = f" ± {line.half_width:.1f}" if math.isfinite(line.half_width) else ""
    rows = [(f"Score (0 to 100): {' and '.join(ranked)}, {line.items:,} items", f"{line.score:.1f}{spread}")]
    rows += [(f"at {short_length(length)}", f"{score:.1f}") for length, score in sorted(line.by_length.items())]
    rows += [(task, f"{score:.1f}") for task, score in line.beside.items()]
    if line.effective is not None:
        title = f"Effective context length (longest with a score of {RULER_THRESHOLD} or more)"
        rows.append((title, f"{_reach(line.effective)}; the config claims {token_count(claimed)}"))
    lines = ["## Results", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), "", ""]
    return "\n".join(lines)


def _reach(effective: EffectiveLength) -> str:
    """In words; what passed at the longest length might pass at longer ones, that nobody asked."""
    longest, high = effective.asked, f"{effective.high:,}"
    if effective.high == longest:
        high += " or more"
    interval = f" (95 % interval: {effective.low:,} to {high})" if effective.low < effective.high else ""
    if effective.length == 0:
        return f"below the shortest that was asked{interval}"
    if effective.length == longest:
        return f"{token_count(longest)} or more, the longest asked{interval}"
    return f"{token_count(effective.length)}{interval}"


def _weight(plan: Plan, planned: PlannedPoint, name: str) -> str:
    for source in planned.point.recipe.models:
        if source.model == name and "weight" in source.parameters:
            document = planned.point.recipe.document()
            entry = next(model for model in document["models"] if model["model"] == name)
            return f"`{entry['parameters']['weight']}`"
    return "base" if planned.point.recipe.base_model == name else "–"


def _repository(url: str) -> str:
    """`org/name` of a hub URL, which is how the hub links to it; other URLs as they are."""
    return url.removeprefix("hf://").split("@")[0] if url.startswith("hf://") else url


def _count(parameters: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if parameters >= size:
            return f"{parameters / size:.2f} {unit}"
    return str(parameters)


def _listed(names: list[str]) -> str:
    quoted = [f"`{name}`" for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} and {quoted[-1]}"
