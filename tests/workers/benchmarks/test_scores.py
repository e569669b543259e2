from __future__ import annotations

import pytest
from scipy.stats import binom

from jobs.errors import BadInput
from workers.benchmarks.scores import (
    Outcome,
    effective_length,
    effective_length_interval,
    relative_length_interval,
    relative_threshold,
    score_by_length,
    weighted_average,
)

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


def test_relative_threshold_is_a_share_of_the_parent_at_its_shortest_length() -> None:
    threshold = relative_threshold({8192: 50.0, 4096: 80.0})
    assert threshold == pytest.approx(68.0)
    assert effective_length({4096: 70.0, 8192: 68.0, 16_384: 60.0}, threshold) == 8192


def test_tasks_weigh_the_same_however_many_items_they_have() -> None:
    outcomes = [Outcome("vt", 4096, f"v{i}", 1.0) for i in range(9)] + [Outcome("cwe", 4096, "c", 0.5)]
    assert score_by_length(outcomes) == {4096: 75.0}


def outcomes_of(rates: dict[int, float], clusters: int, questions: int) -> list[Outcome]:
    """Items that are right or wrong by whole haystack: the first share of the haystacks is right."""
    return [
        Outcome("niah", length, f"h{cluster}", float(cluster < rate * clusters))
        for length, rate in rates.items()
        for cluster in range(clusters)
        for _ in range(questions)
    ]


def test_chance_of_a_length_is_that_of_the_binomial() -> None:
    # 18 of 20 right, threshold 85 %: with replacement P[at least 17 of 20 at p = 0.9] = 0.8670
    outcomes = outcomes_of({4096: 1.0, 8192: 0.9}, clusters=20, questions=1)
    found = effective_length_interval(outcomes, 85.0, seed=1, replicates=20_000)
    assert found.length == 8192
    assert found.chance[4096] == 1.0
    assert found.chance[8192] == pytest.approx(0.8670, abs=0.008)
    assert (found.low, found.high) == (4096, 8192)


def test_a_point_that_answers_as_its_parent_does_reaches_85_percent_of_it_in_every_draw() -> None:
    half_right = outcomes_of({4096: 0.5, 8192: 0.5}, clusters=20, questions=1)
    found = relative_length_interval(half_right, half_right, seed=1)
    assert found is not None and (found.low, found.length, found.chance[4096]) == (8192, 8192, 1.0)
    elsewhere = [outcome._replace(haystack="another") for outcome in half_right]
    assert relative_length_interval(half_right, elsewhere, seed=1) is None


def test_the_threshold_that_a_parent_gives_is_as_uncertain_as_its_score() -> None:
    # the parent has 20 of 20 where the point has 17: 85 % exactly; of a draw of 20 the point has k, and has to have 17
    point, parent = outcomes_of({4096: 0.85}, 20, 1), outcomes_of({4096: 1.0}, 20, 1)
    found = relative_length_interval(point, parent, seed=1, replicates=20_000)
    assert found is not None and found.length == 4096
    assert found.chance[4096] == pytest.approx(binom.sf(16, 20, 0.85), abs=0.01)


def test_questions_on_one_haystack_add_no_certainty() -> None:
    alone = outcomes_of({4096: 0.9}, clusters=20, questions=1)
    eightfold = outcomes_of({4096: 0.9}, clusters=20, questions=8)
    chances = [
        effective_length_interval(outcomes, 85.0, seed=1, replicates=20_000).chance[4096]
        for outcomes in (alone, eightfold)
    ]
    assert chances[0] == pytest.approx(chances[1], abs=0.01)


def test_interval_depends_on_its_seed_alone() -> None:
    outcomes = outcomes_of({4096: 0.9, 8192: 0.85}, clusters=20, questions=2)
    first = effective_length_interval(outcomes, seed=4)
    assert first == effective_length_interval(list(reversed(outcomes)), seed=4)
    assert first.chance != effective_length_interval(outcomes, seed=5).chance


def test_no_scores_are_refused() -> None:
    with pytest.raises(BadInput, match="no scores"):
        effective_length_interval([], seed=1)
