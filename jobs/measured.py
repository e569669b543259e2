"""The keys `grams:` and `fisher:` of a recipe: files of `mergeyard measure`, one for each model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jobs.expressions import Bindings, Template
from jobs.sources import Reader, bound_text
from jobs.yaml_nodes import Node

Files = Mapping[str, str]
"""The file of each model, by its name."""

FilesTemplate = Mapping[str, str | Template]
"""The same where placeholders wait for values."""


def files_template(key: str, node: Node, reader: Reader) -> FilesTemplate:
    """The value of `grams:` or `fisher:` that stands at `node`."""
    files = node.mapping()
    if not files:
        raise node.error(f"`{key}:` names a file for each model, such as `cos: cos-{key}.safetensors`")
    return {model: reader.text(file) for model, file in files.items()}


def bound_files(files: FilesTemplate, bindings: Bindings) -> Files:
    """The value at one point."""
    return {model: bound_text(file, bindings) for model, file in files.items()}


def files_schema() -> dict[str, Any]:
    """The JSON Schema of the value of `grams:` or `fisher:`."""
    file = {"type": "string", "minLength": 1, "description": "URL or path of the file of `mergeyard measure`"}
    return {"type": ["object", "null"], "additionalProperties": file, "minProperties": 1}
