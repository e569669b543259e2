"""The README.md of a published point: hub front matter, parents, licence and results.

Front matter as https://huggingface.co/docs/hub/model-cards describes it; `published_card` is the hub's version.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from orchestrator.judging.effective_length import RULER_THRESHOLD, EffectiveLength
from orchestrator.judging.guards import Guarded
from orchestrator.report.leaderboard import Line
from orchestrator.words import benchmark_words, code, short_length, token_count
from workers.checkpoints.configs import context_length


def front_matter(card: str) -> dict[str, Any]:
    """The front matter of a model card; empty if it is not YAML."""
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
    ranked: Mapping[str, float],
    searched: Sequence[str] = (),
    not_on_hub: Sequence[str] = (),
) -> str:
    """A point's card as the hub gets it: with its licence, and with its results where there are any.

    Only parents that the hub knows stay in `base_model`: it refuses paths and buckets there. `not_on_hub` are names
    that only look like its own. `ranked` are the weights of the benchmarks of the score, and `searched` the facts of a
    search that chose the point.
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
        body = before + _results(line, ranked, context_length(config), searched) + mark + after
    return f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---\n{body}"


def _index(line: Line, ranked: Mapping[str, float]) -> list[dict[str, Any]]:
    """The results of a `model-index`, each a score from 0 to 100."""
    benchmark = benchmark_words(ranked)
    rows = [("mean", f"{benchmark}, mean", line.score)]
    rows += [
        (str(length), f"{benchmark} at {length:,} tokens", score) for length, score in sorted(line.by_length.items())
    ]
    entries = [("-".join(ranked), config, name, score) for config, name, score in rows]
    entries += [(line.beside_of[task], task, task, score) for task, score in line.beside.items()]
    return [
        {
            "task": {"type": "text-generation", "name": "Text Generation"},
            "dataset": {"type": dataset, "name": name, "config": config},
            "metrics": [{"type": "score", "name": "score (0 to 100)", "value": round(score, 2)}],
        }
        for dataset, config, name, score in entries
    ]


def _results(line: Line, ranked: Mapping[str, float], claimed: Any, searched: Sequence[str]) -> str:
    spread = f" ± {line.half_width:.1f}" if math.isfinite(line.half_width) else ""
    rows = [(f"Score (0 to 100): {benchmark_words(ranked)}, {line.items:,} items", f"{line.score:.1f}{spread}")]
    rows += [(f"at {short_length(length)}", f"{score:.1f}") for length, score in sorted(line.by_length.items())]
    rows += [(code(task), f"{score:.1f}") for task, score in line.beside.items()]
    rows += [(f"Guard {code(found.guard)}", f"{found.score:.1f}{_finding(found)}") for found in line.guards]
    named = {"thought": "tokens of a thought (median)", "answer": "tokens of an answer (median)"}
    rows += [(named.get(name, name), f"{value:,.0f}") for name, value in line.generated.items()]
    if line.unanswered.count:
        rows.append(("Questions without an answer", f"{line.unanswered.count:,} of {line.unanswered.asked:,}"))
    if line.effective is not None:
        compared = "" if line.as_published else ", not comparable with RULER's published lengths"
        meaning = f"{line.effective_of}: longest with a score of {RULER_THRESHOLD} or more{compared}"
        title = f"Effective context length ({meaning})"
        rows.append((title, f"{_reach(line.effective)}; the config claims {token_count(claimed)}"))
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows), ""]
    return "\n".join(["## Results", "", *table, *([" ".join(searched), ""] if searched else []), ""])


def _finding(guarded: Guarded) -> str:
    return "" if guarded.against is None else f"; {guarded.words}"


def _reach(effective: EffectiveLength) -> str:
    """In words; a model that passed at the longest length might pass at longer ones, which were not asked."""
    longest, high = effective.asked, f"{effective.high:,}"
    if effective.high == longest:
        high += " or more"
    interval = f" (95 % interval: {effective.low:,} to {high})" if effective.low < effective.high else ""
    if effective.length == 0:
        return f"below the shortest that was asked{interval}"
    if effective.length == longest:
        return f"{token_count(longest)} or more, the longest asked{interval}"
    return f"{token_count(effective.length)}{interval}"
