"""Documents over architectures of three layers; a folder of parents for each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LAYERS = 3
"""Of text; a vision tower has two, so that a gradient over the wrong stack shows."""

ALIKE = ("llama", "tied llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2")
"""mergekit stores mixtures of experts under other names, and fails for Bert and multimodal models."""

LAYER_TYPES = ("qwen2", "qwen3", "gemma2", "gemma3")
"""Of these, transformers 5 refuses mergekit's stack, because `layer_types` keeps its length."""


def slices(parents: Path) -> dict[str, Any]:
    """Two slices with gradients and filters."""

    def part(begin: int, end: int, one: Any, two: Any) -> dict[str, Any]:
        weights = {"one": one, "two": two}
        return {
            "sources": [
                {"model": str(parents / who), "layer_range": [begin, end], "parameters": {"weight": weight}}
                for who, weight in weights.items()
            ]
        }

    by_name = [{"filter": "att", "value": [0.9, 0.1]}, {"filter": "norm", "value": 0.3}, {"value": 0.5}]
    return {
        "merge_method": "linear",
        "slices": [part(0, 2, by_name, [0.1, 0.8]), part(2, 3, 0.2, [{"filter": "embed", "value": 0.7}, {"value": 1}])],
        "dtype": "float32",
    }


def stack(parents: Path) -> dict[str, Any]:
    """Two layers of one model and two of another."""
    sources = [{"model": str(parents / who), "layer_range": [at, at + 2]} for who, at in (("one", 0), ("two", 1))]
    return {"merge_method": "passthrough", "slices": [{"sources": [each]} for each in sources], "dtype": "float32"}


DEEP = {"slices": slices, "stack": stack}
