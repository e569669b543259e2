"""A genome of mergekit-evolve as a job: its axes and its start, and a refusal of each key that a job cannot have."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from jobs.errors import BadInput
from jobs.genome import job_name, load_genome, parent_names
from jobs.job import Job, read_job
from jobs.yaml_nodes import node_of

TWO: dict[str, Any] = {"models": ["org/long", "org/fmt"], "merge_method": "linear"}
TIES = {"models": ["org/long@main", "other/long+org/lora"], "base_model": "org/base", "merge_method": "ties"}


def text_of(genome: dict[str, Any], **keys: Any) -> str:
    return yaml.safe_dump({"genome": genome, "tasks": ["arc_easy"], **keys}, sort_keys=False)


def document_of(genome: dict[str, Any], layers: int = 4, **keys: Any) -> dict[str, Any]:
    found = load_genome(text_of(genome, **keys), "genome.yml")
    return found.document({reference: f"hf://{reference}" for reference in found.references()}, layers)


def job_of(genome: dict[str, Any], layers: int = 4, **keys: Any) -> Job:
    document = document_of(genome, layers, **keys)
    document["search"]["budget"] = {"points": 9}
    return read_job(node_of({"name": "job", **document, "output": "runs"}, "genome.yml"))


def test_a_gene_becomes_an_axis_that_starts_where_mergekit_does() -> None:
    document = document_of(TIES)
    weight, density = {"from": 0, "to": 1}, {"to": 1}
    assert [*document["search"]["over"]] == ["weight_long", "weight_long_2", "density_long", "density_long_2"]
    assert document["search"]["over"]["weight_long"].items() >= weight.items()
    assert document["search"]["over"]["density_long"].items() >= density.items()
    job = job_of(TIES)
    assert job.search is not None
    [start] = job.search.start
    assert {name: float(value) for name, value in job.search.space.bindings(start).items()} == {
        "weight_long": 0.5, "density_long": 1.0, "weight_long_2": 0.5, "density_long_2": 1.0
    }  # fmt: skip
    assert dict(job.parents) == {
        "long": "hf://org/long@main", "long-2": "hf://other/long+org/lora", "base": "hf://org/base"
    }  # fmt: skip


def test_groups_of_layers_are_knots_or_slices() -> None:
    smooth = job_of({**TWO, "layer_granularity": 2, "smooth": True}, layers=6)
    assert smooth.search is not None and smooth.searched is not None
    assert smooth.search.space.knots == {
        name: tuple(f"{name}.{knot}" for knot in range(3)) for name in ("weight_long", "weight_fmt")
    }
    slices = job_of({**TWO, "layer_granularity": 2, "smooth": False}, layers=6)
    assert slices.searched is not None and slices.search is not None
    recipe = slices.searched.point(slices.search.space.middle()).recipe
    assert [part.sources[0].layer_range for part in recipe.slices] == [(0, 2), (2, 4), (4, 6)]


def test_no_point_of_a_normalized_mean_has_weights_that_sum_to_zero() -> None:
    least = [axis["from"] for axis in document_of(TWO)["search"]["over"].values()]
    assert all(float(value) > 0 for value in least)
    free = document_of({**TWO, "normalize": False, "allow_negative_weights": True})["search"]["over"]
    assert [axis["from"] for axis in free.values()] == [-1, -1]


def test_tasks_and_settings_reach_the_harness() -> None:
    tasks = ["arc_easy", {"name": "gsm8k", "metric": "exact_match,strict-match", "weight": 1}]
    keys = {"limit": 20, "num_fewshot": 3, "apply_chat_template": False, "random_init": True}
    document = document_of(TWO, tasks=tasks, **keys)
    assert document["evaluate"]["lm_eval"] == {
        "tasks": ["arc_easy", "gsm8k"],
        "metrics": {"arc_easy": "acc", "gsm8k": "exact_match,strict-match"},
        "limit": 20,
        "num_fewshot": 3,
    }
    assert "start" not in document["search"]
    assert document_of(TWO)["evaluate"]["lm_eval"]["chat"] is True


def test_the_tokenizer_of_a_model_called_base_is_not_that_of_the_base_model() -> None:
    genome = {**TIES, "models": ["other/base", "org/union"]}
    for model, name in (("other/base", "base-2"), ("org/union", "union-2"), ("org/base", "base")):
        document = document_of({**genome, "tokenizer_source": model})
        assert document["recipe"]["tokenizer_source"] == name and document["parents"][name] == f"hf://{model}"
    assert document_of({**genome, "tokenizer_source": "union"})["recipe"]["tokenizer_source"] == "union"


def test_slerp_goes_from_one_model_to_the_other() -> None:
    document = document_of({**TWO, "merge_method": "slerp", "layer_granularity": 2})
    assert [*document["search"]["over"]] == ["t_0", "t_1"]
    assert document["recipe"]["base_model"] == "long"
    assert job_of({**TWO, "merge_method": "slerp"}).search is not None


@pytest.mark.parametrize(
    ("genome", "keys", "error"),
    [
        ({**TWO, "merge_method": "dare_linear"}, {}, '5: "genome.merge_method" cannot be "dare_linear"; choose from'),
        ({**TWO, "merge_method": "ties"}, {}, "5: ties needs `base_model:`"),
        ({**TWO, "base_model": "org/base"}, {}, "6: linear merges `models:` alone; take `base_model:` out"),
        ({**TWO, "models": ["a/b"]}, {}, "2: a search merges two models or more"),
        ({**TWO, "models": ["a/b", "a/b"]}, {}, '4: the model "a/b" is listed twice'),
        ({**TWO, "layer_granularity": 3}, {}, "6: `layer_granularity: 3` does not divide the 4 layers; take 2"),
        ({**TWO, "allow_negative_weights": True}, {}, "6: weights that may be negative may sum to 0"),
        ({**TWO, "merge_method": "slerp", "smooth": True}, {}, "6: slerp has no `smooth`"),
        ({**TWO, "merge_method": "slerp", "models": ["a", "b", "c"]}, {}, "2: slerp merges two models"),
        ({**TWO, "tokenizer_source": "org/other"}, {}, '6: "org/other" is not a model of the genome'),
        ({**TWO, "filters": ["mlp", "mlp."]}, {}, "6: filters must differ in letters or digits"),
        ({**TWO, "sigma": 1}, {}, '6: unknown key "sigma"; choose from'),
        (TWO, {"shuffle": True}, "8: with `shuffle` each merge would answer other items"),
        (TWO, {"fewshot_as_multiturn": False}, "8: in a chat the examples are turns"),
        (TWO, {"tasks": [{"name": "a"}, {"name": "b", "weight": 2}]}, "9: tasks of a search count alike"),
        (TWO, {"tasks": [{"name": "a", "weight": -1}]}, "8: a score is a mean of what should be large"),
        (TWO, {"tasks": ["a", "a"]}, '8: the task "a" is listed twice'),
    ],
)
def test_a_key_that_a_job_cannot_have_is_refused_by_name(
    genome: dict[str, Any], keys: dict[str, Any], error: str
) -> None:
    with pytest.raises(BadInput) as refused:
        document_of(genome, **keys)
    said = str(refused.value)
    assert "\n" not in said and said.startswith(f"genome.yml:{error}"), said


def test_names_are_the_last_parts_of_references() -> None:
    assert parent_names(["a/x.y@main", "b/X.Y", "/p/q/", "org/m+org/lora"]) == {
        "a/x.y@main": "x-y", "b/X.Y": "X-Y-2", "/p/q/": "q", "org/m+org/lora": "m"
    }  # fmt: skip
    assert [*parent_names(["a/base", "b/union", "c/base"], "c/base").values()] == ["base-2", "union-2", "base"]
    assert [job_name(file) for file in ("jobs/my genome.yaml", "-.yml", "-")] == ["my-genome", "search", "search"]
