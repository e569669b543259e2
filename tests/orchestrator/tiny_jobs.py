"""Jobs over the tiny parents of the examples: four points between two of them, or one that is turned down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PARENTS = Path(__file__).parents[2] / "jobs" / "examples" / "parents"
RULER = {"tasks": ["niah_single_1"], "lengths": [256], "items": 6}
SOUP = {
    "merge_method": "linear",
    "dtype": "bfloat16",
    "models": [
        {"model": "long", "parameters": {"weight": "${w}"}},
        {"model": "fmt", "parameters": {"weight": "${1 - w}"}},
    ],
}
SCALED = {  # a model that is turned down to nothing knows nothing
    "merge_method": "linear",
    "dtype": "bfloat16",
    "parameters": {"normalize": False},
    "models": [{"model": "long", "parameters": {"weight": "${w}"}}],
}


def soup_parents(folder: Path) -> dict[str, str]:
    return {name: str(folder / name) for name in ("long", "fmt")}


def job_text(folder: Path, **keys: Any) -> str:
    """A job of four points between `long` and `fmt`, six items each; a key of None is left out."""
    job: dict[str, Any] = {
        "name": "tiny",
        "parents": soup_parents(PARENTS),
        "recipe": SOUP,
        "grid": {"w": [0.2, 0.4, 0.6, 0.8]},
        "point": "w{w}",
        "evaluate": {"ruler": RULER},
        "keep": "none",
        "output": str(folder / "runs"),
        **keys,
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in job.items() if value is not None)


def scaled(weights: list[float], **gate: Any) -> dict[str, Any]:
    """A job of `long` turned down to these weights, judged against `long` itself."""
    return {
        "parents": {"long": str(PARENTS / "long")},
        "recipe": SCALED,
        "grid": {"w": weights},
        "gate": {"baseline": "long", **gate},
    }
