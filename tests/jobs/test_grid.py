"""A grid gives every point once, in a stable order, under a name that can be a folder."""

from __future__ import annotations

from fractions import Fraction
from math import comb

import pytest

from jobs.errors import BadInput
from jobs.expressions import name_template
from jobs.grid import Point, expand, parse_grid
from jobs.stages import stages_template
from jobs.yaml_nodes import load_document


def points(grid: str, *, axes: str = "w", point: str | None = None) -> tuple[Point, ...]:
    """The points of a grid whose recipe uses `axes` as parameters."""
    parameters = ", ".join(f'{axis}: "${{{axis}}}"' for axis in axes.split())
    recipe = load_document(f"merge_method: x\nmodels: [{{model: a}}]\nparameters: {{{parameters}}}\n", "recipe.yml")
    naming = None if point is None else name_template(point, "job.yaml:9")
    return expand(stages_template(recipe), parse_grid(load_document(grid, "job.yaml"), "job.yaml:1"), naming)


def values(grid: str, *, axes: str = "w") -> list[tuple[Fraction | str, ...]]:
    return [tuple(point.bindings.values()) for point in points(grid, axes=axes)]


def refusal(grid: str, *, axes: str = "w", point: str | None = None) -> str:
    with pytest.raises(BadInput) as caught:
        points(grid, axes=axes, point=point)
    return str(caught.value)


@pytest.mark.parametrize(
    ("axis", "expected"),
    [
        ("{from: 0.0, to: 1.0, step: 0.1}", [Fraction(n, 10) for n in range(11)]),
        ("{from: 1, to: 0, step: -0.25}", [Fraction(4 - n, 4) for n in range(5)]),
        ("{from: 0, to: 1, num: 4}", [Fraction(0), Fraction(1, 3), Fraction(2, 3), Fraction(1)]),
        ("{from: 1, to: -1, num: 3}", [Fraction(1), Fraction(0), Fraction(-1)]),
        ("{from: 2, to: 2, num: 1}", [Fraction(2)]),
        ("{from: 2, to: 2, step: 1}", [Fraction(2)]),
        ("[0.7, 1e-3, -2]", [Fraction(7, 10), Fraction(1, 1000), Fraction(-2)]),
        ("[ties, linear, 3]", ["ties", "linear", Fraction(3)]),
    ],
)
def test_an_axis_holds_its_values_exactly_both_ends_included(axis: str, expected: list[Fraction | str]) -> None:
    assert values(f"w: {axis}") == [(value,) for value in expected]


def test_axes_multiply_in_document_order_the_last_one_fastest() -> None:
    assert [point.name for point in points("b: [1, 2]\na: [x, y]", axes="a b")] == [
        "b1_a=x",
        "b1_a=y",
        "b2_a=x",
        "b2_a=y",
    ]


@pytest.mark.parametrize(("size", "parts"), [(2, 10), (3, 4), (4, 5)])
def test_a_simplex_holds_every_weighting_once(size: int, parts: int) -> None:
    names = "abcd"[:size]
    step = {10: "0.1", 4: "0.25", 5: "0.2"}[parts]
    rows = values(f"simplex: {{axes: [{', '.join(names)}], step: {step}}}", axes=" ".join(names))
    assert len(rows) == len(set(rows)) == comb(parts + size - 1, size - 1)
    assert all(sum(row) == 1 and min(row) >= 0 for row in rows)  # type: ignore[arg-type]


def test_a_simplex_multiplies_with_other_axes() -> None:
    grid = "l: [1, 2]\nsimplex: {axes: [a, b], step: 0.5}"
    assert [point.name for point in points(grid, axes="l a b")][:4] == [
        "l1_a1_b0",
        "l1_a0.5_b0.5",
        "l1_a0_b1",
        "l2_a1_b0",
    ]


def test_explicit_points_keep_their_order_and_their_names() -> None:
    listed = points("points: [{w: 0.9, name: heavy}, {w: 0.1}]")
    assert [(point.name, point.bindings) for point in listed] == [
        ("heavy", {"w": Fraction(9, 10)}),
        ("w0.1", {"w": Fraction(1, 10)}),
    ]


