"""A search: its axes, the points that a choice makes, and every refusal with its place and remedy."""

from __future__ import annotations

import itertools
import json
from fractions import Fraction
from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.expressions import format_number
from jobs.job import Job, load_job
from jobs.search import Axis, Budget, Constraint, Objective, SearchedRecipe, Space
from jobs.yaml_nodes import yaml_text

PARENTS = {"a": "pa", "b": "pb", "c": "pc"}
RULER = {"ruler": {"tasks": ["niah_single_1"], "lengths": [256, 512], "items": 6}}
TWO: list[dict[str, Any]] = [
    {"model": "a", "parameters": {"weight": "${w}"}},
    {"model": "b", "parameters": {"weight": "${1 - w}"}},
]


def text_of(
    over: dict[str, Any],
    models: list[dict[str, Any]] = TWO,
    search: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
    **keys: Any,
) -> str:
    named = {str(entry["model"]) for entry in models}
    unused = not any("$" in name for name in named)
    job: dict[str, Any] = {
        "name": "s",
        "parents": {name: url for name, url in PARENTS.items() if name in named or not unused},
        "recipe": {"merge_method": "linear", "models": models, **(recipe or {})},
        "search": {"over": over, "budget": {"points": 9}, **(search or {})},
        "evaluate": RULER,
        "output": "runs",
        **keys,
    }
    return "".join(f"{key}: {json.dumps(value)}\n" for key, value in job.items() if value is not None)


def job_of(*arguments: Any, **keys: Any) -> Job:
    return load_job(text_of(*arguments, **keys), "job.yaml")


W = {"w": {"from": 0, "to": 1, "step": 0.01}}


def test_a_choice_binds_the_recipe_exactly() -> None:
    job = job_of(W)
    assert job.search is not None and job.searched is not None
    point = job.searched.point((30,))
    assert point.name == "w=0.3"
    assert [source.parameters["weight"] for source in point.recipe.models] == [Fraction(3, 10), Fraction(7, 10)]


def test_the_space_is_never_listed() -> None:
    axes = {f"x{number}": {"from": 0, "to": 1, "step": 0.001} for number in range(8)}
    models = [{"model": "a", "parameters": {"weight": f"${{{' + '.join(axes)}}}"}}, {"model": "b"}]
    job = job_of(axes, models)
    assert job.search is not None and job.search.space.size == 1001**8
    assert len(job.points) == 1


