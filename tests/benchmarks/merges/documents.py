"""The documents to measure: every method of mergekit over the synthetic parents base, cos and fmt."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Recipe:
    """A method's models, base, parameters of each model and of the merge; and the parameter that a grid varies.

    `varied` is (name, from, to). A weight varies from model to model: w for the first, 1 - w for the second.
    """

    models: Sequence[str] = ("cos", "fmt")
    base: str | None = None
    each: Mapping[str, float] = field(default_factory=dict[str, float])
    weights: Sequence[float] = ()
    merge: Mapping[str, float] = field(default_factory=dict[str, float])
    varied: tuple[str, float, float] | None = ("weight", 0.2, 0.8)

    @property
    def parents(self) -> Sequence[str]:
        """Every checkpoint that takes part."""
        return list(dict.fromkeys((*self.models, *([self.base] if self.base else []))))


def _task_vectors(varied: str = "density", **each: float) -> Recipe:
    return Recipe(base="base", weights=(0.7, 0.3), each=each, varied=(varied, 0.2, 0.8))


RECIPES: Mapping[str, Recipe] = {
    "linear": Recipe(weights=(0.7, 0.3)),
    "slerp": Recipe(base="cos", merge={"t": 0.3}, varied=("t", 0.2, 0.8)),
    "nuslerp": Recipe(weights=(0.7, 0.3)),
    "multislerp": Recipe(weights=(0.7, 0.3)),
    "karcher": Recipe(varied=("max_iter", 1, 16)),
    "task_arithmetic": _task_vectors("weight"),
    "ties": _task_vectors(density=0.5),
    "dare_ties": _task_vectors(density=0.5),
    "dare_linear": _task_vectors(density=0.5),
    "breadcrumbs": _task_vectors(density=0.5, gamma=0.01),
    "breadcrumbs_ties": _task_vectors(density=0.5, gamma=0.01),
    "della": _task_vectors(density=0.5, epsilon=0.15),
    "della_linear": _task_vectors(density=0.5, epsilon=0.15),
    "sce": Recipe(base="base", merge={"select_topk": 0.5}, varied=("select_topk", 0.2, 0.8)),
    "ram": Recipe(base="base", varied=("epsilon", 1e-5, 1e-4)),
    "ramplus_tl": Recipe(base="base", varied=("r", 0.05, 0.2)),
    "model_stock": Recipe(base="base", varied=None),
    "nearswap": Recipe(models=("fmt",), base="cos", merge={"t": 0.0005}, varied=("t", 0.0002, 0.0008)),
    "arcee_fusion": Recipe(base="cos", varied=None),
    "passthrough": Recipe(models=("cos",), merge={"scale": 0.9}, varied=("scale", 0.2, 0.8)),
}


@dataclass(frozen=True)
class Form:
    """A document that is more than one merge of whole models: its parents in the order of reading, and its text.

    In the text, {parents} is the folder of the parents, {layers} the number of their layers, {half} half of it.
    """

    parents: Sequence[str]
    text: str


FORMS: Mapping[str, Form] = {
    "slices": Form(("cos", "fmt"), """\
merge_method: passthrough
slices:
- sources: [{model: {parents}/cos, layer_range: [0, {half}]}]
- sources: [{model: {parents}/fmt, layer_range: [{half}, {layers}]}]
dtype: bfloat16
"""),
    "stages": Form(("base", "fmt", "cos"), """\
name: first
merge_method: slerp
base_model: {parents}/cos
models: [{model: {parents}/cos}, {model: {parents}/fmt}]
parameters: {t: 0.3}
dtype: bfloat16
---
merge_method: ties
base_model: {parents}/base
models: [{model: first}, {model: {parents}/fmt}]
parameters: {weight: 0.5, density: 0.5}
dtype: bfloat16
"""),
    "lora": Form(("fmt", "cos"), """\
merge_method: linear
models: [{model: {parents}/cos+{parents}/adapter}, {model: {parents}/fmt}]
parameters: {weight: 0.5}
dtype: bfloat16
"""),
}  # fmt: skip
"""The slices keep the number of layers: with another, mergekit 0.1.5 writes no config of Qwen2 beside transformers 5.

It runs the stages with mergekit-multi. The adapter has rank 16 on all projections of `cos`.
"""


MIXTURE = """\
base_model: {parents}/base
gate_mode: hidden
experts:
- {source_model: {parents}/base, positive_prompts: [Find the number]}
- {source_model: {parents}/cos, positive_prompts: [Write a function that, Fix the bug in]}
- {source_model: {parents}/fmt, positive_prompts: [Answer in JSON]}
shared_experts:
- {source_model: {parents}/base, positive_prompts: [Find the number]}
dtype: bfloat16
"""
"""Three experts in a Qwen MoE, which has a shared one in mergekit."""


def filled(text: str, parents: Path) -> str:
    """The text of a document of several parts; its models are folders."""
    layers = json.loads((parents / "cos" / "config.json").read_text())["num_hidden_layers"]
    values = {"parents": parents, "layers": layers, "half": layers // 2}
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", str(value))
    return text


def document(method: str, parents: Path) -> dict[str, Any]:
    """The mergekit document of a method; its models are folders."""
    recipe = RECIPES[method]
    return _document(method, {who: str(parents / who) for who in recipe.parents}, recipe.weights, {}, "")


def grid_job(method: str, parents: Path, output: Path, points: int) -> dict[str, Any]:
    """A job that merges a grid of points in this method, and evaluates none."""
    recipe = RECIPES[method]
    assert recipe.varied is not None, f"{method} has no parameter to vary"
    name, begin, end = recipe.varied
    weights = ["${v}", "${1 - v}"][: len(recipe.models)] if name == "weight" else recipe.weights
    varied = {} if name == "weight" else {name: "${v}"}
    names = {who: who for who in recipe.parents}
    values = [round(float(value), 9) for value in np.linspace(begin, end, points)]
    return {
        "name": "speed",
        "parents": {who: str(parents / who) for who in recipe.parents},
        "recipe": _document(method, names, weights, varied, name),
        "grid": {"v": [int(value) for value in values] if name == "max_iter" else values},
        "point": "v{v}",
        "keep": "all",
        "output": str(output),
        "workers": {"cpus": 2},
    }


def _document(
    method: str, names: Mapping[str, str], weights: Sequence[float | str], varied: Mapping[str, str], name: str
) -> dict[str, Any]:
    recipe = RECIPES[method]
    models: list[dict[str, Any]] = []
    for index, who in enumerate(recipe.models):
        own: dict[str, Any] = {"weight": weights[index]} if weights else {}
        own |= {**recipe.each, **{key: value for key, value in varied.items() if key in recipe.each}}
        models.append({"model": names[who], **({"parameters": own} if own else {})})
    merge = {**recipe.merge, **{key: value for key, value in varied.items() if key not in recipe.each}}
    return {
        "merge_method": method,
        **({"base_model": names[recipe.base]} if recipe.base else {}),
        "models": models,
        **({"parameters": merge} if merge else {}),
        "dtype": "bfloat16",
    }