def test_points_carry_their_bound_recipe() -> None:
    assert [point.recipe.parameters for point in points("w: [0.1, x]")] == [{"w": Fraction(1, 10)}, {"w": "x"}]


@pytest.mark.parametrize(
    ("grid", "message"),
    [
        ("{}", "job.yaml:1: the grid has no axis"),
        ("w: []", 'job.yaml:1: "w" is an empty list'),
        ("w: 0.5", 'job.yaml:1: the axis "w" must be a list, or {from, to, step}'),
        ("w: {from: 0, to: 1, step: 0}", "job.yaml:1: a step cannot be 0"),
        ("w: {from: 0, to: 1, step: -0.1}", "job.yaml:1: steps of -0.1 lead away from `to`; turn the sign"),
        ("w: {from: 1, to: 0, step: 0.1}", "job.yaml:1: steps of 0.1 lead away from `to`"),
        ("w: {from: 0, to: 1, step: 0.3}", "job.yaml:1: steps of 0.3 from 0 miss 1; end at 0.9, or give `num`"),
        ("w: {from: 1, to: 0, step: -0.3}", "job.yaml:1: steps of -0.3 from 1 miss 0; end at 0.1, or give `num`"),
        ("w: {from: 0, to: 1}", "job.yaml:1: a range needs `step` or `num`, one of the two"),
        ("w: {from: 0, to: 1, step: 0.5, num: 3}", "job.yaml:1: a range needs `step` or `num`"),
        ("w: {from: 0, step: 1}", 'job.yaml:1: "w" needs the key "to"'),
        ("w: {from: 0, to: 1, num: 1}", "job.yaml:1: a range of one value needs `from` and `to` to be equal"),
        ("w: {from: 1, to: 1, num: 2}", "job.yaml:1: `from` and `to` are equal"),
        ("w: {from: 0, to: 1, num: 0}", 'job.yaml:1: "w.num" must be at least 1, not 0'),
        ("w: {from: 0, to: 1, num: 2.5}", 'job.yaml:1: "w.num" must be a whole number'),
        ("w: {from: 0, to: 1, num: 100001}", "job.yaml:1: this makes 100001 points; at most 100000"),
        ("w: {from: 0, to: 1, step: 1e-300}", "job.yaml:1: this makes far too many points"),
        ("w: {from: 0, to: 1, num: 1e300}", "job.yaml:1: this makes far too many points"),
        ("w: {form: 0, to: 1, num: 2}", 'job.yaml:1: unknown key "form"; did you mean "from"?'),
        ("w: [1, 2, 1.0]", 'job.yaml:1: the axis "w" holds w=1 twice'),
        ("w: [true]", "job.yaml:1: an axis holds numbers and words, not true or false"),
        ("w: [[1]]", "job.yaml:1: an axis holds numbers and words, not list"),
        ("1w: [1]", 'job.yaml:1: "1w" cannot name an axis'),
        ("name: [1]", 'job.yaml:1: an axis cannot be called "name"'),
        ("w: [1]\nu: [1, 2]", 'job.yaml:2: the axis "u" is used nowhere in the recipe; write ${u} there'),
        ("u: [1, 2]\n", 'job.yaml:1: the axis "u" is used nowhere'),
        (
            "w: [1]\nsimplex: {axes: [w, b], step: 0.5}",
            'job.yaml:2: the axis "w" is defined twice (first at job.yaml:1)',
        ),
        ("simplex: {axes: [w], step: 0.5}", "job.yaml:1: a simplex needs two or more different axes"),
        ("simplex: {axes: [w, w], step: 0.5}", "job.yaml:1: a simplex needs two or more different axes"),
        ("simplex: {axes: [w, v], step: 0.3}", "job.yaml:1: the step of a simplex must divide 1"),
        ("simplex: {axes: [w, v], step: -0.5}", "job.yaml:1: the step of a simplex must divide 1"),
        ("simplex: {axes: [w, v], step: 1e-300}", "job.yaml:1: this makes"),
        ("simplex: {axes: [w, a, b, c, d, e], step: 0.01}", "job.yaml:1: this makes"),
        ("simplex: {names: [w, v], step: 0.5}", 'job.yaml:1: unknown key "names"'),
        ("points: [{w: 1}]\nv: [1]", 'job.yaml:2: `points:` stands alone; take "v" out'),
        ("points: []", 'job.yaml:1: "points" is an empty list'),
        ("points:\n- {w: 1}\n- {v: 1}", 'job.yaml:3: unknown key "v"'),
        ("points:\n- {w: 1}\n- {name: x}", 'job.yaml:3: "points[1]" needs the key "w"'),
        ("points:\n- {w: 1}\n- {w: 1.0}", "the points w=1 and w=1 are both called"),
        ("points: [{w: 1, name: a/b}]", '"a/b" cannot name a point'),
    ],
)
def test_a_grid_that_cannot_be_meant_is_refused(grid: str, message: str) -> None:
    assert message in refusal(grid)


