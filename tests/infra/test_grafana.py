"""The dashboard asks for what is counted, and shows all of it. There is no Grafana here to open it in."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

from tests.infra.reading import counted

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "infra" / "grafana" / "dashboard.json").read_text("utf-8"))
EXPRESSIONS: list[str] = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def asked(expressions: list[str]) -> set[str]:
    """The metrics that these expressions are about."""
    return {name for expression in expressions for name in re.findall(r"\bray_\w+", expression)}


def test_the_dashboard_shows_exactly_what_is_counted() -> None:
    assert len(asked(EXPRESSIONS)) == 7
    assert asked(EXPRESSIONS) == counted().keys()


def test_a_metric_that_nobody_counts_is_noticed() -> None:
    planted = [*EXPRESSIONS, 'sum(rate(ray_mergeyard_gigabytes_total{SessionName=~"$session"}[5m]))']
    assert asked(planted) - counted().keys() == {"ray_mergeyard_gigabytes_total"}


def test_it_groups_by_labels_that_there_are() -> None:
    for expression in EXPRESSIONS:
        grouped = set(re.findall(r"by \((\w+)\)", expression))
        (name,) = re.findall(r"\bray_\w+", expression)
        assert grouped <= counted()[name], expression
        assert grouped == counted()[name], f"{expression} adds up what is of different kinds"


def test_expressions_are_closed_and_of_one_session() -> None:
    for expression in EXPRESSIONS:
        for opening, closing in ("()", "{}", "[]"):
            assert expression.count(opening) == expression.count(closing), expression
        assert 'SessionName=~"$session"' in expression
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "session"]


def test_panels_do_not_lie_on_one_another() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        {(x, y) for x in range(p["x"], p["x"] + p["w"]) for y in range(p["y"], p["y"] + p["h"])}
        for p in (panel["gridPos"] for panel in panels)
    ]
    assert all(one.isdisjoint(other) for one, other in combinations(cells, 2))
    assert max(x for cell in cells for x, _ in cell) == 23  # Grafana's grid has 24 columns
