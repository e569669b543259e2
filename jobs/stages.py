"""A recipe of several stages: merges that feed each other by name, of which the last result is written.

In a file they are documents, as for `mergekit-multi`; in a job they are a list under `recipe:`. The stages may stand in
any order. No stage may be left over, and none may lead back to itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from jobs.errors import BadInput
from jobs.expressions import Bindings, Template, Value
from jobs.recipe import KEYS, Recipe, RecipeTemplate, plain_recipe, recipe_schema, recipe_template
from jobs.trajectories import NO_TRAJECTORIES, Trajectories
from jobs.yaml_nodes import Node, quoted

MOST_STAGES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class StagesTemplate:
    """The result's recipe and the stages by name; their placeholders wait for values."""

    result: RecipeTemplate
    stages: Mapping[str, RecipeTemplate]
    result_name: str | None = None
    _bound: dict[tuple[str, tuple[Value, ...]], Recipe] = field(default_factory=dict, compare=False, repr=False)

    @property
    def place(self) -> str:
        """File and line of the first document."""
        return next(iter(self.stages.values()), self.result).place

    @property
    def placeholders(self) -> tuple[Template, ...]:
        """Those of all stages."""
        return tuple(each for recipe in (*self.stages.values(), self.result) for each in recipe.placeholders)

    def bind(
        self, bindings: Bindings, trajectories: Trajectories = NO_TRAJECTORIES
    ) -> tuple[Recipe, dict[str, Recipe]]:
        """The result at one point, and the stages that it needs: each after those that it needs itself.

        A stage that no placeholder changes is the same object at every point. `BadInput` for a circle.
        """
        stages: dict[str, Recipe] = {}
        names = [*self.stages, *([] if self.result_name is None else [self.result_name])]

        def add_stages_of(recipe: Recipe, path: tuple[str, ...]) -> None:
            for reference in recipe.parents():
                name, _ = stage_in(reference, names) or (reference, "")
                if name in path:
                    circle = " → ".join(quoted(each) for each in (*path[path.index(name) :], name))
                    raise BadInput(f"{recipe.place}: the merges {circle} feed each other in a circle; break it")
                if name in self.stages and name not in stages:
                    stage = self._stage(name, bindings, trajectories)
                    add_stages_of(stage, (*path, name))
                    stages[name] = stage

        result = self.result.bind(bindings, trajectories)
        add_stages_of(result, () if self.result_name is None else (self.result_name,))
        return result, stages

    def _stage(self, name: str, bindings: Bindings, trajectories: Trajectories) -> Recipe:
        template = self.stages[name]
        axes = sorted({axis for placeholder in template.placeholders for axis in placeholder.names})
        key = name, tuple(bindings[axis] for axis in axes if axis in bindings)
        if key not in self._bound:
            self._bound[key] = template.bind(bindings, trajectories)
        return self._bound[key]


def stage_in(reference: str, stages: Iterable[str]) -> tuple[str, str] | None:
    """(the stage that a model names, the adapter after its `+` or an empty text); None if it names no stage."""
    for name in sorted(stages, key=len, reverse=True):
        if reference == name or reference.startswith(f"{name}+"):
            return name, reference[len(name) + 1 :]
    return None


def stages_template(node: Node, *, foreign: bool = False) -> StagesTemplate:
    """The recipe that stands at `node`: one document, or a list of named ones whose last is the result.

    `foreign` as for `recipe_template`.
    """
    if node.kind != "list":
        return StagesTemplate(result=recipe_template(node, foreign=foreign), stages={})
    *stages, result = node.sequence()
    nodes: dict[str, Node] = {}
    for each in (*stages, result):
        name = _name(each)
        if name is None and each is not result:
            raise each.error("a merge that feeds another needs the key `name`, by which the other names it")
        if name in nodes:
            raise each.error(f"two merges are called {quoted(name)} (the first is at {nodes[name].place}); rename one")
        if name is not None:
            nodes[name] = each
    if len(stages) >= MOST_STAGES:
        raise stages[MOST_STAGES - 1].error(f"there are more than {MOST_STAGES} merges; write some of them first")
    return StagesTemplate(
        result=recipe_template(result, foreign=foreign),
        stages={name: recipe_template(each, foreign=foreign) for name, each in nodes.items() if each is not result},
        result_name=_name(result),
    )


def results_in_order(nodes: Sequence[Node]) -> tuple[Node, ...]:
    """The results of a file's documents, each as a job has it under `recipe:`: after the stages that it may need.

    The result is the document without a name; where all have names, each one that no other uses is a result.
    """
    if len(nodes) == 1:
        return (nodes[0],)
    unnamed = [node for node in nodes if _name(node) is None]
    if len(unnamed) > 1:
        raise unnamed[1].error(
            f"two documents have no name (the first is at {unnamed[0].place}); give `name:` to all but the result"
        )
    results = unnamed or _unused(nodes)
    stages = tuple(node for node in nodes if node not in results)
    return tuple(replace(nodes[0], value=(*stages, result)) for result in results)


def plain_stages(node: Node) -> Any:
    """The recipe at `node` as plain data, without the keys that only hold anchors."""
    return [plain_recipe(each) for each in node.sequence()] if node.kind == "list" else plain_recipe(node)


def stages_schema() -> dict[str, Any]:
    """The JSON Schema of `recipe:`."""
    recipe = recipe_schema()
    return {"anyOf": [recipe, {"type": "array", "items": recipe, "minItems": 1, "maxItems": MOST_STAGES}]}


def _name(node: Node) -> str | None:
    name = node.without_anchors(KEYS).mapping().get("name")
    if name is None or name.kind == "nothing":
        return None
    if "${" in name.string():
        raise name.error(f"the name {quoted(name.string())} has a placeholder; a merge has one name at all points")
    return name.string()


def _unused(nodes: Sequence[Node]) -> list[Node]:
    """The documents that no other uses."""
    names = [name for node in nodes if (name := _name(node)) is not None]
    models = [model for node in nodes for model in recipe_template(node, foreign=True).bind({}).parents()]
    used = {found[0] for model in models if (found := stage_in(model, names)) is not None}
    results = [node for node in nodes if _name(node) not in used]
    if not results:
        raise nodes[-1].error("each merge feeds another; take the `name:` of the result out, and break the circle")
    return results