def test_a_grid_of_too_many_points_is_refused_before_it_is_built() -> None:
    axes = " ".join(f"a{index}" for index in range(8))
    grid = "\n".join(f"a{index}: {{from: 0, to: 1, num: 1000}}" for index in range(8))
    assert "far too many points; at most 100000" in refusal(grid, axes=axes)


def test_an_axis_that_nobody_defines_is_named_with_the_nearest() -> None:
    assert refusal("density: [1]", axes="densty") == (
        'job.yaml:1: the axis "density" is used nowhere in the recipe; write ${density} there'
    )
    assert refusal("w: [1]", axes="w wv") == 'recipe.yml:3: unknown axis "wv"; did you mean "w"?'
    assert refusal("w: [1]", point="x{v}") == 'job.yaml:9: unknown axis "v"; choose from w'


def test_two_points_of_one_name_are_both_told() -> None:
    message = refusal("w: [1, 2]\nv: [x, y]", axes="w v", point="merge-{v}")
    assert message.startswith('job.yaml:9: the points w=1, v=x and w=2, v=x are both called "merge-x"')


def test_a_default_name_has_the_last_part_of_a_path() -> None:
    found = points("m: [org/Qwen3-8B, s3://bucket/merges/a b/, plain]\nw: [0.5]", axes="m w")
    assert [point.name for point in found] == ["m=Qwen3-8B", "m=a-b", "m=plain"]
    assert [point.bindings["m"] for point in found] == ["org/Qwen3-8B", "s3://bucket/merges/a b/", "plain"]


def test_paths_that_end_alike_are_told_apart_by_the_names_that_the_refusal_asks_for() -> None:
    told = "name every axis in `point:`, or give each point its `name` under `grid: points:`"
    assert refusal("m: [a/x, b/x]", axes="m").endswith(told)
    found = points("points: [{m: a/x, name: ax}, {m: b/x, name: bx}]", axes="m")
    assert [point.name for point in found] == ["ax", "bx"]


def test_points_that_differ_only_after_rounding_are_refused() -> None:
    assert "are both called" in refusal("w: {from: 0.5, to: 0.50001, num: 4}")


@pytest.mark.parametrize("point", ["a b", "-{w}", "../{w}", "é{w}", "x" * 300, "a/{w}", ".{w}", "{method}"])
def test_a_name_that_cannot_be_a_folder_is_refused(point: str) -> None:
    message = refusal("w: [1]\nmethod: ['..']", axes="w method", point=point)
    assert message.startswith("job.yaml:9: ") and "cannot name a point" in message


def test_without_a_grid_there_is_one_point() -> None:
    recipe = stages_template(load_document("merge_method: x\nmodels: [{model: a}]\n", "r.yml"))
    assert [point.name for point in expand(recipe, parse_grid(None, "r.yml:1"), None)] == ["merge"]


def test_a_default_name_keeps_names_and_values_apart_and_leaves_out_what_does_not_vary() -> None:
    grid = "w1: [0, 0.5]\nw: [1]\nmethod: [ties, linear]"
    assert [point.name for point in points(grid, axes="w1 w method")] == [
        "w1=0_method=ties",
        "w1=0_method=linear",
        "w1=0.5_method=ties",
        "w1=0.5_method=linear",
    ]
    assert [point.name for point in points("w: [0.5]\nv: [1]", axes="w v")] == ["w0.5_v1"]
