from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binom

from jobs.errors import BadInput
from orchestrator.judging.effective_length import (
    EffectiveLength,
    effective_length,
    effective_length_interval,
    relative_length_interval,
    score_by_length,
    weighted_average,
)
from orchestrator.judging.samples import CellSample, cell_sample

LENGTHS = (4096, 8192, 16_384, 32_768, 65_536, 131_072)
# RULER's README: scores at 4K … 128K, effective length in thousands, wAvg. (inc), wAvg. (dec)
PUBLISHED = [
    ("Gemini-1.5-pro", (96.7, 95.8, 96.0, 95.9, 95.9, 94.4), 128, 95.5, 96.1),
    ("GPT-4-1106-preview", (96.6, 96.3, 95.2, 93.2, 87.0, 81.2), 64, 89.0, 94.1),
    ("Llama3.1-70B", (96.5, 95.8, 95.4, 94.8, 88.4, 66.6), 64, 85.5, 93.7),
    ("Qwen2-72B", (96.9, 96.1, 94.9, 94.1, 79.8, 53.7), 32, 79.6, 92.3),
    ("Llama3.1-8B", (95.5, 93.8, 91.6, 87.4, 84.7, 77.0), 32, 85.4, 91.3),
    ("Phi3-mini", (92.2, 91.5, 90.7, 87.5, 80.6, 66.7), 32, 80.9, 88.7),
    ("GradientAI/Llama3-8B", (92.8, 90.3, 85.7, 79.9, 76.3, 69.5), 16, 78.5, 86.3),
    ("InternLM2.5", (88.1, 85.5, 84.5, 82.7, 75.5, 68.9), 4, 77.8, 83.9),
    ("LWM", (82.3, 78.4, 73.7, 69.1, 68.1, 65.0), 0, 69.9, 75.7),
    ("DBRX", (95.1, 93.8, 83.6, 63.1, 2.4, 0.0), 8, 38.0, 74.7),
]


@pytest.mark.parametrize(("model", "scores", "effective", "increasing", "decreasing"), PUBLISHED)
def test_published_rows_are_reproduced(
    model: str, scores: tuple[float, ...], effective: int, increasing: float, decreasing: float
) -> None:
    by_length = dict(zip(LENGTHS, scores, strict=True))
    assert effective_length(by_length) == effective * 1024
    # the README rounds the scores before and the averages after
    assert weighted_average(by_length, increasing=True) == pytest.approx(increasing, abs=0.11)
    assert weighted_average(by_length, increasing=False) == pytest.approx(decreasing, abs=0.11)


def test_threshold_itself_passes_and_a_later_recovery_does_not_count() -> None:
    assert effective_length({4096: 98.4, 131_072: 85.6}) == 131_072
    assert effective_length({4096: 90.0, 8192: 85.5, 16_384: 95.0}) == 4096


def test_tasks_weigh_the_same_however_many_items_they_have() -> None:
    assert score_by_length([cell_sample("vt", 4096, [1.0] * 9), cell_sample("cwe", 4096, [0.5])]) == {4096: 75.0}


def answers(rates: dict[int, float], clusters: int, questions: int = 1) -> list[CellSample]:
    """Answers that are right or wrong by whole haystack: the first share of the haystacks is right."""
    haystacks = np.repeat(np.arange(clusters), questions)
    return [
        cell_sample("niah", length, (haystacks < rate * clusters).astype(float), [f"{length}/{h}" for h in haystacks])
        for length, rate in rates.items()
    ]


def test_bounds_are_the_lengths_that_the_bounds_of_the_scores_reach() -> None:
    # 18 of 20 right; at a true score of p, their standard error is √(p(1 − p)/20)
    found = effective_length_interval(answers({4096: 1.0, 8192: 0.9}, clusters=20), threshold=69)
    assert 90 - 196 * (0.69 * 0.31 / 20) ** 0.5 > 69 and found == EffectiveLength(8192, 8192, 8192, asked=8192)
    found = effective_length_interval(answers({4096: 1.0, 8192: 0.9}, clusters=20), threshold=71)
    assert 90 - 196 * (0.71 * 0.29 / 20) ** 0.5 < 71 and found == EffectiveLength(8192, 4096, 8192, asked=8192)


