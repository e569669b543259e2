"""A training run is so many parents, and a window of it is the models of a merge, weighted by age."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jsonschema
import pytest
import yaml

from jobs.errors import BadInput
from jobs.job import Job, job_schema, load_job
from jobs.trajectories import MAX_CHECKPOINTS as MAX
from jobs.trajectories import shape_weights
from jobs.yaml_nodes import load_document, yaml_text

STEPS = "{url: 's3://bucket/run/step-{n:06d}', n: {from: 1000, to: 20000, step: 1000}}"


def job_text(
    models: Any, *, parents: str = f"{{step: {STEPS}}}", grid: str | None = None, rest: str = "", **recipe: Any
) -> str:
    document = {"merge_method": "linear", "models": models, **recipe}
    text = (
        f"name: j\nparents: {parents}\noutput: runs\n{rest}recipe: {yaml.safe_dump(document, default_flow_style=True)}"
    )
    return text + (f"grid: {grid}\n" if grid else "")


def window_job(model: str = "step[-4:]", weight: Any = "uniform", *, grid: str | None = None, **more: Any) -> Job:
    return load_job(job_text([{"model": model, "parameters": {"weight": weight, **more}}], grid=grid), "job.yaml")


def weights(job: Job, point: int = 0) -> dict[str, Any]:
    return {source.model: source.parameters.get("weight") for source in job.points[point].recipe.models}


def refusal(text: str) -> str:
    with pytest.raises(BadInput) as caught:
        load_job(text, "job.yaml")
    return str(caught.value)


# the parents


def test_a_trajectory_is_a_parent_for_each_number_oldest_first() -> None:
    job = window_job()
    assert [*job.parents] == [f"step-{n}" for n in range(1000, 20001, 1000)]
    assert job.parents["step-1000"] == "s3://bucket/run/step-001000"
    assert job.parents["step-20000"] == "s3://bucket/run/step-020000"


@pytest.mark.parametrize(
    ("trajectory", "expected"),
    [
        ("{url: 'a/{n}', n: [3, 1, 2]}", {"e-1": "a/1", "e-2": "a/2", "e-3": "a/3"}),
        ("{url: 'a/{n}/b{n:03}', n: [7]}", {"e-7": "a/7/b007"}),
        ("{url: 'a/{n}', n: {from: 1, to: 0.5, num: 2}}", {"e-0.5": "a/0.5", "e-1": "a/1"}),
        ("{20: hf://o/m@x, 3: hf://o/m@y}", {"e-3": "hf://o/m@y", "e-20": "hf://o/m@x"}),
    ],
)
def test_the_numbers_of_a_trajectory(trajectory: str, expected: dict[str, str]) -> None:
    text = job_text([{"model": "e[:]", "parameters": {"weight": "uniform"}}], parents=f"{{e: {trajectory}}}")
    assert load_job(text, "job.yaml").parents == expected
    jsonschema.validate(yaml.safe_load(text.replace("20: hf", "'20': hf").replace("3: hf", "'3': hf")), job_schema())


@pytest.mark.parametrize(
    ("trajectory", "message"),
    [
        ("{url: 'a', n: [1, 2]}", "all checkpoints would have one URL; write {n} where the number stands"),
        ("{url: 'a/{m}', n: [1]}", 'the braces in "a/{m}" are not {n}; write {n}, or {n:06d} for six digits'),
        ("{url: 'a/{n.__class__}', n: [1]}", "are not {n}"),
        ("{url: 'a/{n}', n: [1, 2, 1.0]}", "the number 1 is listed twice"),
        ("{url: 'a/{n}', n: [-1]}", "-1 cannot number a checkpoint"),
        ("{url: 'a/{n:02d}', n: [0.5]}", "0.5 has no 2 digits"),
        ("{url: 'a/{n}'}", 'needs the key "n"'),
        (
            "{url: 'a/{n}', n: {from: 1, to: 2000, step: 1}}",
            f"2000 checkpoints are too many; at most {MAX}",
        ),
        ("{url: 'a/{n}', n: {from: 1, to: 4, step: 2}}", "end at 3, or give `num` in place of `step`"),
        ("{1: a, 1.0: b}", "a number of the trajectory stands there twice"),
    ],
)
def test_a_wrong_trajectory_is_refused(trajectory: str, message: str) -> None:
    found = refusal(job_text([{"model": "e[:]"}], parents=f"{{e: {trajectory}}}"))
    assert found.startswith("job.yaml:2: ") and message in found


def test_a_checkpoint_and_a_parent_of_one_name_are_refused() -> None:
    parents = "{e-1: a, e: {url: 'b/{n}', n: [1]}}"
    assert 'two parents are called "e-1"; rename "e"' in refusal(job_text([{"model": "e-1"}], parents=parents))


def test_the_resolved_job_reads_back_with_its_windows() -> None:
    job = window_job("step[-${k}:]", "${shape}", grid="{k: [2, 4], shape: [uniform, ema]}")
    again = load_job(yaml_text(job.document()), "again.yaml")
    assert again == job and again.digest() == job.digest() and again.trajectories == job.trajectories


def test_checkpoints_outside_of_every_window_are_not_used_but_an_unused_trajectory_is_refused() -> None:
    assert window_job("step[-${k}:]", grid="{k: [2, 3]}").used_parents() == ("step-18000", "step-19000", "step-20000")
    parents = f"{{cos: a, step: {STEPS}}}"
    found = refusal(job_text([{"model": "cos"}], parents=parents))
    assert 'the parent "step-1000" is used nowhere; use it in the recipe, or take it out' in found


# the windows


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("step[-3:]", [18, 19, 20]),
        ("step[:2]", [1, 2]),
        ("step[-4:-2]", [17, 18]),
        ("step[::10]", [1, 11]),
        ("step[-1::-10]", [20, 10]),
        ("step[-30:2]", [1, 2]),
        ("step[-2]", [19]),
        ("step[0]", [1]),
        ("step-7000", [7]),
    ],
)
def test_a_window_is_a_slice_of_python(text: str, numbers: list[int]) -> None:
    assert [*weights(window_job(text, 1 if "[" not in text else "${age}" if ":" in text else 1))] == [
        f"step-{n}000" for n in numbers
    ]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("step", '"step" is a trajectory of 20 checkpoints; write step[-1] for the newest, or in `models:` step[-8:]'),
        ("step[20]", '"step[20]" is outside of the 20 checkpoints of "step"'),
        ("step[5:5]", '"step[5:5]" holds none of the 20 checkpoints of "step"; write step[-8:]'),
        ("step[-0:]", "-0 would be the beginning; give a number from 1 on"),
        ("step[a:]", '"a" in "step[a:]" is not a whole number'),
        ("step[]", '"step[]" is not a slice'),
        ("step[::0]", '"step[::0]" is not a slice'),
        ("stop[-8:]", '"stop" in "stop[-8:]" is not a trajectory of `parents:`; did you mean "step"?'),
    ],
)
def test_a_wrong_window_is_refused(model: str, message: str) -> None:
    found = refusal(job_text([{"model": model, "parameters": {"weight": 1}}]))
    assert found.startswith("job.yaml:") and message in found


def test_one_model_may_be_a_checkpoint_and_not_a_window() -> None:
    models = [{"model": "step[-2:]", "parameters": {"weight": 1}}]
    rest = (
        "config_from: step[-2]\ngate: {baseline: 'step[-1]'}\n"
        "evaluate: {needle: {lengths: [64]}, guards: {tasks: [gsm8k], baseline: 'step[1]'}}\n"
    )
    job = load_job(job_text(models, base_model="step[0]", tokenizer_source="step[-1]", rest=rest), "job.yaml")
    recipe = job.points[0].recipe
    assert (recipe.base_model, recipe.tokenizer_source) == ("step-1000", "step-20000")
    assert (job.config_from, job.gate and job.gate.baseline) == ("step-19000", "step-20000")
    assert job.evaluate is not None and job.evaluate.guards is not None
    assert job.evaluate.guards.baseline == "step-2000"
    assert job.used_parents() == ("step-1000", "step-2000", "step-19000", "step-20000")
    found = refusal(job_text(models, base_model="step[-2:]"))
    assert '"step[-2:]" is a window, and one model stands here; write step[-1]' in found


def test_windows_that_share_a_checkpoint_are_refused() -> None:
    models = [{"model": text, "parameters": {"weight": 1}} for text in ("step[-4:]", "step[-1]")]
    assert 'the model "step-20000" is listed twice' in refusal(job_text(models))


def test_a_path_with_brackets_in_a_job_without_trajectories_stays_a_name() -> None:
    found = refusal(job_text([{"model": "a[1]"}], parents="{cos: x}"))
    assert '"a[1]" is not in `parents:`' in found


# the weights


def megatron(decay: Callable[[float], float], count: int) -> list[float]:
    """The coefficients of Megatron-LM's weighted_merge.py for a decay schedule: the differences of its values."""
    values = [decay(index / count) for index in range(count)]
    inner = [values[index] - values[index + 1] for index in range(1, count - 1)]
    last = [values[-1]] if count > 1 else []
    return [1 - sum(inner) - sum(last), *inner, *last]


DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda x: 1 - x,
    "1-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}


@pytest.mark.parametrize("size", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("shape", DECAYS)
def test_a_shape_is_the_average_that_equals_its_decay_of_the_learning_rate(shape: str, size: int) -> None:
    found = shape_weights(shape, size)
    assert sum(found) == 1
    assert [float(weight) for weight in found] == pytest.approx(megatron(DECAYS[shape], size), abs=2e-12)
    updates = [random.Random(size).uniform(-1, 1) for _ in range(size)]
    checkpoints = [-sum(updates[1 : index + 1]) for index in range(size)]  # the oldest is 0
    merged = sum(float(weight) * checkpoint for weight, checkpoint in zip(found, checkpoints, strict=True))
    decayed = -sum(DECAYS[shape](index / size) * updates[index] for index in range(1, size))
    assert merged == pytest.approx(decayed, abs=1e-10)


def test_uniform_is_the_mean_and_so_is_a_linear_decay() -> None:
    assert set(weights(window_job("step[-8:]")).values()) == {Fraction(1, 8)}
    assert weights(window_job("step[-8:]", "linear")) == weights(window_job("step[-8:]"))


@pytest.mark.parametrize("alpha", [None, Fraction(1, 10), Fraction(1)])
def test_ema_is_the_moving_average_from_the_oldest_on(alpha: Fraction | None) -> None:
    more: dict[str, Any] = {} if alpha is None else {"alpha": float(alpha)}
    job = window_job("step[-5:]", "ema", **more)
    part = alpha or Fraction(1, 5)
    for place in range(5):  # the average of checkpoints that are 0 but for one is the weight of that one
        average = Fraction(place == 0)
        for index in range(1, 5):
            average = part * (index == place) + (1 - part) * average
        assert [*weights(job).values()][place] == average
    assert {*job.points[0].recipe.models[0].parameters} == {"weight"}


def test_an_alpha_outside_of_its_range_is_refused() -> None:
    text = job_text([{"model": "step[-4:]", "parameters": {"weight": "ema", "alpha": 1.5}}])
    assert "the alpha of ema must be a number above 0 and at most 1" in refusal(text)


@pytest.mark.parametrize("weight", ["${1/2 ** age}", "1/2 ** age", "${half} ** age"])
def test_a_weight_is_an_expression_of_the_age(weight: str) -> None:
    grid = "{half: [0.5]}" if "half" in weight else None
    found = weights(window_job("step[-3:]", weight, grid=grid))
    assert [*found.values()] == [Fraction(1, 4), Fraction(1, 2), Fraction(1)]


def test_the_age_counts_from_the_newest_of_the_window_in_any_order() -> None:
    assert weights(window_job("step[-2::-5]", "${age}")) == {
        "step-19000": 0, "step-14000": 1, "step-9000": 2, "step-4000": 3
    }  # fmt: skip


def test_filters_and_other_parameters_may_speak_of_the_age() -> None:
    weight = [{"filter": "mlp", "value": "ema"}, {"value": "${age + 1}"}]
    models = window_job("step[-2:]", weight, alpha=0.5, density="${1 / (age + 1)}").points[0].recipe.models
    assert [source.parameters["density"] for source in models] == [Fraction(1, 2), Fraction(1)]
    filtered: list[Any] = [source.parameters["weight"] for source in models]
    assert [[part.value for part in each] for each in filtered] == [[Fraction(1, 2), 2], [Fraction(1, 2), 1]]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (
            "uniorm",
            'the weight of a window is a shape or an expression of the age, not "uniorm"; did you mean "uniform"?',
        ),
        ("age +", "an operand is missing"),
        ("a ** age", 'unknown axis "a"'),
    ],
)
def test_a_wrong_weight_of_a_window_is_refused(weight: str, message: str) -> None:
    assert message in refusal(job_text([{"model": "step[-4:]", "parameters": {"weight": weight}}]))


def test_the_age_is_no_axis_elsewhere() -> None:
    text = job_text([{"model": "step[-1]", "parameters": {"weight": "${age}"}}])
    assert 'unknown axis "age"' in refusal(text)


def test_windows_and_shapes_are_axes_of_a_grid() -> None:
    job = window_job("step[-${k}:]", "${shape}", grid="{k: [1, 3], shape: [uniform, 1-sqrt]}")
    assert [point.name for point in job.points] == [
        "k1_shape=uniform",
        "k1_shape=1-sqrt",
        "k3_shape=uniform",
        "k3_shape=1-sqrt",
    ]
    assert [len(point.recipe.models) for point in job.points] == [1, 1, 3, 3]


def test_the_recipe_of_a_point_is_a_plain_mergekit_document() -> None:
    document = window_job("step[-2:]", "${1 - age/4}").points[0].recipe.document()
    assert document == {
        "merge_method": "linear",
        "models": [
            {"model": "step-19000", "parameters": {"weight": 0.75}},
            {"model": "step-20000", "parameters": {"weight": 1}},
        ],
    }
    assert load_document(yaml_text(document), "mergekit_config.yml").plain() == document
