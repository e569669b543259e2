"""Jinja templates rendered as one HTML file: every value escaped, an undefined one an error, the style inside."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


def render(template: Path, filters: Mapping[str, Callable[..., Any]], **values: Any) -> str:
    """The rendered page; the template puts `style` into its head."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= filters
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template.name).render(style=Markup(style), **values)
