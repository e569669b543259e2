"""The README.md of a made checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def made_card(url: str, front: Mapping[str, Any], sentence: str, facts: Mapping[str, str], *more: str) -> str:
    """Markdown of this front matter, a sentence, a table of facts, and further lines."""
    rows = [f"| {name} | {value} |" for name, value in facts.items()]
    text = yaml.safe_dump({**front, "pipeline_tag": "text-generation"}, sort_keys=False).strip()
    end = "`manifest.json` holds the pinned parents and the digest of every tensor; `mergeyard verify` checks them."
    lines = ["---", text, "---", "", f"# {url.rpartition('/')[2]}", "", sentence, "", "| | |", "|---|---|", *rows, ""]
    return "\n".join([*lines, *more, end, ""])
