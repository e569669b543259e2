"""mergekit, run in float32, against the formulas in float64: that the judge and the law agree before anyone is
judged."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.conformance import cases
from tests.conformance.oracle import Answer
from tests.conformance.verdicts import assert_follows_formulas

pytestmark = pytest.mark.oracle


@pytest.mark.parametrize("name", cases.CASES)
def test_mergekit_in_float32_follows_the_formulas(name: str, mergekit: Mapping[str, Answer], parents: Path) -> None:
    answer = mergekit[name]
    assert answer.error is None
    assert_follows_formulas(answer.folder, cases.parsed(cases.CASES[name], parents))