def test_knots_are_a_gradient_along_the_depth() -> None:
    models = [
        {"model": "a", "parameters": {"weight": "${layers}"}},
        {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": "${1 - layers}"}, {"value": 0.5}]}},
    ]
    job = job_of({"layers": {"knots": 3, "from": 0, "to": 1, "step": 0.5}}, models)
    assert job.search is not None and job.searched is not None
    assert [axis.name for axis in job.search.space.axes] == ["layers.0", "layers.1", "layers.2"]
    point = job.searched.point((0, 1, 2))
    assert point.name == "layers=0,0.5,1"
    assert point.recipe.document()["models"] == [
        {"model": "a", "parameters": {"weight": [0, 0.5, 1]}},
        {"model": "b", "parameters": {"weight": [{"filter": "mlp", "value": [1, 0.5, 0]}, {"value": 0.5}]}},
    ]


def test_one_knot_can_be_named() -> None:
    models = [{"model": "a", "parameters": {"weight": "${k.0 + k.1}"}}, {"model": "b"}]
    job = job_of({"k": {"knots": 2, "from": 0, "to": 1, "step": 0.5}}, models)
    assert job.searched is not None
    assert job.searched.point((1, 2)).recipe.models[0].parameters["weight"] == Fraction(3, 2)


def test_a_subset_is_the_models_that_go_in() -> None:
    models = [{"model": "${soup}", "parameters": {"weight": 0.5}}]
    job = job_of({"soup": {"subset": ["a", "b", "c"]}}, models)
    assert job.search is not None and job.searched is not None
    point = job.searched.point((1, 0, 1))
    assert (point.name, point.parents()) == ("soup=a+c", ("a", "c"))
    assert {each.parents() for each in job.points} == {
        ("a",), ("b",), ("c",), ("a", "b"), ("a", "c"), ("b", "c"), ("a", "b", "c")
    }  # fmt: skip
    assert job.search.space.size == 7 and not job.search.space.admits((0, 0, 0))


def test_the_weights_of_a_simplex_sum_to_one() -> None:
    models = [
        {"model": name, "parameters": {"weight": f"${{{axis}}}"}} for name, axis in zip("abc", "xyz", strict=True)
    ]
    job = job_of({"simplex": {"axes": ["x", "y", "z"], "step": 0.05}}, models)
    assert job.search is not None
    space = job.search.space
    assert (space.size, space.simplexes) == (231, (("x", "y", "z"),))
    assert space.admits((20, 0, 0)) and space.admits(space.middle()) and not space.admits((10, 10, 10))
    admitted = [(i, j, k) for i in range(21) for j in range(21) for k in range(21) if space.admits((i, j, k))]
    assert len(admitted) == 231


def test_words_and_checkpoints_make_one_point_of_each_kind() -> None:
    models = [
        {"model": "step[${step}]", "parameters": {"weight": "${w}"}},
        {"model": "a", "parameters": {"weight": 1}},
    ]
    job = job_of(
        {**W, "step": [0, 1, 2], "method": ["linear", "ties"]},
        models,
        recipe={"merge_method": "${method}", "base_model": "a"},
        parents={"a": "pa", "step": {"url": "p/{n}", "n": [10, 20, 30]}},
    )
    kinds = {(point.recipe.merge_method, point.parents()) for point in job.points}
    assert kinds == {(method, (f"step-{n}", "a")) for method in ("linear", "ties") for n in (10, 20, 30)}


def test_the_first_points_are_those_of_start() -> None:
    over = {**W, "k": {"knots": 2, "from": 0, "to": 1, "step": 0.5}, "method": ["linear", "ties"]}
    models = [{"model": "a", "parameters": {"weight": "${w}"}}, {"model": "b", "parameters": {"weight": "${k}"}}]
    start = [{"w": 0}, {"w": 0.5, "k": [0, 1], "method": "ties"}, {"k": 1}]
    job = job_of(over, models, {"start": start}, {"merge_method": "${method}", "base_model": "b"})
    assert job.search is not None
    assert job.search.start == ((0, 1, 1, 0), (50, 0, 2, 1), (50, 2, 2, 0))


def test_figures_constraints_and_budgets_are_read() -> None:
    search = {
        "maximize": ["score@512", "-output_tokens"],
        "at_least": {"ruler": {"of": "b", "margin": 2}},
        "budget": {"tokens": "300M", "hours": 2},
    }
    spec = job_of(W, search=search).search
    assert spec is not None
    assert spec.maximize == (Objective("score@512"), Objective("output_tokens", -1))
    assert spec.at_least == (Constraint("ruler", "b", 2.0),)
    assert spec.budget == Budget(tokens=300_000_000, hours=2.0)


def test_a_job_reads_back_as_the_same_and_its_digest_covers_recipe_and_search() -> None:
    job = job_of(
        {**W, "third": {"from": 0, "to": 1, "num": 4}}, [*TWO[:1], {"model": "b", "parameters": {"weight": "${third}"}}]
    )
    again = load_job(yaml_text(job.document()), "job.yaml")
    assert again == job and again.digest() == job.digest()
    others = [
        job_of(W),
        job_of(W, search={"batch": 4}),
        job_of({"w": {"from": 0, "to": 1, "step": 0.02}}),
        job_of(W, [TWO[0], {"model": "b", "parameters": {"weight": "${(1 - w) * 2}"}}]),
        job_of(W, point="p{w}"),
    ]
    assert len({each.digest() for each in others}) == len(others)


def test_names_of_different_points_differ() -> None:
    job = job_of(W, point="{w*0}x{w}")
    assert job.searched is not None
    assert [job.searched.point((index,)).name for index in (3, 4)] == ["0x0.03", "0x0.04"]
    rounded = job_of(W, point="p{w/3}")
    assert rounded.searched is not None
    names = [rounded.searched.point((index,)).name for index in range(101)]
    assert len({*names}) == 101 and names[1] == f"p{format_number(Fraction(1, 300))}"


def test_only_points_that_are_made_take_names() -> None:
    """1/2 and 1/2 + 1/2 · 0 have one name; the first point with it has it alone."""
    over = {axis: {"from": 0, "to": 1, "step": 0.5} for axis in ("a", "b")}
    models = [{"model": name, "parameters": {"weight": f"${{{axis}}}"}} for name, axis in (("a", "a"), ("b", "b"))]

    def recipe() -> SearchedRecipe:
        job = job_of(over, models, point="p{a+b}")
        assert job.searched is not None
        return job.searched

    searched = recipe()
    searched.unnamed((0, 1))
    assert searched.point((1, 0)).name == "p0.5"
    second = searched.point((0, 1)).name
    assert second.startswith("point-")
    resumed = recipe()
    assert resumed.named((0, 1), second) and resumed.named((1, 0), "p0.5")
    assert (resumed.point((0, 1)).name, resumed.point((1, 0)).name) == (second, "p0.5")
    assert not resumed.named((0, 1), "p0.5") and not resumed.named((0, 2), "p0.5") and not resumed.named((0, 0), "a")


@pytest.mark.parametrize(
    ("over", "keys", "error"),
    [
        (W, {"grid": {"w": [1]}}, "7: `grid:` and `search:` exclude each other; take one out"),
        (W, {"evaluate": None}, "4: a search needs the scores of its points; add `evaluate:`"),
        (W, {"keep": "all"}, "7: the points of a search are not written, only its best; give `keep: {best: 1}`"),
        (W, {"engine": {"name": "openai", "url": "http://x"}}, "7: a server serves one model"),
        (W, {"gate": {"baseline": "w=0.5"}}, '7: the gate of a search has a parent as its baseline; choose from a, b'),
        ({**W, "v": [1, 2]}, {}, '4: the axis "v" is used nowhere in the recipe; write ${v} there'),
        ({"v": [1, 2]}, {}, '3: unknown axis "w"; choose from v'),
        ({}, {}, "4: the search has no axis; give it one under `over:`"),
        ({"w": [1, "x"]}, {}, '4: the axis "w" must hold numbers alone or words alone; put numbers in quotes'),
        ({"w": 3}, {}, '4: the axis "w" must be a list, {from, to, step}'),
        ({"w": {"from": 0, "to": 1, "step": 1e-6}}, {}, '4: the axis "w" has 1000001 values; at most 100000'),
        ({"w": {"knots": 1, "from": 0, "to": 1, "num": 2}}, {}, "4: "),
        ({"w": {"subset": ["a"]}}, {}, "4: a subset needs two or more different models"),
        (W, {"point": "p"}, "7: points that differ in w alone would have one name; write {w} there"),
        (W, {"point": "p{v}{w}"}, '7: unknown axis "v"'),
        (W, {"search": {"budget": {}}}, "4: a search needs an end; give `budget: {points: 60}`, or tokens, or hours"),
        (W, {"search": {"budget": {"tokens": "many"}}}, '4: "search.budget.tokens" must be a number of tokens'),
        (W, {"search": {"batch": 1000}}, "4: at most 256 points a batch, not 1000; take fewer"),
        (W, {"search": {"maximize": "scor"}}, '4: "scor" is not a figure of a point; did you mean "score"?'),
        (W, {"search": {"maximize": ["score", "-score"]}}, "4: a figure is listed twice; keep one"),
        (W, {"search": {"maximize": "needle"}}, '4: "needle" is not asked; add `needle:` under `evaluate:`'),
        (W, {"search": {"maximize": "score@300"}}, "4: nothing is asked at 300 tokens; choose from 256, 512"),
        (W, {"search": {"at_least": {"score": {"of": "d"}}}}, '4: "d" is not a parent; choose from a, b'),
        (W, {"search": {"at_least": {"score": {"of": "a", "margin": 100}}}}, "4: a margin is a number of points"),
        (W, {"search": {"start": [{"w": 0.505}]}}, "4: 0.505 is not a value of w; the nearest is 0.5"),
        (W, {"search": {"start": [{"w": 0}, {"w": 0}]}}, "4: this point is in `start:` already; take it out"),
        (W, {"search": {"start": [{"w": w / 100} for w in range(9)]}}, "4: `start:` has 9 points, and the first"),
        (W, {"search": {"start": [{"w": 0}, {"w": 1}], "budget": {"points": 1}}}, "4: `start:` has 2 points, and the"),
        (W, {"search": {"budget": {"tokens": "9" * 5000}}}, '4: "search.budget.tokens" must be a number of tokens'),
        (
            {**W, "method": ["linear", "ties"]},
            {"search": {"by": "cma-es"}},
            '4: cma-es draws numbers, and "method" has words; take gp or sobol, or take the axis out',
        ),
        (W, {"search": {"by": "greedy"}}, "4: greedy decides over one subset; give one alone, as `soup: {subset: "),
        (
            {**W, "soup": {"subset": ["a", "b"]}},
            {"search": {"by": "greedy"}},
            '4: greedy decides over one subset, and nothing else; take "w" out',
        ),
        (
            {"w": {"subset": ["a", "b"]}},
            {"search": {"by": "greedy", "maximize": "-score"}},
            "4: greedy maximises one score; name one, such as score",
        ),
        (
            {"w": {"subset": ["a", "b"]}},
            {"search": {"by": "greedy", "start": [{"w": ["a"]}]}},
            "4: greedy begins with each model alone, and keeps no constraint; take `start:` out",
        ),
        (
            {"w": {"subset": ["a", "b", "c"]}},
            {"search": {"by": "greedy", "budget": {"points": 3}}},
            "4: greedy asks 3 models alone and then soups, and the budget has 3 points; give 5",
        ),
        (W, {"search": {"start": [{}]}}, "4: a point of `start:` names no axis; give a value as `w: …`, or take"),
        (W, {"search": {"at_least": {}}}, "4: `at_least:` names no figure; give one as"),
        (
            W,
            {"search": {"at_least": {"ruler@256": {"of": "a"}, "ruler@0256": {"of": "a"}}}},
            '4: "ruler@256" is constrained twice; keep one',
        ),
        (W, {"search": {"at_least": {"output_tokens": {"of": "a"}}}}, "4: a constraint holds a score; name"),
        (W, {"evaluate": {**RULER, "guards": {"tasks": ["gsm8k"], "margin": 3}}}, "4: guards are not asked in a"),
        (W, {"search": {"by": "tpe"}}, '4: "search.by" '),
    ],
)  # fmt: skip
def test_a_refusal_names_place_and_remedy(over: dict[str, Any], keys: dict[str, Any], error: str) -> None:
    with pytest.raises(BadInput) as refused:
        job_of(over, **keys)
    said = str(refused.value)
    assert "\n" not in said and said.startswith(f"job.yaml:{error}"), said


@pytest.mark.parametrize("key", ["maximize: needle", "at_least: {score@300: {of: a}}"])
def test_a_figure_that_is_not_asked_is_named_with_its_line(key: str) -> None:
    text = text_of(W).replace('"budget"', '"by": "auto",\n  "budget"').replace('"by": "auto"', key)
    with pytest.raises(BadInput, match=r"^job\.yaml:4: .* asked"):
        load_job(text, "job.yaml")
    text = text.replace(key, f"\n {key}")
    with pytest.raises(BadInput, match=r"^job\.yaml:5: .* asked"):
        load_job(text, "job.yaml")


def test_too_many_kinds_are_refused() -> None:
    words = {f"m{number}": ["linear", "ties", "slerp"] for number in range(6)}
    recipe = {"merge_method": "${m0}${m1}${m2}${m3}${m4}${m5}"}
    with pytest.raises(BadInput, match="make 729 kinds of merges; at most 256, take some of them out"):
        job_of({**W, **words}, recipe=recipe)


def test_choices_of_a_group_are_those_that_the_space_admits() -> None:
    axes = (*(axis(name, 5) for name in "xy"), axis("w", 3), *(axis(f"soup.{name}", 2) for name in "abc"), axis("z", 5))
    space = Space(axes, simplexes=(("x", "y", "z"),), subsets={"soup": ("soup.a", "soup.b", "soup.c")})
    ranges = [range(len(axis.values)) for axis in space.axes]
    admitted = [choice for choice in itertools.product(*ranges) if space.admits(choice)]
    names = [each.name for each in axes]
    order = [names.index(name) for group in space.groups for name in group]
    assert names[order[2]] == "z", "behind its simplex"
    made = [tuple(itertools.chain(*parts)) for parts in itertools.product(*map(space.choices, space.groups))]
    assert made == sorted(tuple(choice[place] for place in order) for choice in admitted)
    assert len(made) == space.size == 15 * 3 * 7


def axis(name: str, values: int) -> Axis:
    return Axis(name, tuple(Fraction(value, values - 1) for value in range(values)), "numbers", "job.yaml:1")
