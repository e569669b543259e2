"""Expected values come from papers, textbooks, scipy, or arithmetic; rates from keyed simulations."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
from numpy.typing import ArrayLike
from scipy.special import betainc

from jobs.errors import CorruptData
from orchestrator.judging.estimates import (
    Estimate,
    few_losses,
    macro_difference,
    macro_mean,
    macro_weights,
    pooled,
    weighted_score,
)
from orchestrator.judging.samples import Cell, cell_sample, paired_sample
from orchestrator.judging.significance import (
    Tested as Found,
)
from orchestrator.judging.significance import (
    anytime_multiplier,
    anytime_p_value,
    benjamini_hochberg,
    design_effect,
    difference_test,
    flip_rate,
    holm,
    mcnemar,
    mcnemar_interval,
    minimum_detectable_effect,
    paired_test,
    rule_of_three,
    sign_flip_test,
    wilson_interval,
)


def keyed(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def paired_mean(values: ArrayLike, haystacks: Any = None) -> Estimate:
    """The macro mean of a single cell."""
    return macro_mean([cell_sample("difference", 0, values, haystacks)])


def assert_rate(events: int, trials: int, nominal: float) -> None:
    """The rate is not above nominal, by a one-sided binomial test at one in a thousand."""
    assert scipy.stats.binom.sf(events - 1, trials, nominal) > 1e-3, f"{events} of {trials} at a nominal {nominal}"


# ---- means ----


def test_paired_mean_without_haystacks_is_the_paired_t_test():
    new, old = keyed(1).random((2, 40))
    estimate = paired_mean(new - old)
    peer = scipy.stats.ttest_rel(new, old)
    interval = peer.confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((interval.low, interval.high))
    assert estimate.mean / estimate.standard_error == pytest.approx(peer.statistic)
    assert estimate.degrees_of_freedom == pytest.approx(39)


def test_clustered_error_of_equal_clusters_is_the_error_of_their_means():
    values = keyed(2).uniform(-1, 1, (12, 4))
    haystacks = np.repeat(np.arange(12), 4)
    estimate = paired_mean(values.ravel(), haystacks)
    assert estimate.standard_error == pytest.approx(scipy.stats.sem(values.mean(axis=1)))
    assert estimate.degrees_of_freedom == pytest.approx(11)
    assert estimate.clusters == 12


def test_clustered_error_is_the_double_sum_of_miller():
    values = keyed(3).uniform(-1, 1, 9)
    haystacks = ["a", "b", "a", "c", "c", "c", "b", "d", "a"]
    deviations = values - values.mean()
    double_sum = sum(deviations[i] * deviations[j] for i in range(9) for j in range(9) if haystacks[i] == haystacks[j])
    assert paired_mean(values, haystacks).standard_error == pytest.approx(math.sqrt(double_sum / 81 * 4 / 3))


def test_a_single_haystack_has_no_standard_error():
    assert paired_mean([0.1, 0.2], ["a", "a"]).standard_error == math.inf


def test_macro_error_adds_the_variances_of_independent_cells():
    first, second = keyed(4).uniform(-1, 1, (2, 30))
    estimate = macro_mean([cell_sample("a", 4096, first), cell_sample("b", 8192, second)])
    assert estimate.mean == pytest.approx(first.mean() / 2 + second.mean() / 2)
    expected = math.hypot(scipy.stats.sem(first) / 2, scipy.stats.sem(second) / 2)
    assert estimate.standard_error == pytest.approx(expected)


def test_macro_error_counts_the_covariance_of_shared_haystacks():
    values, haystacks = keyed(5).uniform(-1, 1, 30), [f"seed {item}" for item in range(30)]
    twice = [cell_sample("a", length, values, haystacks) for length in (4096, 8192)]
    estimate = macro_mean(twice)
    assert estimate.standard_error == pytest.approx(scipy.stats.sem(values))
    assert estimate.degrees_of_freedom == pytest.approx(29)


def test_equal_cells_weigh_as_in_ruler():
    cells = [Cell("vt", 4096), Cell("cwe", 4096), Cell("vt", 8192)]
    assert macro_weights(cells).tolist() == [0.25, 0.25, 0.5]


def test_weights_are_those_of_the_benchmarks_asked_at_a_length():
    tasks = [Cell("vt", 4096, "ruler", 3.0), Cell("cwe", 4096, "ruler", 3.0)]
    cells = [*tasks, Cell("needle", 4096, "needle"), Cell("needle", 8192, "needle")]
    # at 4096, 3 of 4 parts for the two tasks of RULER; at 8192, all for the needle
    assert macro_weights(cells) == pytest.approx([3 / 16, 3 / 16, 1 / 8, 1 / 2])


def test_bad_scores_are_refused_with_their_cell():
    with pytest.raises(CorruptData, match="vt at 4096"):
        cell_sample("vt", 4096, [0.5, math.nan])
    with pytest.raises(CorruptData, match="3 scores against 2"):
        paired_sample("vt", 4096, [1, 1, 1], [0, 1])
    with pytest.raises(CorruptData, match="haystacks"):
        cell_sample("vt", 4096, [0.5, 0.5], ["a"])


def test_clustered_interval_covers_where_the_plain_one_does_not():
    random, covered, plainly_covered, trials = keyed(6), 0, 0, 1000
    haystacks = np.repeat(np.arange(20), 8)
    for _ in range(trials):
        values = 0.2 * np.repeat(random.standard_normal(20), 8) + 0.2 * random.standard_normal(160)
        values = np.clip(values, -1, 1)
        clustered, plain = paired_mean(values, haystacks), paired_mean(values)
        covered += clustered.low <= 0 <= clustered.high
        plainly_covered += plain.low <= 0 <= plain.high
    assert_rate(trials - covered, trials, 0.05)
    assert plainly_covered / trials < 0.75


# ---- proportions ----


@pytest.mark.parametrize(("successes", "trials"), [(0, 10), (3, 10), (81, 263), (500, 500)])
def test_wilson_interval_is_scipys(successes: int, trials: int):
    peer = scipy.stats.binomtest(successes, trials).proportion_ci(method="wilson")
    assert wilson_interval(successes, trials) == pytest.approx((peer.low, peer.high))


def test_wilson_interval_of_newcombes_table():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I


def test_rule_of_three_is_three_over_n():
    assert rule_of_three(500) == pytest.approx(3 / 500, rel=2e-3)
    assert rule_of_three(0) == 1.0


def test_mcnemar_of_armitage_and_berry():
    test = mcnemar(12, 2)  # Armitage & Berry 1994, p. 127: two media for tubercle bacilli
    assert test.two_sided == pytest.approx(0.0129, abs=5e-5)
    assert test.improved == pytest.approx(0.00647, abs=5e-5)
    assert test.regressed > 0.99


def test_mcnemar_of_fagerland():
    assert mcnemar(1, 7).two_sided == pytest.approx(0.0703, abs=5e-5)  # Fagerland, Lydersen & Laake 2013, table 2


def test_mcnemar_is_the_binomial_test():
    for gains, losses in [(0, 0), (0, 5), (5, 5), (13, 4)]:
        if gains + losses:
            assert mcnemar(gains, losses).two_sided == pytest.approx(
                scipy.stats.binomtest(gains, gains + losses).pvalue
            )
        assert mcnemar(gains, losses).improved == mcnemar(losses, gains).regressed


def test_mcnemar_interval_of_statpsych():
    # R statpsych, ci.prop.ps(.05, 12, 4, 26, 6): 0.44, 0.2548067 to 0.6251933
    assert mcnemar_interval(26, 4, 48) == pytest.approx((0.2548067, 0.6251933), abs=1e-6)


def test_mcnemar_interval_does_not_collapse_without_flips():
    low, high = mcnemar_interval(0, 0, 100)
    assert low < -0.02 < 0.02 < high


def test_flip_rate_is_never_surely_zero():
    same = flip_rate(np.ones(300), np.ones(300))
    assert (same.flips, same.rate, same.low) == (0, 0.0, 0.0)
    assert same.high == pytest.approx(0.01, rel=2e-3)
    some = flip_rate([1, 0, 0.2, 1], [1, 1, 0.4, 1])
    assert (some.flips, some.rate) == (2, 0.5)
    assert (some.low, some.high) == pytest.approx(tuple(wilson_interval(2, 4)))


# ---- sign flips ----


def test_exact_sign_flip_test_is_scipys_permutation_test():
    values = keyed(10).uniform(-0.6, 1, 9)
    peer = scipy.stats.permutation_test((values,), np.sum, permutation_type="samples", n_resamples=np.inf)
    assert sign_flip_test(values) == pytest.approx(peer.pvalue)


def test_sign_flip_test_of_right_or_wrong_scores_is_mcnemars():
    differences = [1] * 13 + [-1] * 4 + [0] * 200
    assert sign_flip_test(differences) == pytest.approx(mcnemar(13, 4).two_sided)


def test_sign_flip_test_flips_whole_haystacks():
    differences, haystacks = [0.2, 0.4, 0.2, 0.2, 0.6, 0.0], ["a", "a", "b", "b", "c", "c"]
    assert sign_flip_test(differences, haystacks) == 2 / 8


def test_monte_carlo_sign_flips_are_keyed_and_near_the_normal_tail():
    values = keyed(11).uniform(-1, 1, 400)
    p = sign_flip_test(values, draws=20_000, seed=5)
    z = abs(values.sum()) / math.sqrt(np.sum(values**2))
    assert p == pytest.approx(2 * scipy.stats.norm.sf(z), abs=0.02)
    assert p == sign_flip_test(values, draws=20_000, seed=5)
    assert sign_flip_test(np.ones(30), draws=999) == 1 / 1000


# ---- before the run ----


@pytest.mark.parametrize(("items", "points"), [(100, 8.9), (500, 4.0), (6500, 1.1), (39_000, 0.45)])
def test_minimum_detectable_effect_at_ten_percent_discordance(items: int, points: float):
    assert 100 * minimum_detectable_effect(items, discordance=0.1) == pytest.approx(points, abs=0.05)


def test_minimum_detectable_effect_is_detected_at_the_stated_power():
    random, trials, items = keyed(12), 2000, 200
    effect = minimum_detectable_effect(items, deviation=0.5)
    differences = effect + 0.5 * random.standard_normal((trials, items))
    found = np.sum(scipy.stats.ttest_1samp(differences, 0.0, axis=1).pvalue <= 0.05)
    assert found / trials == pytest.approx(0.8, abs=0.04)


def test_design_effect_of_eight_questions():
    assert 8 / design_effect(8, 0.1) == pytest.approx(4.7, abs=0.01)
    assert 8 / design_effect(8, 0.3) == pytest.approx(2.6, abs=0.02)


# ---- many comparisons ----


def test_holm_on_paper():
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_benjamini_hochberg_is_scipys():
    p = keyed(13).random(50) ** 2
    assert benjamini_hochberg(p) == pytest.approx(scipy.stats.false_discovery_control(p))


def test_benjamini_hochberg_of_the_1995_paper_rejects_four():
    p = [0.0001, 0.0004, 0.0019, 0.0095, 0.0201, 0.0278, 0.0298, 0.0344, 0.0459]
    p += [0.3240, 0.4262, 0.5719, 0.6528, 0.7590, 1.0]
    assert int(np.sum(benjamini_hochberg(p) <= 0.05)) == 4
    assert int(np.sum(holm(p) <= 0.05)) == 3


# ---- looking more than once ----


def test_anytime_multiplier_and_p_value_are_inverse():
    for alpha in (0.2, 0.05, 0.001):
        assert anytime_p_value(anytime_multiplier(300, 500, alpha), 300, 500) == pytest.approx(alpha)
    assert anytime_p_value(-1.0, 300, 500) == 1.0
    assert anytime_p_value(1e3, 300, 500) < 1e-100


def test_anytime_bound_survives_looking_at_every_haystack():
    random, trials, clusters = keyed(21), 2000, 1000
    paths = np.cumsum(random.standard_normal((trials, clusters)), axis=1)
    counts = np.arange(1, clusters + 1)
    bounds = np.array([anytime_multiplier(int(count), 300) for count in counts])
    ever = (paths / np.sqrt(counts) > bounds).any(axis=1)
    assert_rate(int(ever.sum()), trials, 0.05)
    peeking = (paths / np.sqrt(counts) > 1.645)[:, 29:].any(axis=1)
    assert peeking.mean() > 0.25  # what the fixed bound would do


def test_exact_tail_is_the_incomplete_beta():
    assert mcnemar(8, 3).improved == pytest.approx(float(betainc(8, 4, 0.5)))


# ---- differences that may be few ----


def test_macro_difference_of_one_cell_is_bonett_and_prices_interval_on_many_items():
    differences = np.array([1.0] * 260 + [-1.0] * 40 + [0.0] * 180)
    ours, peer = macro_difference([cell_sample("a", 4096, differences)]), mcnemar_interval(260, 40, 480)
    assert (ours.low, ours.high) == pytest.approx((peer.low, peer.high), abs=0.003)


def test_macro_difference_adds_one_gain_and_one_loss_to_the_variance():
    differences = np.array([0.4, -0.2, 0.0, 0.0, 0.2])
    ours = macro_difference([cell_sample("a", 4096, differences)])
    error = math.hypot(float(scipy.stats.sem(differences)), math.sqrt(2) * 0.4 / 5)
    assert ours.standard_error == pytest.approx(error)
    assert ours.high == pytest.approx(differences.mean() + scipy.stats.t.ppf(0.975, 4) * error)
    many = macro_difference([cell_sample("a", 4096, [1.0] * 6 + [-1.0] * 2 + [0.0] * 10)])
    error = math.hypot(math.sqrt(32 / 81 / 17), math.sqrt(2) / 18)
    assert difference_test(many) == pytest.approx(2 * scipy.stats.t.sf(2 / 9 / error, 17))


def test_macro_difference_takes_agreement_for_no_proof_of_it():
    alone = macro_difference([cell_sample("a", 4096, np.zeros(50))])
    assert alone.standard_error == pytest.approx(math.sqrt(2) / 50)
    shared = macro_difference([cell_sample("a", 4096, np.zeros(48), np.repeat(np.arange(6), 8))])
    assert shared.standard_error == pytest.approx(math.sqrt(2) / 6)  # a whole haystack may have been missed
    some = macro_difference([cell_sample("a", 4096, [1.0] + [0.0] * 47, np.repeat(np.arange(6), 8))])
    seen = paired_mean([1.0] + [0.0] * 47, np.repeat(np.arange(6), 8)).standard_error
    assert some.standard_error == pytest.approx(math.hypot(seen, math.sqrt(2) * 4 / 48))  # half of one, here


def test_macro_difference_of_one_haystack_says_nothing():
    estimate = macro_difference([cell_sample("a", 4096, [1.0, 0.0], ["h", "h"])])
    assert (estimate.low, estimate.high, difference_test(estimate)) == (-1.0, 1.0, 1.0)


def test_macro_difference_of_opposite_cells_is_judged_by_the_spread_within_them():
    random = keyed(22)
    cells = [
        cell_sample(task, 4096, sign * 0.5 + 0.1 * random.standard_normal(40)) for task, sign in (("a", 1), ("b", -1))
    ]
    errors = [float(scipy.stats.sem(sample.values)) / 2 for sample in cells]
    largest = max(float(np.abs(sample.values).max()) for sample in cells)
    expected = math.hypot(*errors, math.sqrt(2) * largest / 2 / 40)
    assert macro_difference(cells).standard_error == pytest.approx(expected)


# ---- losses too rare to be seen ----


def test_gains_alone_are_no_proof_where_one_loss_in_so_many_undoes_them():
    # a true mean of zero with gains of 0.05 and losses of 1 needs a loss in 21; none in 24 has the chance (20/21)^24
    gains = macro_difference([cell_sample("a", 4096, np.full(24, 0.05))])
    assert difference_test(gains) == pytest.approx((20 / 21) ** 24 / 0.8)
    assert gains.low == 0.0
    many = macro_difference([cell_sample("a", 4096, np.full(240, 0.05))])
    assert difference_test(many) == pytest.approx((20 / 21) ** 240 / 0.8) and many.low > 0
    losses = macro_difference([cell_sample("a", 4096, np.full(24, -0.05))])
    assert difference_test(losses) == difference_test(gains) and losses.high == 0.0


def few(values: ArrayLike, claimed: float) -> float:
    return few_losses(pooled([cell_sample("a", 4096, values)], np.ones(1)), claimed)


def test_many_gains_do_not_hide_that_a_model_is_worse() -> None:
    """Two thirds of a haystack lost in 35 of 72, one third gained in 32: the worse model cannot be the better one."""
    values = [*[-2 / 3] * 35, *[0.0] * 5, *[1 / 3] * 32]
    gain = 35 * (2 / 3) / 40
    chance = gain / (gain + 1 / 3)
    assert chance > 0.5
    expected = scipy.stats.binom.cdf(32, 72, chance) / 0.2
    found = macro_difference([cell_sample("a", 4096, values)])
    assert found.least_p == pytest.approx(expected) and expected < 0.004
    assert found.high < 0


def test_few_losses_is_the_binomial_of_the_losses_seen() -> None:
    # 90 gains of 0.2, ten losses of 0.5: a true mean of zero needs a loss in 0.2/(0.2 + 0.5)
    assert few([0.2] * 90 + [-0.5] * 10, 0.0) == pytest.approx(scipy.stats.binom.cdf(10, 100, 0.2 / 0.7))
    # ... or, with none as large as 1, in the mean of all, 0.13, over 1.13
    whole = (1 - 0.13 / 1.13) ** 100
    assert whole < scipy.stats.binom.cdf(10, 100, 0.2 / 0.7)
    assert few([0.2] * 90 + [-0.5] * 10, 0.06) == pytest.approx((1 - 0.19 / 1.13) ** 100)  # here the larger


def test_a_negligible_loss_makes_nothing_sure() -> None:
    assert few([0.05] * 24, 0.0) == pytest.approx((1 / 1.05) ** 24)
    assert few([0.05] * 23 + [-0.001], 0.0) == pytest.approx((1 / (1 + (23 * 0.05 - 0.001) / 24)) ** 24)
    assert few([0.2] * 12 + [0.0] * 11 + [-0.2], 0.0) > few([0.2] * 12 + [0.0] * 12, 0.0) > 0.09


def test_likelihoods_are_not_lost_whole() -> None:
    old = np.full(24, 0.3)
    new = old + 0.01 * np.linspace(0.9, 1.1, 24)
    surely = macro_difference([paired_sample("perplexity", 4096, new, old, losable=False)])
    assert surely.least_p == 0 and difference_test(surely) < 1e-6


def test_scores_that_can_be_lost_are_not_sure_where_none_was_lost() -> None:
    # ROUGE of 0.31 against 0.3 on 24 haystacks: if 0.01/1.01 of them are lost, the mean is 0; none is in (1/1.01)²⁴
    unlost = macro_difference([paired_sample("rouge", 4096, [0.31] * 24, [0.3] * 24)])
    assert difference_test(unlost) == pytest.approx((1 / 1.01) ** 24 / 0.8)
    with_a_zero = macro_difference([paired_sample("rouge", 4096, [0.31] * 23 + [0.0], [0.3] * 23 + [0.0])])
    assert difference_test(with_a_zero) > 0.5


def test_a_haystack_that_every_length_asks_about_is_lost_at_once() -> None:
    names = [f"h{number}" for number in range(24)]
    cells = [cell_sample("a", 1024 << step, np.full(24, 0.05), names) for step in range(6)]
    found = pooled(cells, np.full(6, 1 / 6))
    assert found.means == pytest.approx(np.full(24, 0.05)) and found.most == pytest.approx(1)
    assert found.spread == pytest.approx(1 / 24)
    assert difference_test(macro_difference(cells)) == pytest.approx((1 / 1.05) ** 24 / 0.8)


def test_haystacks_count_as_much_as_their_cells_do() -> None:
    large, small = cell_sample("a", 4096, [0.0] * 30), cell_sample("b", 4096, [1.0] * 10)
    found = pooled([large, small], np.array([0.5, 0.5]))
    assert found.means.mean() == pytest.approx(0.5)
    assert found.most == pytest.approx(40 * 0.5 / 10)
    assert found.spread == pytest.approx(0.25 / 30 + 0.25 / 10)


def test_a_weighted_score_of_a_model_and_itself_is_what_is_left_of_its_weight():
    cell = cell_sample("a", 4096, [1.0] * 6 + [0.0] * 6)
    estimate = weighted_score([cell, cell], np.array([1.0, -0.85]))
    assert estimate.mean == pytest.approx(0.15 / 2)
    assert estimate.standard_error == pytest.approx(0.15 * scipy.stats.sem(cell.values))


# ---- one cell decides


def one_of_two(last: list[float], other: int) -> Found:
    """Differences in one cell alone; the other has so many haystacks, all without a difference."""
    return paired_test([cell_sample("vt", 4096, last), cell_sample("cwe", 4096, [0.0] * other)])


def test_the_interval_of_one_cell_that_decides_is_the_wider_one() -> None:
    last = [1.0] * 12 + [-1.0] * 2 + [0.0] * 16
    found = one_of_two(last, 30)
    plain = macro_difference([cell_sample("vt", 4096, last), cell_sample("cwe", 4096, [0.0] * 30)])
    low, high = mcnemar_interval(12, 2, 30)
    assert found.exact and found.p == mcnemar(12, 2).two_sided
    assert found.estimate.low == min(low / 2, plain.low) and found.estimate.high == max(high / 2, plain.high)
    assert found.estimate.high == plain.high > high / 2, "a loss in the other cell may have been missed"


def test_a_small_cell_without_a_difference_makes_one_that_decides_unsure() -> None:
    found = one_of_two([1.0] * 8 + [0.0] * 92, 4)  # McNemar: 2/2⁸
    assert not found.exact and found.p > 0.05 and found.estimate.low < 0 < found.estimate.high


def test_one_haystack_in_another_cell_shows_no_spread() -> None:
    found = one_of_two([1.0] * 20 + [0.0] * 20, 1)
    assert (found.exact, found.p) == (False, 1.0)
    assert (found.estimate.low, found.estimate.high) == (-1.0, 1.0)
