"""Parents as points of their own, so that they are evaluated like merges."""

from __future__ import annotations

from dataclasses import replace

from jobs.grid import Point
from jobs.job import Keep
from jobs.merge_tasks import Setting
from jobs.recipe import Recipe
from jobs.sources import Source
from orchestrator.planning.content_keys import ContentKeys
from orchestrator.planning.layouts import Layout, TensorClasses, layout_of
from orchestrator.planning.plan import Plan, PlannedPoint
from workers.methods.binding import resolve


def parents_as_points(plan: Plan, layout: Layout) -> list[PlannedPoint]:
    """Each parent that a layout holds whole as the merge of itself alone, so that points can be compared with it."""
    keys = ContentKeys(plan.job, plan.parents)
    recipe = plan.points[0].point.recipe
    found: list[PlannedPoint] = []
    for name in layout.whole:
        itself = Setting("passthrough", (name,), None, (("scale", (1.0,)),))
        settings = (itself,) * len(layout.representatives)
        found.append(PlannedPoint(Point(name, {}, recipe), layout, settings, keys))
    return found


def parent_alone(plan: Plan, name: str) -> PlannedPoint:
    """A parent that no layout holds whole, with a layout of its own: a baseline, or one whose layers go into slices."""
    template = plan.points[0].layout.chat_template
    itself = Source(model=name, parameters={}, place=plan.job.place_of("gate"))
    place = plan.job.place_of("gate")
    recipe = Recipe(merge_method="passthrough", models=(itself,), chat_template=template, place=place)
    unwritten = replace(plan.job, config_from=None, keep=Keep(kind="none"))
    layout = layout_of(unwritten, recipe, plan.parents, TensorClasses(plan.job))
    settings = tuple(
        resolve(recipe, tensor.name, position, exact=True)
        for tensor, position in zip(layout.representatives, layout.positions, strict=True)
    )
    keys = ContentKeys(plan.job, plan.parents)
    return PlannedPoint(Point(name, {}, recipe), layout, settings, keys)
