"""Expressions are arithmetic, exact and bounded, and nothing else."""

from __future__ import annotations

from contextlib import suppress
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import BadInput
from jobs.expressions import evaluate, format_number, names, render, template
from tests.growth import growth

W = {"w": Fraction(7, 10), "lambda": Fraction(2), "method": "ties", "n_2": Fraction(-3)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1 - w", Fraction(3, 10)),
        ("w", Fraction(7, 10)),
        ("0.1 + 0.2", Fraction(3, 10)),
        ("2 ** -2", Fraction(1, 4)),
        ("-2 ** 2", Fraction(-4)),
        ("2 ** 3 ** 2", Fraction(512)),
        ("1 - 2 - 3", Fraction(-4)),
        ("8 / 4 / 2", Fraction(1)),
        ("2 * (w + 1)", Fraction(17, 5)),
        ("- - 3", Fraction(3)),
        ("+w", Fraction(7, 10)),
        ("1e-6 * 2E6", Fraction(2)),
        (".5 + 3.", Fraction(7, 2)),
        ("lambda / 4", Fraction(1, 2)),
        ("n_2*n_2", Fraction(9)),
        ("  w  ", Fraction(7, 10)),
        ("method", "ties"),
        ("1/3 + 1/3 + 1/3", Fraction(1)),
    ],
)
def test_arithmetic_is_exact(text: str, expected: Fraction | str) -> None:
    assert evaluate(text, W, "job.yaml:6") == expected


@st.composite
def expressions(draw: Any, depth: int = 3) -> str:
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(["a", "b", "1", "0.5", "2.25", "10"]))
    left, right = draw(expressions(depth=depth - 1)), draw(expressions(depth=depth - 1))
    shape = draw(st.sampled_from(["{} + {}", "{} - {}", "{} * {}", "{}*{}", "({}) - ({})", "({} - {})", "-{} + {}"]))
    return shape.format(left, right)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(expressions())
def test_agrees_with_python_on_the_same_text(text: str) -> None:
    # every number here is exact in binary, so Python's own floats are an exact oracle
    bindings = {"a": Fraction(3, 4), "b": Fraction(-5, 2)}
    assert evaluate(text, bindings, "here") == Fraction(eval(text, {}, {"a": 0.75, "b": -2.5}))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("v", 'unknown axis "v"'),
        ("1 - wieght", 'unknown axis "wieght"'),
        ("1 / 0", "division by zero"),
        ("0 ** -1", "division by zero"),
        ("1 / (w - 0.7)", "division by zero"),
        ("2 ** 0.5", "an exponent must be a whole number from -64 to 64"),
        ("2 ** 65", "an exponent must be"),
        ("((9 ** 64) ** 64) ** 64", "a number grows out of range"),
        ("1e301", '"1e301" is out of range'),
        ("1e300 * 1e300", "a number grows out of range"),
        ("method + 1", '"method" stands for the text "ties"'),
        ("", "an operand is missing"),
        ("1 +", "an operand is missing"),
        ("* 2", '"*" is not expected'),
        ("w w", '"w" is not expected'),
        ("2w", '"2" is not arithmetic'),
        ("(w", "a bracket is not closed"),
        ("w)", '")" is not expected'),
        ("max(w, 1)", '"," is not arithmetic'),
        ("w(1)", '"(" is not expected'),
        ("w.real", 'unknown axis "w.real"'),
        ("w.", '"." is not arithmetic'),
        ("w < 1", '"<" is not arithmetic'),
        ("__import__('os')", '"\'" is not arithmetic'),
        ("w // 2", '"/" is not expected'),
        ("1_000", '"1" is not arithmetic'),
        ("0x10", '"0" is not arithmetic'),
        ("1j", '"1" is not arithmetic'),
        ("٣", '"٣" is not arithmetic'),
        ("(" * 60 + "1" + ")" * 60, "nested more than 20 deep"),
        ("-" * 100 + "1", "nested more than 20 deep"),
        ("1" + "+1" * 100, "more than 200 characters"),
        ("w\n:1", '":" is not arithmetic'),
    ],
)
def test_anything_else_is_refused_with_its_place(text: str, message: str) -> None:
    with pytest.raises(BadInput) as caught:
        evaluate(text, W, "job.yaml:6")
    assert str(caught.value).startswith(f"job.yaml:6: {message}")
    assert "\n" not in str(caught.value)


