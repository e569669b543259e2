"""Words for people."""

from __future__ import annotations

import pytest

from jobs.errors import printable
from orchestrator.words import code, print_rows, shortened

LONG = [f"merge_linear_cos{tenths / 10:g}fmt{1 - tenths / 10:g}_MRL4096_ROLLOUT4_LR1e-6" for tenths in range(11)]


def test_the_parts_that_all_long_names_share_are_left_out() -> None:
    cut = shortened([*LONG, "cos (parent)"], 26)
    assert cut[:2] == ["…cos0fmt1…", "…cos0.1fmt0.9…"] and cut[-1] == "cos (parent)"
    assert len({*cut}) == 12 and max(map(len, cut)) <= 26
    rows = [f"long=0.1, fmt=0.9, density={density}, method=ties" for density in ("0.5", "0.7")]
    assert shortened(rows, 26) == ["…density=0.5…", "…density=0.7…"]


def test_names_that_fit_stay_and_the_middle_of_others_goes() -> None:
    assert shortened(["w0.1", "w0.2"], 4) == ["w0.1", "w0.2"]
    assert shortened(["abcdefghijk"], 5) == ["ab…jk"]
    assert shortened([], 5) == []


@pytest.mark.parametrize("most", [1, 8, 26])
def test_different_names_stay_different(most: int) -> None:
    for names in (LONG, ["abcdefghijk", "abcdeXghijk"], ["a_", "a_b", "a_c"], ["x" * 40 + "1" + "y" * 40, "x" * 80]):
        assert len({*shortened(names, most)}) == len(names)
    assert len({*shortened(["same-name", "same-name"], most)}) == 1


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("größe 模型", "größe 模型"),
        ("\x1b[2J\r\n\t", r"\x1b[2J\r\n\t"),
        ("a\u202eb\u200b", r"a\u202eb\u200b"),
        ("\x9b31m\ud800", r"\x9b31m\ud800"),
    ],
)
def test_a_terminal_gets_no_character_to_obey(text: str, shown: str, capsys: pytest.CaptureFixture[str]):
    assert printable(text) == shown
    print_rows([("note", text)])
    assert capsys.readouterr().out == f"  note  {shown}\n"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a_b*c", "`a_b*c`"),
        ("<b>", "`<b>`"),
        ("a|b", r"`a\x7cb`"),
        ("a\nb", r"`a\nb`"),
        ("`", "`` ` ``"),
        ("a``b", "``` a``b ```"),
        (" ", "–"),
        ("", "–"),
    ],
)
def test_a_span_of_code_holds_any_text(text: str, shown: str):
    assert code(text) == shown
