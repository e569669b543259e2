"""Rows of two models as samples of paired differences."""

from __future__ import annotations

import pytest

from orchestrator.evaluating.pairing import pairs
from orchestrator.judging.estimates import macro_difference
from tests.orchestrator.scores import cell


@pytest.mark.parametrize(("benchmark", "losable"), [("ruler", True), ("lm_eval", True), ("perplexity", False)])
def test_the_benchmark_says_whether_an_answer_can_be_lost(benchmark: str, losable: bool) -> None:
    """Also where no score of the sample is 0 or 1."""
    old = cell("old", "0" if benchmark == "perplexity" else "rouge", 512, [0.3] * 24, benchmark=benchmark)
    new = cell("new", "0" if benchmark == "perplexity" else "rouge", 512, [0.31] * 24, benchmark=benchmark)
    (sample,) = pairs(new, old)
    assert sample.losable is losable
    assert (macro_difference([sample]).least_p > 0.7) is losable