def test_unknown_axis_offers_the_nearest() -> None:
    with pytest.raises(BadInput, match=r'unknown axis "densty"; did you mean "density"\? in "1 - densty"'):
        evaluate("1 - densty", {"density": Fraction(1), "w": Fraction(1)}, "job.yaml:6")


def test_an_expression_of_200_characters_costs_little_whatever_it_says() -> None:
    """Without a bound of the powers, the tower has 64¹⁷ digits."""
    texts = {0: "+".join(["9*64"] * 40), 1: "(" * 17 + "9**64" + ")**64" * 17 + "*9**64" * 15}
    assert all(190 < len(text) <= 200 for text in texts.values())

    def computed(which: int) -> None:
        for _ in range(20):
            with suppress(BadInput):
                evaluate(texts[which], {}, "here")

    with pytest.raises(BadInput, match="out of range"):
        evaluate(texts[1], {}, "here")
    assert growth(computed, 0, 1, at_most=30) <= 30


def test_names_are_the_axes_and_not_the_numbers() -> None:
    assert names("1e5 * (w - lambda) ** 2 / w") == {"w", "lambda"}


@settings(max_examples=500, deadline=None, derandomize=True)
@given(st.text("0123456789.eE+-*/() w_\n\\x", max_size=60) | st.text(max_size=40))
def test_no_text_does_worse_than_bad_input(text: str) -> None:
    try:
        assert isinstance(evaluate(text, W, "here"), Fraction | str)
    except BadInput as error:
        assert str(error).startswith("here: ")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("${w}", Fraction(7, 10)),
        ("${method}", "ties"),
        ("dare_${method}", "dare_ties"),
        ("a${w}b${1 - w}", "a0.7b0.3"),
    ],
)
def test_exactly_one_placeholder_gives_the_value_itself(value: str, expected: Fraction | str) -> None:
    parsed = template(value, "job.yaml:6")
    assert parsed is not None and parsed.bind(W) == expected


@pytest.mark.parametrize("value", ["plain", "$w {w}"])
def test_what_has_no_placeholder_is_no_template(value: str) -> None:
    assert template(value, "job.yaml:6") is None


@pytest.mark.parametrize("value", ["${w", "${}", "a${w}b${", "${{w}}", "${w{}", "${w}" * 101])
def test_broken_placeholders_are_refused(value: str) -> None:
    with pytest.raises(BadInput, match=r"^job\.yaml:6: "):
        template(value, "job.yaml:6")


def test_point_names_are_written_as_a_person_would() -> None:
    seed = "merge_linear_cos{w}fmt{1-w}_MRL4096_ROLLOUT4_LR1e-6"
    assert render(seed, W, "here") == "merge_linear_cos0.7fmt0.3_MRL4096_ROLLOUT4_LR1e-6"
    assert render("${method}-l{lambda}", W, "here") == "ties-l2"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (Fraction(7, 10), "0.7"),
        (Fraction(1), "1"),
        (Fraction(0), "0"),
        (Fraction(-5, 2), "-2.5"),
        (Fraction(-1, 2), "-0.5"),
        (Fraction(1, 3), "0.3333"),
        (Fraction(2, 3), "0.6667"),
        (Fraction(-2, 3), "-0.6667"),
        (Fraction(1, 30), "0.03333"),
        (Fraction(100, 3), "33.33"),
        (Fraction(10**6, 3), "333300"),
        (Fraction(99999, 100001), "1"),
        (Fraction(1, 10**6), "0.000001"),
        (Fraction(1, 10**12), "0.000000000001"),
        (Fraction(1, 3 * 10**6), "0.0000003333"),
        (Fraction(1, 10**13), "0.0000000000001"),
        (Fraction(123456789), "123456789"),
        (Fraction(1, 8), "0.125"),
    ],
)
def test_format_number(number: Fraction, text: str) -> None:
    assert format_number(number) == text


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=10**6))
def test_format_number_is_within_half_a_unit_of_its_last_digit(number: Fraction) -> None:
    error = abs(Fraction(format_number(number)) - number)
    assert error <= abs(number) / 1000
    if 10**12 % number.denominator == 0:
        assert error == 0
