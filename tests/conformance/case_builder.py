"""Cases in a line: the document of a method over the parents of one family."""

from __future__ import annotations

from typing import Any

import yaml


def document(
    method: str,
    models: dict[str, dict[str, Any]] | str,
    base: str | None = None,
    *,
    family: str = "bf16",
    dtype: str | None = None,
    out_dtype: str | None = None,
    **parameters: Any,
) -> str:
    """The YAML text. `models`: parents with their own parameters, or their names; `dtype` is the family's by default;
    a parameter that is a word of Python has `_` at its end."""
    listed = {name: {} for name in models.split()} if isinstance(models, str) else models
    own = {"fp32": "float32", "crossed": "float32", "lattice": "float32", "fp16": "float16"}.get(family, "bfloat16")
    text: dict[str, Any] = {"merge_method": method}
    if base:
        text["base_model"] = f"PARENTS/{family}/{base}"
    text["models"] = [
        {"model": f"PARENTS/{family}/{name}"} | ({"parameters": values} if values else {})
        for name, values in listed.items()
    ]
    if parameters:
        text["parameters"] = {name.rstrip("_"): value for name, value in parameters.items()}
    text["dtype"] = dtype or own
    if out_dtype:
        text["out_dtype"] = out_dtype
    return yaml.safe_dump(text, sort_keys=False)


def weighted(**weights: Any) -> dict[str, dict[str, Any]]:
    """Parents and their weights."""
    return {name: {"weight": weight} for name, weight in weights.items()}
