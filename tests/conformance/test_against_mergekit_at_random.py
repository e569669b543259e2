"""Documents drawn at random, through mergekit 0.1.5, the formulas and mergeyard. `make conformance` draws more."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conformance import cases, tally
from tests.conformance.conftest import Ours, drawn_documents
from tests.conformance.generated import in_bf16
from tests.conformance.oracle import Answer
from tests.conformance.verdicts import (
    against_formulas,
    assert_as_mergekit,
    assert_follows_formulas,
    assert_within_one_ulp,
)

pytestmark = pytest.mark.oracle


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    drawn = cases.ours(drawn_documents(metafunc.config))
    metafunc.parametrize(("name", "text"), drawn.items(), ids=drawn)


def test_mergekit_in_float32_and_a_merge_follow_the_formulas_and_each_other(
    name: str, text: str, ours: Ours, mergekit: Mapping[str, Answer], parents: Path, counting: bool
) -> None:
    print(text)
    document = cases.parsed(text, parents)
    assert mergekit[name].error is None
    assert_follows_formulas(mergekit[name].folder, document)
    assert_follows_formulas(ours(text), document)
    if counting:
        tally.add(document["merge_method"], "formula", against_formulas(ours(text), document))
    tally.add(document["merge_method"], "float32", assert_within_one_ulp(ours(text), mergekit[name].folder, document))


def test_a_merge_repeats_mergekit_in_bf16(
    name: str, text: str, ours: Ours, mergekit: Mapping[str, Answer], parents: Path
) -> None:
    narrow = in_bf16(text)
    print(narrow)
    document, answer = cases.parsed(narrow, parents), mergekit[f"bit exact {name}"]
    assert answer.error is None
    tally.add(document["merge_method"], "bf16", assert_as_mergekit(ours(narrow, "mergekit"), answer.folder, document))
