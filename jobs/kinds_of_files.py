"""The kinds of YAML files that a command takes, each told from the others by one of its keys."""

from __future__ import annotations

from collections.abc import Mapping

from jobs.yaml_nodes import Node

COMMANDS = {
    "recipe": "a job: `mergeyard run FILE` runs it",
    "genome": "a genome of mergekit-evolve: `mergeyard search FILE OUT` runs its search",
    "experts": "a mixture of experts: `mergeyard moe FILE OUT` makes it",
    "merge_method": "a mergekit document: `mergeyard merge FILE OUT` merges it",
}
"""The key of each kind, and its command. A job may lack its key by mistake, and always has parents."""


def check_kind(node: Node, wanted: str) -> None:
    """Refuses a file that has the key of another kind and not the wanted one, and names its command."""
    keys = node.value if isinstance(node.value, Mapping) else {}
    found = next((key for key in COMMANDS if key in keys), wanted)
    if wanted not in keys and found != wanted and not (wanted == "recipe" and "parents" in keys):
        raise keys[found].error(f"this is {COMMANDS[found]}")
