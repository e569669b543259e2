"""The points of a genome of mergekit-evolve are the documents that mergekit makes of the same genotypes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.genome import Genome, load_genome
from jobs.job import Job, read_job
from jobs.yaml_nodes import node_of
from tests.conformance.oracle import Oracle

PARENTS = Path(__file__).parents[2] / "jobs" / "examples" / "parents"
LAYERS = 3
LONG, FMT, BASE = (str(PARENTS / name) for name in ("long", "fmt", "base"))
CASES: dict[str, dict[str, Any]] = {
    "linear": {"models": [LONG, FMT], "merge_method": "linear"},
    "linear by layers": {"models": [LONG, FMT, BASE], "merge_method": "linear", "layer_granularity": 1},
    "task arithmetic, smooth": {
        "models": [LONG, FMT],
        "base_model": BASE,
        "merge_method": "task_arithmetic",
        "layer_granularity": 1,
        "smooth": True,
        "allow_negative_weights": True,
    },
    "ties by layers and filters": {
        "models": [LONG, FMT],
        "base_model": BASE,
        "merge_method": "ties",
        "layer_granularity": 1,
        "filters": ["self_attn", "mlp.up_proj"],
        "tokenizer_source": "base",
    },
    "dare, a base among the models": {
        "models": [LONG, BASE, FMT],
        "base_model": BASE,
        "merge_method": "dare_ties",
        "layer_granularity": 3,
        "smooth": True,
        "filters": ["mlp"],
        "normalize": False,
    },
    "slerp": {"models": [LONG, FMT], "merge_method": "slerp", "layer_granularity": 1},
}


def text_of(genome: dict[str, Any]) -> str:
    return yaml.safe_dump({"genome": genome, "tasks": ["arc_easy"]})


def job_of(genome: Genome) -> Job:
    document = genome.document({reference: reference for reference in genome.references()}, LAYERS)
    document["search"]["budget"] = {"points": 9}
    return read_job(node_of({"name": "job", **document, "output": "runs"}, "genome.yml"))


def genotypes(case: dict[str, Any]) -> list[list[float]]:
    """On the steps of the axes, as [group, model, filter, gene]; those of slerp make the first model the base."""
    drawn = random.Random(str(sorted(case)))
    groups = LAYERS // case["layer_granularity"] if case.get("layer_granularity") else 1
    genes = 2 if case["merge_method"] in ("ties", "dare_ties") else 1
    count = groups * len(case["models"]) * (1 + len(case.get("filters", []))) * genes
    if case["merge_method"] == "slerp":
        return [[1.0, 0.5] * groups, [0.5, 0.5 - 1e-9] * groups]
    least = -1.0 if case.get("allow_negative_weights") else 0.1
    return [[round(drawn.uniform(least, 1.0), 2) for _ in range(count)] for _ in range(3)]


def bindings(case: dict[str, Any], genotype: list[float], job: Job) -> tuple[int, ...]:
    """The choice whose values are those of the genotype."""
    assert job.search is not None
    values = iter(genotype)
    groups = LAYERS // case["layer_granularity"] if case.get("layer_granularity") else 1
    genes = ("weight", "density") if case["merge_method"] in ("ties", "dare_ties") else ("weight",)
    signs = {"": "", "self_attn": "__self_attn", "mlp.up_proj": "__mlp_up_proj", "mlp": "__mlp"}
    chosen: dict[str, float] = {}
    for group in range(groups):
        for model in case["models"]:
            for filter_ in (*case.get("filters", []), ""):
                for gene in genes:
                    name = f"{gene}_{Path(model).name}{signs[filter_]}"
                    knot = f".{group}" if case.get("smooth") else f"_{group}"
                    chosen[name + (knot if groups > 1 else "")] = next(values)
    axes = job.search.space.axes
    return tuple(axis.values.index(Fraction(str(chosen[axis.name]))) for axis in axes)


def normal(value: Any, names: dict[str, str]) -> Any:
    """A document without what has no effect: one slice over all layers, a filter of all, memory's settings, names."""
    if isinstance(value, dict):
        value = {key: each for key, each in value.items() if each is not None and key not in ("int8_mask", "name")}
        if len(slices := value.get("slices", [])) == 1:
            value |= {"models": slices[0]["sources"]}
            del value["slices"]
        if "models" in value:
            value["models"] = [{k: v for k, v in each.items() if k != "layer_range"} for each in value["models"]]
            if value["merge_method"] == "dare_ties":  # whose base has no task vector
                value["models"] = [
                    {"model": each["model"]} if each["model"] == value["base_model"] else each
                    for each in value["models"]
                ]
        return {key: normal(each, names) for key, each in value.items()}
    if isinstance(value, list):
        return [normal(each, names) for each in value]
    if isinstance(value, str):
        return names.get(value, value)
    return round(float(value), 6) if isinstance(value, int | float) and not isinstance(value, bool) else value


def by_slice(document: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    """The base and the angle of each slice of slerp, wherever they are set."""
    for part in document["slices"]:
        own = {**document.get("parameters", {}), **part.get("parameters", {})}
        yield part.get("base_model", document.get("base_model")), [each["model"] for each in part["sources"]], own["t"]


@pytest.mark.heavy
def test_points_are_the_documents_of_mergekit(oracle: Oracle) -> None:
    for name, case in CASES.items():
        documents = oracle.ask("documents_of_genome", genome=case, genotypes=genotypes(case))
        job = job_of(load_genome(text_of(case), "genome.yml"))
        assert job.search is not None and job.searched is not None
        paths = {path: parent for parent, path in job.parents.items()}
        first, *others = documents
        start = job.searched.point(job.search.start[0]).recipe.document()
        if case["merge_method"] == "slerp":
            assert [*by_slice(normal(start, paths))] == [*by_slice(normal(first, paths))]
            assert all(angle == pytest.approx(0.377541) for _, _, angle in by_slice(normal(others[0], paths)))
            continue
        near = normal(first, paths)
        if len(case["models"]) == 2:
            assert normal(start, paths) == near, name
        for genotype, document in zip(genotypes(case), others, strict=True):
            ours = job.searched.point(bindings(case, genotype, job)).recipe.document()
            assert normal(ours, paths) == normal(document, paths), name
