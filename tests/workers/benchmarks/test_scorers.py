from __future__ import annotations

import random

import pytest

from jobs.errors import BadInput
from workers.benchmarks import scorers
from workers.benchmarks.scorers import SCORERS, postprocess, score

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
        ("exact", "yes", [" Yes. "], 1.0),
        ("exact", "It is 7.", ["it is 7."], 1.0),
        ("exact", "a\tb", ["a\tb"], 1.0),
    ],
)
def test_scores_are_those_of_ruler(scorer: str, prediction: str, references: list[str], expected: float) -> None:
    assert SCORERS[scorer](prediction, references) == pytest.approx(expected)


def test_predictions_are_cleaned_as_ruler_cleans_them() -> None:
    assert postprocess("  \x01 a\x07b\tc \x02 ") == "a\nb\nc"
    assert postprocess(" \x00 \n") == ""


@pytest.mark.parametrize(
    ("scorer", "prediction", "references", "expected"),
    [
        ("regex", "It is 42 km.", [r"\b4\d km"], 1.0),
        ("regex", "It is 142 km.", [r"\b4\d km"], 0.0),
        # SQuAD: {cat, sat} of {cat, sat, down} and {cat, sat}: precision 2/3, recall 1
        ("f1", "The cat, sat down!", ["a cat sat", "dog"], 0.8),
        ("f1", "the", ["a"], 1.0),
        ("f1", "", ["cat"], 0.0),
        # the longest common subsequence of "police killed the gunman" and "police kill the gunman" (Lin 2004) has three
        ("rouge_l", "police kill the gunman", ["police killed the gunman"], 0.75),
        ("rouge_l", "the gunman kill police", ["police killed the gunman"], 0.5),
        ("rouge_l", "", ["police"], 0.0),
        ("json_field:city", '```json\n{"city": "Paris", "n": 2}\n```', ["paris", "Lutetia"], 1.0),
        ("json_field:city", '{not JSON} then {"city": "Rome"}', ["Paris"], 0.0),
        ("json_field:place.n", 'So: {"place": {"n": 2.0}}', ["2"], 1.0),
        ("json_field:ok", '{"ok": true}', ["true"], 1.0),
        ("json_field:city", "Paris", ["Paris"], 0.0),
        # difflib: twice the characters of the matching blocks, over all characters
        ("after:xyz", "\nxyzabcd", ["xyzbcde"], 0.75),
        ("after:xyz", "abcd", ["xyzabcd"], 0.0),
    ],
)
def test_other_scores_by_arithmetic(scorer: str, prediction: str, references: list[str], expected: float) -> None:
    assert score(scorer, prediction, references) == pytest.approx(expected)


def test_rouge_l_is_that_of_the_package() -> None:
    peer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    draw = random.Random(0)
    for _ in range(200):
        left, right = (
            " ".join(draw.choices(["The", "cat", "sat-on", "9", "é", "."], k=draw.randrange(12))) for _ in "ab"
        )
        assert score("rouge_l", left, [right]) == pytest.approx(peer.score(right, left)["rougeL"].fmeasure)


def test_a_pattern_that_tries_exponentially_many_ways_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scorers, "PATTERN_SECONDS", 0.05)
    with pytest.raises(BadInput, match=r'the pattern "\^\(a\|aa\)\+\$" takes more than 0.05 seconds'):
        scorers.found_patterns("a" * 60 + "b", ["^(a|aa)+$"])
    assert scorers.found_patterns("a" * 60 + "b", ["^a+b$"]) == 1, "the remedy"