def test_upper_bounds_share_their_error_among_the_lengths() -> None:
    # ten of 20 right: standard error √(0.25/19); t(0.975; 19) = 2.093 of one length, t(0.9875; 19) = 2.433 of two
    error = (0.25 / 19) ** 0.5
    assert 50 + 209.3 * error < 76 < 50 + 243.3 * error < 79
    half = answers({4096: 1.0, 8192: 0.5}, clusters=20)
    assert effective_length_interval(half, threshold=76) == EffectiveLength(4096, 4096, 8192, asked=8192)
    assert effective_length_interval(half, threshold=79) == EffectiveLength(4096, 4096, 4096, asked=8192)


def test_answers_that_are_all_right_may_still_fall_short() -> None:
    # two right and two wrong more: 10 of 12, a variance of 10·2/12³; t(0.975; 7) = 2.365: down to 74.6
    found = effective_length_interval(answers({4096: 1.0}, clusters=8))
    assert 100 - 236.5 * (10 * 2 / 12**3) ** 0.5 < 85.6
    assert found == EffectiveLength(4096, 0, 4096, asked=4096)
    assert effective_length_interval(answers({4096: 1.0}, clusters=40)).low == 4096


@pytest.mark.parametrize("questions", [1, 8])
def test_the_interval_begins_at_zero_with_fewer_than_23_haystacks(questions: int) -> None:
    """All right: Wilson's lower bound n / (n + 1.96²) reaches 0.856 at 23 haystacks, at any number of questions."""
    assert 22 / (22 + 1.96**2) < 0.856 < 23 / (23 + 1.96**2)
    lows = [effective_length_interval(answers({4096: 1.0}, n, questions)).low for n in (22, 23)]
    assert lows == [0, 4096]


@pytest.mark.parametrize(("clusters", "enough"), [(20, 21), (24, 24), (30, 30), (50, 48), (100, 93)])
def test_few_wrong_answers_are_no_proof_of_few_to_come(clusters: int, enough: int) -> None:
    """So many right answers, of a model just below the threshold, have a chance of 2.5 % at most (binomial)."""
    assert binom.sf(enough - 1, clusters, 0.855) < 0.025
    for right in range(clusters // 2, clusters + 1):
        found = effective_length_interval([cell_sample("niah", 4096, [1.0] * right + [0.0] * (clusters - right))])
        assert found.low == (4096 if right >= enough else 0), right


def test_one_haystack_tells_nothing_of_the_length() -> None:
    assert effective_length_interval(answers({4096: 1.0, 8192: 1.0}, clusters=1)) == EffectiveLength(
        8192, 0, 8192, 8192
    )


def test_a_point_that_answers_as_its_parent_does_reaches_85_percent_of_it_for_sure() -> None:
    half_right = [cell_sample("niah", length, [1.0] * 10 + [0.0] * 10, [*range(20)]) for length in (4096, 8192)]
    assert relative_length_interval(half_right, half_right) == EffectiveLength(8192, 8192, 8192, asked=8192)
    elsewhere = [cell_sample("niah", 4096, [1.0], ["another"])]
    assert relative_length_interval(half_right, elsewhere) is None


def test_the_threshold_that_a_parent_gives_is_as_uncertain_as_its_score() -> None:
    # the point is right on 80 of 80, so that all is in the parent's share of 85 % of 76 of 80, or of all that are right
    point = [cell_sample("niah", 4096, [1.0] * 80)]
    parent = [cell_sample("niah", 4096, [1.0] * 76 + [0.0] * 4)]
    found = relative_length_interval(point, parent)
    assert found == EffectiveLength(4096, 4096, 4096, asked=4096)
    less = [cell_sample("niah", 4096, [1.0] * 66 + [0.0] * 14)]  # 82.5 against 85 % of 95: above by 1.75, for nothing
    assert relative_length_interval(less, parent) == EffectiveLength(4096, 0, 4096, asked=4096)


def test_questions_on_one_haystack_add_no_certainty() -> None:
    for questions in (1, 8):
        found = effective_length_interval(answers({4096: 0.95}, clusters=20, questions=questions))
        assert (found.low, found.length) == (0, 4096)
    assert effective_length_interval(answers({4096: 0.95}, clusters=160)).low == 4096


def test_no_scores_are_refused() -> None:
    with pytest.raises(BadInput, match="no scores"):
        effective_length_interval([])
