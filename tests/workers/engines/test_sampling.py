"""Sampling against transformers' own warpers, and its noise against the distributions that it must have."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from workers.engines.engine import Sampling
from workers.engines.sampling import filtered, gumbel, sample


def logits(rows: int, vocabulary: int, spread: float, seed: int = 0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spread", [0.1, 3.0], ids=["flat", "peaked"])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.6, 0.95, 20), (0.7, 0.9, 0), (1.5, 1.0, 5), (1.0, 0.01, 0), (1.0, 0.999, 0), (1.0, 0.5, 9999)],
)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(
    temperature: float, top_p: float, top_k: int, spread: float
) -> None:
    scores = logits(8, 3000, spread)
    expected = TemperatureLogitsWarper(temperature)(None, scores.double())  # type: ignore[arg-type]
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)  # type: ignore[arg-type]
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)  # type: ignore[arg-type]
    assert torch.equal(filtered(scores.double() / temperature, top_p, top_k), expected)


def test_equal_logits_stay_together() -> None:
    assert filtered(torch.tensor([[1.0, 2.0, 2.0, 0.0]]).double(), 1.0, 1).isfinite().tolist() == [
        [False, True, True, False]
    ]


def test_draws_have_the_distribution_of_transformers_processors() -> None:
    """20,000 seeds of one prompt: a chi-square test of the frequencies against the probabilities."""
    scores, times = logits(1, 12, 1.5), 20_000
    expected = TopKLogitsWarper(8)(None, TemperatureLogitsWarper(0.8)(None, scores)).softmax(-1)[0].double().numpy()  # type: ignore[arg-type]
    drawn = sample(scores.expand(times, -1), [Sampling(0.8, 1.0, 8, seed) for seed in range(times)], [3] * times)
    counts = np.bincount(drawn.numpy(), minlength=12)
    assert counts[expected == 0].sum() == 0
    likely = expected > 0
    assert stats.chisquare(counts[likely], times * expected[likely] / expected.sum()).pvalue > 0.01


def test_draws_of_one_seed_at_many_steps_are_independent_of_each_other() -> None:
    scores = torch.zeros(1, 4)
    drawn = sample(scores.expand(10_000, -1), [Sampling(1.0, 1.0, 0, 7)] * 10_000, range(10_000)).numpy()
    pairs = np.bincount(4 * drawn[:-1] + drawn[1:], minlength=16)
    assert stats.chisquare(pairs).pvalue > 0.01


def test_noise_is_gumbels() -> None:
    noise = gumbel(torch.full((20_000,), 5), torch.arange(20_000)).numpy()
    assert stats.kstest(noise, "gumbel_r").pvalue > 0.01


def test_a_draw_depends_on_its_seed_its_step_and_its_logits_alone() -> None:
    scores = logits(6, 500, 1.0)
    settings = [Sampling(0.5 + 0.5 * (row % 2), 0.9 if row % 3 else 1.0, 40 * (row % 2), seed=row) for row in range(6)]
    together = sample(scores, settings, [9, 8, 7, 6, 5, 4])
    alone = [sample(scores[r : r + 1], settings[r : r + 1], [9 - r]).item() for r in range(6)]
    assert together.tolist() == alone
    [setting] = {Sampling(1.0, 1.0, 0, 3)}
    one = scores[:1].expand(40, -1)
    assert len({*sample(one, [setting] * 40, range(40)).tolist()}) > 10, "another step, another token"
    assert len({*sample(one, [Sampling(1.0, 1.0, 0, seed) for seed in range(40)], [0] * 40).tolist()}) > 10


def test_two_models_that_are_close_draw_alike() -> None:
    """Common noise: two distributions with a distance of 2 % differ in about 2 to 4 % of their draws."""
    first = logits(1, 500, 2.0)
    second = first + 0.05 * logits(1, 500, 1.0, seed=1)
    distance = 0.5 * (first.softmax(-1) - second.softmax(-1)).abs().sum().item()
    settings = [Sampling(1.0, 1.0, 0, seed) for seed in range(4000)]
    differs = [sample(one.expand(4000, -1), settings, [0] * 4000) for one in (first, second)]
    share = (differs[0] != differs[1]).double().mean().item()
    assert 0.01 < distance < 0.03 and distance / 2 < share < 3 * distance
