"""The key `grams:` of a recipe: the files of Gram matrices of its models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.expressions import Bindings, Template
from jobs.sources import Reader, bound_text
from jobs.yaml_nodes import Node

Grams = Mapping[str, str]
"""The file of each model, by its name."""

GramsTemplate = Mapping[str, str | Template]
"""The same where placeholders wait for values."""


def grams_template(node: Node, reader: Reader) -> GramsTemplate:
    """The value of `grams:` that stands at `node`."""
    files = node.mapping()
    if not files:
        raise node.error("`grams:` names a file for each model, such as `cos: cos-grams.safetensors`")
    return {model: reader.text(file) for model, file in files.items()}


def bound_grams(files: GramsTemplate, bindings: Bindings) -> Grams:
    """The value at one point."""
    return {model: bound_text(file, bindings) for model, file in files.items()}


def grams_schema() -> dict[str, Any]:
    """The JSON Schema of the value of `grams:`."""
    file = {"type": "string", "minLength": 1, "description": "URL or path of the file of `mergeyard measure`"}
    return {"type": ["object", "null"], "additionalProperties": file, "minProperties": 1}
