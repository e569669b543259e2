"""Rows of two models as samples of paired differences."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jobs.errors import BadInput
from jobs.evaluation_tasks import ScoreRow
from orchestrator.evaluating.pairing import check_counted, pairs, tokens_by_item, tokens_of
from orchestrator.judging.estimates import macro_difference
from tests.orchestrator.scores import cell, row


@pytest.mark.parametrize(("benchmark", "losable"), [("ruler", True), ("lm_eval", True), ("perplexity", False)])
def test_the_benchmark_says_whether_an_answer_can_be_lost(benchmark: str, losable: bool) -> None:
    """Also where no score of the sample is 0 or 1."""
    old = cell("old", "0" if benchmark == "perplexity" else "rouge", 512, [0.3] * 24, benchmark=benchmark)
    new = cell("new", "0" if benchmark == "perplexity" else "rouge", 512, [0.31] * 24, benchmark=benchmark)
    (sample,) = pairs(new, old)
    assert sample.losable is losable
    assert (macro_difference([sample]).least_p > 0.7) is losable


def written(point: str, *tokens: int, task: str = "vt") -> list[ScoreRow]:
    """Answers of so many tokens to the first questions of a task."""
    return [row(point, task, 512, item, 1.0, tokens_out=count) for item, count in enumerate(tokens)]


def test_tokens_of_output_are_paired_by_question_as_shares_of_the_limit() -> None:
    found = tokens_of(written("new", 10, 40), written("old", 50, 50, 50), most=0.8, limit=100)
    assert (found.new, found.old, found.range) == (25, 50, 100)
    [sample] = found.samples
    assert sample.values.tolist() == pytest.approx([0.3, 0.0]) and sample.haystacks.tolist() == ["vt-0", "vt-1"]
    twice = tokens_of(written("new", 100), written("old", 25, 50), most=2, limit=100)
    assert twice.samples[0].values.tolist() == [-0.25] and twice.range == 200


def test_tokens_weigh_tasks_alike_and_samples_of_a_question_are_one() -> None:
    new = [*written("new", 10, 10, 10), *written("new", 70, task="cwe")]
    again = [row("new", "cwe", 512, 0, 1.0, tokens_out=90, sample=1)]
    old = [*written("old", 50, 50, 50), *written("old", 50, task="cwe")]
    assert tokens_of([*new, *again], old, most=1, limit=100).new == (10 + 80) / 2


@pytest.mark.parametrize("lost", [{"status": "failed"}, {"status": "filtered"}, {"finite": False}])
def test_a_question_without_an_answer_counts_against_the_new_model(lost: dict[str, object]) -> None:
    refused = [row("x", "vt", 512, 0, 0.0, tokens_out=3, **lost)]
    assert tokens_of(refused, written("old", 50), most=1, limit=100).new == 100
    assert tokens_of(written("new", 50), refused, most=1, limit=100).old == 0


def test_answers_whose_tokens_nobody_counted_are_refused() -> None:
    for new, old in ((written("new", 0), written("old", 5)), (written("new", 5), written("old", 0))):
        with pytest.raises(BadInput, match=r"has no count of tokens; serve it from a server that reports `usage`"):
            tokens_of(new, old, most=1, limit=100)
    with pytest.raises(BadInput, match="no answer has a count"):
        tokens_of(written("new", 0), written("old", 0), most=1, limit=100)
    with pytest.raises(BadInput, match="new wrote 101 tokens where 100 were allowed"):
        tokens_of(written("new", 101), written("old", 5), most=1, limit=100)
    empty = [row("new", "vt", 512, 0, 0.0, status="empty")]
    assert tokens_of(empty, written("old", 5), most=1, limit=100).new == 0


def test_models_whose_benchmarks_weigh_otherwise_are_not_compared() -> None:
    old = [*cell("old", "vt", 512, [1.0] * 4), *cell("old", "needle", 512, [0.0] * 4, benchmark="needle")]
    new = [*cell("new", "vt", 512, [1.0] * 4, weight=3.0), *cell("new", "needle", 512, [0.0] * 4, benchmark="needle")]
    with pytest.raises(
        BadInput, match=r"ruler weighs 3 for new and 1 for old, beside other benchmarks; evaluate both with"
    ):
        pairs(new, old)
    assert len(pairs(new[:4], old)) == 1  # one benchmark alone is the score, whatever it weighs
    old = [replace(entry, weight=3.0) if entry.benchmark == "ruler" else entry for entry in old]
    assert macro_difference(pairs(new, old)).mean == 0


def test_a_model_that_ends_before_its_thought_wrote_no_tokens() -> None:
    """Its first token is the end token. A thought whose tokens were not counted is refused."""
    ended = [row("new", "vt", 512, 0, 0.0, tokens_out=0, status="unended")]
    assert tokens_of(ended, written("old", 5), most=1, limit=100).new == 0
    with pytest.raises(BadInput, match="has no count of tokens"):
        tokens_of([replace(ended[0], thought="let me")], written("old", 5), most=1, limit=100)


def test_weights_in_the_same_ratio_are_the_same_score() -> None:
    """3 to 1 is 0.3 to 0.1, whose quotients differ in their last bit."""
    rows = {
        name: [
            *cell(name, "vt", 512, [1.0] * 4, weight=3 * unit),
            *cell(name, "needle", 512, [0.0] * 4, benchmark="needle", weight=unit),
        ]
        for name, unit in (("new", 1.0), ("old", 0.1))
    }
    assert 3.0 / (3 * 0.1) != 1.0 / 0.1
    assert macro_difference(pairs(rows["new"], rows["old"])).mean == 0


def test_an_answer_that_never_came_is_not_a_short_one() -> None:
    """The tokens of an item are those of all its samples."""
    lost = [row("w", "vt", 512, 1, 0.0, **why) for why in ({"status": "failed"}, {"finite": False, "tokens_out": 3})]
    counted = [row("w", "vt", 512, 0, 1.0, tokens_out=count, sample=sample) for sample, count in enumerate((5, 7))]
    assert tokens_by_item([*counted, *lost], lost=100) == {0: 12, 1: 200}
    for answer in (*lost, *counted, row("w", "vt", 512, 2, 0.0, status="empty")):
        check_counted(answer, "race.output_tokens")
    with pytest.raises(BadInput, match=r"race\.output_tokens: an answer of w has no count of tokens"):
        check_counted(row("w", "vt", 512, 2, 1.0), "race.output_tokens")
