from __future__ import annotations

import pytest

from workers.benchmarks.scorers import SCORERS, postprocess

TEN = ["10th century", "the 10th century AD", "in the 10th and 11th centuries"]


@pytest.mark.parametrize(
    ("scorer", "prediction", "references", "expected"),
    [
        ("all", " 4815162.", ["4815162"], 1.0),
        ("all", "4815163", ["4815162"], 0.0),
        ("all", "AAAAA, ccccc and BBBBB", ["AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE"], 0.6),
        ("all", "1. Apple 2. pear", ["apple", "PEAR", "plum", "fig"], 0.5),
        ("all", "", ["x"], 0.0),
        # lm-eval gives 1/3 here: it takes the mean over aliases where RULER takes the best of them
        ("part", "It was the 10th century.", TEN, 1.0),
        ("part", "In the 10th and 11th CENTURIES", TEN, 1.0),
        ("part", "the 11th century", TEN, 0.0),
        ("part", "two\x00lines", ["two\nlines"], 1.0),
        ("exact", " 4815162.\n", ["4815162"], 1.0),
        ("exact", "it is 4815162", ["4815162"], 0.0),
        ("exact", "The 10th Century AD", TEN, 1.0),
    ],
)
def test_scores_are_those_of_ruler(scorer: str, prediction: str, references: list[str], expected: float) -> None:
    assert SCORERS[scorer](prediction, references) == pytest.approx(expected)


def test_predictions_are_cleaned_as_ruler_cleans_them() -> None:
    assert postprocess("  \x01 a\x07b\tc \x02 ") == "a\nb\nc"
    assert postprocess(" \x00 \n") == ""
