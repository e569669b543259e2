"""A genome of mergekit-evolve (mergekit 0.1.5, `evo/genome.py` and `evo/config.py`) as a job with `search:`.

    genome:                       tasks:
      models: [org/a, org/b]        - {name: arc_easy, metric: "acc,none"}
      merge_method: ties          limit: 100
      base_model: org/base
      layer_granularity: 4

Every gene becomes an axis with steps. A gene that mergekit folds by its absolute value has a range from 0, so that no
merge has two names. The job makes the document that mergekit makes of the same values.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from jobs.grid import POINT_NAME
from jobs.kinds_of_files import check_kind
from jobs.sources import filled, model_name
from jobs.yaml_nodes import Node, load_document, quoted

KEYS = (
    *("genome", "tasks", "limit", "num_fewshot", "shuffle", "random_init"),
    *("apply_chat_template", "fewshot_as_multiturn"),
)
GENOME_KEYS = (
    *("models", "merge_method", "base_model", "tokenizer_source", "layer_granularity"),
    *("normalize", "allow_negative_weights", "filters", "smooth"),
)
GENES = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
"""The genes of one model in one group of layers, by merge method."""
OF_TASK_VECTORS = ("task_arithmetic", "ties", "dare_ties")
NORMALIZED = ("linear", "ties", "dare_ties")
"""Methods that divide by the sum of the weights where the genome does not say."""
STEP = Decimal("0.01")
LEAST_DENSITY = Decimal("0.1")
"""mergekit refuses a density that leaves nothing of a small tensor."""
METRIC = "acc,none"


@dataclass(frozen=True, slots=True, kw_only=True)
class Genome:
    """A checked genome and its tasks. `metrics` has the metric of each task; `place_of_groups` is a line."""

    models: tuple[str, ...]
    merge_method: str
    base_model: str | None
    tokenizer_source: str | None
    layer_granularity: int
    normalize: bool
    negative: bool
    filters: tuple[str, ...]
    smooth: bool
    metrics: Mapping[str, str]
    limit: int | None
    num_fewshot: int | None
    chat: bool
    random_init: bool
    place: str
    groups: Node | None

    def references(self) -> tuple[str, ...]:
        """The models and the base, once each, as mergekit writes them."""
        return tuple(dict.fromkeys((*self.models, *([] if self.base_model is None else [self.base_model]))))

    def document(self, urls: Mapping[str, str], layers: int) -> dict[str, Any]:
        """The parts of the job that follow from the genome: parents, recipe, search without a budget, evaluate.

        `urls` has the URL of each reference, `layers` counts those of a model. `BadInput` for groups that do not divide
        them.
        """
        names = parent_names(self.references(), self.base_model)
        count = self._groups(layers)
        axes = [*self._axes(names, count)]
        search: dict[str, Any] = {"over": {axis.name: axis.document for axis in axes}}
        if not self.random_init:
            search["start"] = [{axis.name: axis.start for axis in axes}]
        chat = {"chat": True} if self.chat else {}
        limits = {"limit": self.limit, "num_fewshot": self.num_fewshot}
        harness = {"tasks": [*self.metrics], "metrics": dict(self.metrics), **chat}
        return {
            "parents": {names[reference]: urls[reference] for reference in self.references()},
            "recipe": self._recipe(names, count, layers // count),
            "search": search,
            "evaluate": {"lm_eval": harness | {key: value for key, value in limits.items() if value is not None}},
        }

    def _groups(self, layers: int) -> int:
        """Groups of layers that have genes of their own."""
        if not self.layer_granularity:
            return 1
        if layers % self.layer_granularity:
            assert self.groups is not None, "a granularity above 0 stands in the file"
            divisors = [size for size in range(1, layers + 1) if layers % size == 0]
            nearest = min(divisors, key=lambda size: abs(size - self.layer_granularity))
            raise self.groups.error(
                f"`layer_granularity: {self.layer_granularity}` does not divide the {layers} layers; take {nearest}"
            )
        return layers // self.layer_granularity

    def _evolving(self) -> tuple[str, ...]:
        """The models that have genes: a base has no task vector."""
        of_base = self.base_model if self.merge_method in OF_TASK_VECTORS else None
        return tuple(model for model in self.models if model != of_base)

    def _axes(self, names: Mapping[str, str], groups: int) -> Iterator[_Axis]:
        """One axis for each gene, or each group of knots."""
        knots = groups if self.smooth and groups > 1 else 0
        for group in range(1 if knots else groups):
            for gene in GENES[self.merge_method]:
                if gene == "t":
                    yield _Axis(_axis_name(gene, "", "", group, groups), Decimal(0), Decimal("0.5"))
                    continue
                for model, filter_ in itertools.product(self._evolving(), (*self.filters, "")):
                    name = _axis_name(gene, names[model], filter_, group, 1 if knots else groups)
                    start = Decimal(1) if gene == "density" else round(1 / Decimal(len(self.models)), 2)
                    yield _Axis(name, LEAST_DENSITY if gene == "density" else self._least_weight(), start, knots)

    def _least_weight(self) -> Decimal:
        if self.negative:
            return Decimal(-1)
        return STEP if self.merge_method == "linear" and self.normalize else Decimal(0)  # weights of 0 have no sum

    def _recipe(self, names: Mapping[str, str], groups: int, size: int) -> dict[str, Any]:
        recipe: dict[str, Any] = {"merge_method": self.merge_method}
        base = self.base_model if self.merge_method != "slerp" else self.base_model or self.models[0]
        if base is not None:
            recipe["base_model"] = names[base]
        if groups == 1 or self.smooth:
            recipe |= self._part(names, 0, 1, {})
            recipe["models"] = recipe.pop("sources")
        else:
            recipe["slices"] = [
                self._part(names, group, groups, {"layer_range": [group * size, (group + 1) * size]})
                for group in range(groups)
            ]
        if self.merge_method != "slerp":
            recipe["parameters"] = {"normalize": self.normalize}
        recipe["dtype"] = "bfloat16"
        if self.tokenizer_source is not None:
            recipe["tokenizer_source"] = names.get(self.tokenizer_source, self.tokenizer_source)
        return recipe

    def _part(self, names: Mapping[str, str], group: int, groups: int, layers: Mapping[str, Any]) -> dict[str, Any]:
        """The sources of one group of layers, and its parameters."""
        genes = GENES[self.merge_method]
        if genes == ("t",):
            sources = [{"model": names[model], **layers} for model in self.models]
            return {"sources": sources, "parameters": {"t": f"${{{_axis_name('t', '', '', group, groups)}}}"}}

        def value(gene: str, model: str) -> Any:
            texts = {
                filter_: f"${{{_axis_name(gene, names[model], filter_, group, groups)}}}"
                for filter_ in (*self.filters, "")
            }
            listed = [({"filter": of} if of else {}) | {"value": text} for of, text in texts.items()]
            return listed if self.filters else texts[""]

        evolving = self._evolving()
        sources = [
            {"model": names[model], **layers}
            | ({"parameters": {gene: value(gene, model) for gene in genes}} if model in evolving else {})
            for model in self.references()
        ]
        return {"sources": sources}


@dataclass(frozen=True, slots=True)
class _Axis:
    name: str
    least: Decimal
    start: Decimal
    knots: int = 0

    @property
    def document(self) -> dict[str, Any]:
        knots = {"knots": self.knots} if self.knots else {}
        return {**knots, "from": _plain(self.least), "to": 1, "step": _plain(STEP)}


def _plain(number: Decimal) -> Any:
    return int(number) if number == int(number) else number


def _axis_name(gene: str, parent: str, filter_: str, group: int, groups: int) -> str:
    """`weight_long__mlp_3`: letters, digits and _ alone; two of these stand before a filter."""
    of_filter = f"_{_signs(filter_)}" if filter_ else ""
    return "_".join(part for part in (gene, _signs(parent), of_filter, str(group) if groups > 1 else "") if part)


def _signs(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")


def parent_names(references: Sequence[str], base: str | None = None) -> dict[str, str]:
    """A name of each model: the last part of its reference, shortened and numbered where two are alike.

    No model is called `union`, and none but `base` is called `base`: a `tokenizer_source` means other things by these.
    """
    names: dict[str, str] = {}
    taken: set[str] = {"union"}
    for reference in references:
        last = reference.partition("+")[0].rstrip("/").rpartition("/")[2].partition("@")[0]
        name = re.sub(r"[^A-Za-z0-9]+", "-", last).strip("-")[:32] or "model"
        numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
        refused = taken if reference == base else taken | {"base"}
        names[reference] = next(each for each in numbered if each.lower() not in refused)
        taken.add(names[reference].lower())
    return names


def job_name(file: str) -> str:
    """A job's name made of the file's."""
    stem = re.sub(r"[^A-Za-z0-9._+=,-]+", "-", re.sub(r"\.ya?ml$", "", file.rpartition("/")[2])).lstrip("._+=,-")
    return stem[:100] if POINT_NAME.fullmatch(stem[:100]) else "search"


def load_genome(text: str, name: str) -> Genome:
    """The genome in a YAML file of mergekit-evolve. `BadInput` names the line and the remedy of each key that a job
    cannot have.
    """
    node = load_document(text, name)
    check_kind(node, "genome")
    keys = filled(node.mapping(KEYS, ("genome", "tasks")))
    genome = filled(keys["genome"].mapping(GENOME_KEYS, ("models", "merge_method")))
    method = genome["merge_method"].choice(tuple(GENES))
    models = tuple(model_name(entry).string() for entry in genome["models"].sequence())
    for number, model in enumerate(models):
        if model in models[:number]:
            raise genome["models"].sequence()[number].error(f"the model {quoted(model)} is listed twice; list it once")
    if len(models) < 2:
        raise genome["models"].error("a search merges two models or more; list another")
    base = model_name(genome["base_model"]).string() if "base_model" in genome else None
    normalize = genome["normalize"].boolean() if "normalize" in genome else method in NORMALIZED
    negative = "allow_negative_weights" in genome and genome["allow_negative_weights"].boolean()
    smooth = "smooth" in genome and genome["smooth"].boolean()
    _check_method(genome, method, models, base)
    if negative and normalize and method == "linear":
        raise genome["allow_negative_weights"].error(
            "weights that may be negative may sum to 0, and `normalize` divides by the sum; add `normalize: false`"
        )
    _check_asking(keys)
    chat = "apply_chat_template" not in keys or keys["apply_chat_template"].boolean()
    known = (*models, *([] if base is None else [base]))
    return Genome(
        models=models,
        merge_method=method,
        base_model=base,
        tokenizer_source=_tokenizer_source(genome.get("tokenizer_source"), known),
        layer_granularity=genome["layer_granularity"].integer(minimum=0) if "layer_granularity" in genome else 0,
        normalize=normalize,
        negative=negative,
        filters=_filters(genome["filters"]) if "filters" in genome else (),
        smooth=smooth,
        metrics=_metrics(keys["tasks"]),
        limit=keys["limit"].integer(minimum=1) if "limit" in keys else None,
        num_fewshot=keys["num_fewshot"].integer(minimum=0) if "num_fewshot" in keys else None,
        chat=chat,
        random_init="random_init" in keys and keys["random_init"].boolean(),
        place=node.place,
        groups=genome.get("layer_granularity"),
    )


def _check_method(genome: Mapping[str, Node], method: str, models: Sequence[str], base: str | None) -> None:
    if method in OF_TASK_VECTORS and base is None:
        raise genome["merge_method"].error(f"{method} needs `base_model:`, the model that task vectors start from")
    if base is not None and base not in models and method not in OF_TASK_VECTORS:
        raise genome["base_model"].error(f"{method} merges `models:` alone; take `base_model:` out, or list it there")
    if method != "slerp":
        return
    if len(models) > 2:
        raise genome["models"].error(
            f"slerp merges two models; that two of {len(models)} are chosen anew for each group of layers cannot be an"
            " axis; list two, or take linear"
        )
    for key in ("smooth", "filters"):
        if key in genome and (genome[key].kind == "list" or genome[key].boolean()):
            raise genome[key].error(f"slerp has no `{key}`, in mergekit either; take it out")


def _check_asking(keys: Mapping[str, Node]) -> None:
    if "shuffle" in keys and keys["shuffle"].boolean():
        raise keys["shuffle"].error(
            "with `shuffle` each merge would answer other items, and points are compared on the same ones; take it out"
        )
    in_chat = "apply_chat_template" not in keys or keys["apply_chat_template"].boolean()
    if in_chat and "fewshot_as_multiturn" in keys and not keys["fewshot_as_multiturn"].boolean():
        raise keys["fewshot_as_multiturn"].error(
            "in a chat the examples are turns of the conversation; take the key out, or ask without"
            " `apply_chat_template`"
        )


def _filters(node: Node) -> tuple[str, ...]:
    found = tuple(entry.string() for entry in node.sequence())
    if len({_signs(each) for each in found}) < len(found) or not all(map(_signs, found)):
        raise node.error("filters must differ in letters or digits, which name their axes; take one out")
    return found


def _tokenizer_source(node: Node | None, models: Sequence[str]) -> str | None:
    if node is None:
        return None
    source = node.string().removeprefix("model:")
    if source not in ("base", "union", *models):
        raise node.error(f"{quoted(source)} is not a model of the genome; write base, union or one of `models:`")
    return source


def _metrics(node: Node) -> dict[str, str]:
    """The metric of each task; a filter `none` is left out. Tasks have equal weights."""
    metrics: dict[str, str] = {}
    weights: list[tuple[Node, Any]] = []
    for entry in node.sequence():
        keys: Mapping[str, Node] = {"name": entry}
        if entry.kind != "string":
            keys = filled(entry.mapping(("name", "weight", "metric"), ("name",)))
        name = keys["name"].string()
        if name in metrics:
            raise entry.error(f"the task {quoted(name)} is listed twice; list it once")
        metrics[name] = (keys["metric"].string() if "metric" in keys else METRIC).removesuffix(",none")
        weight = keys["weight"].number() if "weight" in keys else 1
        if weight <= 0:
            raise keys["weight"].error("a score is a mean of what should be large; give the task a weight above 0")
        weights.append((keys.get("weight", entry), weight))
    for place, weight in weights:
        if weight != weights[0][1]:
            raise place.error(
                "tasks of a search count alike; give all of them one weight, or take the lighter ones out"
            )
    return metrics
