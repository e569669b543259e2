"""Verdicts computed on paper; error rates and power from keyed simulations."""

import json
import math
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
import scipy.stats

from jobs.errors import BadInput
from orchestrator.judging.gate import GateRule, Tokens, Verdict, judge, same_merge
from orchestrator.judging.samples import CellSample, cell_sample, paired_sample


def keyed(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def assert_rate(events: int, trials: int, nominal: float) -> None:
    """The rate is not above nominal, by a one-sided binomial test at one in a thousand."""
    assert scipy.stats.binom.sf(events - 1, trials, nominal) > 1e-3, f"{events} of {trials} at a nominal {nominal}"


def flips(random: np.random.Generator, items: int, gain: float, loss: float) -> np.ndarray:
    """Paired differences of right-or-wrong scores: +1 with chance `gain`, −1 with chance `loss`."""
    return random.choice([1.0, -1.0, 0.0], size=items, p=[gain, loss, 1 - gain - loss])


def one_cell(differences: np.ndarray) -> list[CellSample]:
    return [cell_sample("niah_single_1", 4096, differences, np.arange(differences.size))]


def test_same_answers_on_enough_items_pass():
    # the least variance of a loss of 1 point is 0.01·0.99 an item: z = 0.01/√(0.0099/500) = 2.25
    verdict = judge(one_cell(np.zeros(500)))
    assert (verdict.outcome, verdict.exit_code) == ("pass", 0)
    assert verdict.lines[0].p_pass == pytest.approx(scipy.stats.t.sf(0.01 / math.sqrt(0.0099 / 500), 499))
    assert verdict.items_needed is None


def test_same_answers_on_few_items_are_no_pass():
    verdict = judge(one_cell(np.zeros(100)))
    assert (verdict.outcome, verdict.exit_code) == ("inconclusive", 3)
    assert verdict.items_needed == 299  # 0.99²⁹⁹ < 0.05


@pytest.mark.parametrize("planned", [None, 12])
@pytest.mark.parametrize(("change", "outcome"), [(0.0, "pass"), (-0.004, "pass"), (-0.03, "fail"), (0.02, "pass")])
def test_likelihoods_that_all_differ_alike_are_judged_without_a_spread(
    change: float, outcome: str, planned: int | None
):
    old = np.full(24, 0.25)
    sample = replace(paired_sample("perplexity", 4096, old + change, old), losable=False)
    verdict = judge([sample], GateRule(margin=1.0, planned_haystacks=planned))
    assert verdict.outcome == outcome
    assert (verdict.lines[0].low, verdict.lines[0].high) == pytest.approx((100 * change, 100 * change))


def test_likelihoods_that_are_all_worse_by_the_margin_do_not_pass():
    sample = replace(cell_sample("perplexity", 4096, [-0.01] * 24), losable=False)
    assert judge([sample], GateRule(margin=1.0)).outcome == "inconclusive"


def test_a_loss_beyond_the_margin_fails():
    differences = np.array([-1.0] * 60 + [1.0] * 20 + [0.0] * 920)
    verdict = judge(one_cell(differences), new="tonight", old="blessed")
    error = math.sqrt((0.08 - 0.04**2) / 999)
    assert (verdict.outcome, verdict.exit_code) == ("fail", 1)
    line = verdict.lines[0]
    assert line.difference == pytest.approx(-4.0)
    assert line.standard_error == pytest.approx(100 * error)
    assert (line.low, line.high) == pytest.approx((-4 - 164.6 * error, -4 + 164.6 * error), abs=0.01)
    assert line.reason.startswith("overall: -4.00 points")


def test_a_sure_regression_within_the_margin_passes_and_says_so():
    differences = np.array([-1.0] * 40 + [0.0] * 3960)
    verdict = judge(one_cell(differences), GateRule(margin=3.0))
    assert verdict.outcome == "pass"
    assert "regressed but within the margin" in verdict.lines[0].reason


def test_one_haystack_is_no_evidence():
    verdict = judge([cell_sample("vt", 4096, [0.0] * 50, ["h"] * 50)])
    assert (verdict.outcome, verdict.items_needed) == ("inconclusive", None)
    assert json.loads(verdict.to_json())["lines"][0]["low"] is None


def test_a_long_context_regression_does_not_hide_in_the_macro_score():
    random = keyed(1)
    samples = [cell_sample("vt", length, flips(random, 2000, 0.05, 0.04)) for length in (4096, 8192, 16384)]
    samples.append(cell_sample("vt", 131072, flips(random, 2000, 0.02, 0.05)))
    assert judge(samples).outcome == "pass"
    verdict = judge(samples, GateRule(length_margin=1.0))
    assert verdict.outcome == "fail"
    assert [line.scope for line in verdict.lines] == ["overall", "4096", "8192", "16384", "131072"]
    assert [line.scope for line in verdict.lines if line.outcome == "fail"] == ["131072"]


def test_macro_score_weighs_lengths_alike():
    samples = [paired_sample("vt", 4096, [1.0] * 50, [0.0] * 50), paired_sample("vt", 8192, [0.0] * 50, [0.0] * 50)]
    assert judge(samples).lines[0].difference == pytest.approx(50)


def test_json_holds_the_whole_verdict():
    document = json.loads(judge(one_cell(np.zeros(500)), new="a", old="b").to_json())
    assert (document["outcome"], document["exit_code"], document["new"], document["old"]) == ("pass", 0, "a", "b")
    assert document["rule"]["margin"] == 1.0
    assert document["lines"][0]["items"] == 500


def test_junit_shows_inconclusive_as_error_and_never_green():
    def suite(verdict: Verdict) -> ElementTree.Element:
        return ElementTree.fromstring(verdict.to_junit_xml())

    undecided = suite(judge(one_cell(np.zeros(50)), new="a<b", old="c&d"))
    assert (undecided.get("tests"), undecided.get("failures"), undecided.get("errors")) == ("1", "0", "1")
    assert undecided.get("name") == "mergeyard gate: a<b against c&d"
    failed = suite(judge(one_cell(np.full(500, -0.5))))
    assert failed.get("failures") == "1"
    assert "worse by more than 1" in (failed.find("testcase/failure").get("message") or "")
    assert suite(judge(one_cell(np.zeros(500)))).find("testcase/error") is None


@pytest.mark.parametrize("rule", [{"margin": 0.0}, {"margin": -1.0}, {"length_margin": 100.0}, {"alpha": 0.7}])
def test_nonsense_rules_are_refused(rule: dict[str, float]):
    with pytest.raises(BadInput, match=r"gate\."):
        GateRule(**rule)


def test_no_common_items_are_refused():
    with pytest.raises(BadInput, match="no items in common"):
        judge([])


# ---- error rates: the true difference is exactly the margin, so every verdict is an error ----


@pytest.mark.parametrize(("items", "gain", "loss"), [(300, 0.0, 0.01), (1000, 0.0, 0.01), (2000, 0.05, 0.06)])
def test_wrong_passes_and_wrong_fails_stay_within_alpha(items: int, gain: float, loss: float):
    random, trials = keyed(items), 600
    outcomes = [judge(one_cell(flips(random, items, gain, loss))).outcome for _ in range(trials)]
    assert_rate(outcomes.count("pass"), trials, 0.05)
    assert_rate(outcomes.count("fail"), trials, 0.05)


def test_wrong_verdicts_stay_within_alpha_with_questions_that_share_haystacks():
    random, trials, passes, fails, blind = keyed(3), 400, 0, 0, 0
    haystacks = np.repeat(np.arange(250), 4)
    for _ in range(trials):
        # a haystack is lost or won as a whole half of the time; the mean is −0.01
        whole = np.repeat(flips(random, 250, 0.05, 0.06), 4)
        alone = flips(random, 1000, 0.05, 0.06)
        differences = np.where(np.repeat(random.random(250) < 0.5, 4), whole, alone)
        outcome = judge([cell_sample("vt", 4096, differences, haystacks)]).outcome
        passes, fails = passes + (outcome == "pass"), fails + (outcome == "fail")
        blind += judge(one_cell(differences)).outcome != "inconclusive"
    assert_rate(passes, trials, 0.05)
    assert_rate(fails, trials, 0.05)
    assert blind / trials > 0.12  # what forgetting the haystacks would cost: 10 % is nominal for both


def test_wrong_verdicts_over_lengths_stay_within_alpha():
    random, trials, lengths = keyed(4), 200, (4096, 8192, 16384, 32768, 65536, 131072)
    rule, passes, fails, unadjusted = GateRule(length_margin=1.0), 0, 0, 0
    for _ in range(trials):
        at_margin = [cell_sample("vt", length, flips(random, 400, 0.05, 0.06), np.arange(400)) for length in lengths]
        verdict = judge(at_margin, rule)
        fails += verdict.outcome == "fail"
        unadjusted += any(1 - line.p_pass <= rule.alpha for line in verdict.lines)
        one_bad = [cell_sample("vt", length, np.zeros(400), np.arange(400)) for length in lengths[:-1]]
        passes += judge([*one_bad, at_margin[-1]], rule).outcome == "pass"
    assert_rate(fails, trials, 0.05)
    assert_rate(passes, trials, 0.05)
    assert unadjusted / trials > 0.15  # what Holm is there for


def test_power_is_what_the_normal_approximation_promises():
    # no true difference, discordance 10 %, one length of RULER: Φ(1/0.392 − 1.645) = 0.82
    random, trials = keyed(5), 300
    passed = sum(judge(one_cell(flips(random, 6500, 0.05, 0.05))).outcome == "pass" for _ in range(trials))
    assert passed / trials == pytest.approx(0.82, abs=0.07)


@pytest.mark.parametrize(
    ("gains", "losses", "items", "margin", "verdicts"),
    [(50, 50, 1000, 1.0, 1), (1, 2, 100, 5.0, 1), (2, 13, 100, 5.0, 1), (2, 14, 100, 5.0, 2)],
)
def test_items_needed_reach_a_verdict_at_the_stated_power(
    gains: int, losses: int, items: int, margin: float, verdicts: int
):
    random, trials = keyed(6), 300
    template = np.array([1.0] * gains + [-1.0] * losses + [0.0] * (items - gains - losses))
    rule = GateRule(margin=margin, verdicts=verdicts)
    wanted = "fail" if 100 * (losses - gains) / items > margin else "pass"
    needed = judge(one_cell(template), rule).items_needed
    assert needed is not None
    drawn = (one_cell(flips(random, needed, gains / items, losses / items)) for _ in range(trials))
    decided = sum(judge(sample, rule).outcome == wanted for sample in drawn)
    assert decided / trials == pytest.approx(0.8, abs=0.07)


@pytest.mark.parametrize("items", [30, 58])
def test_an_open_verdict_of_a_fixed_gate_names_the_items_by_which_models_that_agree_pass(items: int):
    assert judge(one_cell(np.zeros(items)), GateRule(margin=5.0)).items_needed == 59
    assert judge(one_cell(np.zeros(59)), GateRule(margin=5.0)).outcome == "pass"


def test_items_needed_for_a_fail_count_the_correction_over_lengths():
    worse = [1.0] * 2 + [-1.0] * 13 + [0.0] * 85
    alone = judge(one_cell(np.array(worse)), GateRule(margin=5.0)).items_needed
    lengths = [cell_sample("vt", length, worse, np.arange(100) + length) for length in (4096, 8192, 16384)]
    verdict = judge(lengths, GateRule(margin=50.0, length_margin=5.0))
    fourth = judge(one_cell(np.array(worse)), GateRule(margin=5.0, verdicts=4)).items_needed  # of four lines
    assert alone is not None and verdict.lines[1].items_needed == fourth > alone


def test_topping_up_is_legal_only_in_the_anytime_mode():
    random, trials = keyed(7), 100
    looks = range(400, 4001, 400)
    fixed, anytime = GateRule(), GateRule(planned_haystacks=2000)
    wrong = {"pass": 0, "fail": 0}
    peeked = 0
    for _ in range(trials):
        differences = flips(random, looks[-1], 0.05, 0.06)
        seen = {judge(one_cell(differences[:items]), anytime).outcome for items in looks}
        for outcome in wrong:
            wrong[outcome] += outcome in seen
        peeked += any(judge(one_cell(differences[:items]), fixed).outcome != "inconclusive" for items in looks)
    assert_rate(wrong["pass"], trials, 0.05)
    assert_rate(wrong["fail"], trials, 0.05)
    assert peeked / trials > 0.2


def test_the_anytime_gate_decides_with_about_two_and_a_half_times_the_items():
    # Φ(x) = 0.8 with x = 0.01/√(0.1/n) − 3.04: at alpha / 2 for its bound, 15,080 items instead of 6,183
    random, trials = keyed(8), 200
    rule = GateRule(planned_haystacks=15_080)
    passed = sum(judge(one_cell(flips(random, 15_080, 0.05, 0.05)), rule).outcome == "pass" for _ in range(trials))
    assert passed / trials == pytest.approx(0.8, abs=0.08)


@pytest.mark.parametrize(("margin", "haystacks"), [(1.0, 427), (2.0, 213), (5.0, 84)])
def test_models_that_agree_pass_an_anytime_gate_by_the_bets(margin: float, haystacks: int):
    rule = GateRule(margin=margin, planned_haystacks=haystacks // 4)
    assert judge(one_cell(np.zeros(haystacks - 1)), rule).outcome == "inconclusive"
    verdict = judge(one_cell(np.zeros(haystacks)), rule)
    assert verdict.outcome == "pass"
    assert -margin < verdict.lines[0].low < -0.99 * margin < 0 < verdict.lines[0].high


def test_models_that_agree_pass_with_as_many_haystacks_over_several_tasks():
    rule = GateRule(planned_haystacks=100)

    def agree(haystacks: int) -> list[CellSample]:
        return [
            cell_sample(task, length, np.zeros(haystacks), [f"{task}-{number}" for number in range(haystacks)])
            for task in ("vt", "cwe", "fwe", "niah_single_1")
            for length in (4096, 8192)
        ]

    assert judge(agree(106), rule).outcome == "inconclusive"
    assert judge(agree(108), rule).outcome == "pass"  # 4 · 108 = 432


def test_an_open_verdict_names_the_items_by_which_models_that_agree_pass():
    assert judge(one_cell(np.zeros(100)), GateRule(planned_haystacks=100)).items_needed == 427


def test_bounds_and_p_values_of_an_anytime_gate_agree():
    random = keyed(12)
    for haystacks in (40, 100, 400):
        for gain, loss in ((0.0, 0.0), (0.02, 0.0), (0.1, 0.1), (0.0, 0.3)):
            rule = GateRule(margin=5.0, planned_haystacks=50)
            [line] = judge(one_cell(flips(random, haystacks, gain, loss)), rule).lines
            assert (line.p_pass <= rule.alpha) == (line.low > -5.0)
            assert (line.p_fail <= rule.alpha) == (line.high < -5.0)


@pytest.mark.parametrize(
    ("haystacks", "gain", "share"), [(24, 0.05, 1.0), (48, 0.05, 1.0), (100, 0.1, 0.6), (300, 0.05, 1.0)]
)
def test_many_small_gains_and_rare_total_losses_pass_no_more_often_than_alpha(
    haystacks: int, gain: float, share: float
):
    # worse by just the margin of 0.01: lost whole with the chance q, q = (g + 0.01) / (1 + g), g the mean gain else
    random, trials = keyed(9), 300
    mean_gain = gain * share
    chance = (mean_gain + 0.01) / (1 + mean_gain)
    passes = 0
    for _ in range(trials):
        lost, gained = random.random(haystacks) < chance, random.random(haystacks) < share
        passes += judge(one_cell(np.where(lost, -1.0, np.where(gained, gain, 0.0)))).outcome == "pass"
    assert_rate(passes, trials, 0.05)


@pytest.mark.parametrize(("margin", "haystacks"), [(1.0, 298), (3.0, 98), (10.0, 28)])
def test_agreement_alone_passes_only_where_a_loss_would_have_shown(margin: float, haystacks: int):
    # (1 - m)^n: the chance that a model worse by m loses none of n; first below 0.05 at n = 299, 99 and 29
    rule = GateRule(margin=margin)
    assert judge(one_cell(np.zeros(haystacks)), rule).outcome == "inconclusive"
    assert judge(one_cell(np.zeros(haystacks + 1)), rule).outcome == "pass"


def tokens(new: list[float], old: list[float], most: float = 0.8, limit: int = 1000) -> Tokens:
    """Tokens of one cell whose questions have haystacks of their own."""
    shares = (most * np.array(old) - np.array(new)) / limit
    return Tokens(one_cell(shares), float(np.mean(new)), float(np.mean(old)), most, limit)


def test_a_model_that_thinks_less_passes_where_it_writes_surely_fewer_tokens():
    # each gains 0.2 of the limit; if a lost one runs on to the limit, one in six may be lost: 1/6 · 5/6 · 1.2² = 0.2
    verdict = judge(one_cell(np.zeros(500)), tokens=tokens([200.0] * 100, [500.0] * 100))
    score, line = verdict.lines
    assert (verdict.outcome, score.outcome, line.outcome) == ("pass", "pass", "pass")
    error = math.sqrt(0.2 / 100)
    assert line.p_pass == pytest.approx(scipy.stats.t.sf(0.2 / error, 99))
    away = scipy.stats.t.ppf(0.95, 99) * error
    assert (line.difference, line.high) == pytest.approx((-200, -1000 * (0.2 - away)))
    told = "output_tokens: 200.0 per question against 500.0, 0.40 times (new - 0.8 × old: -200.0 to -125.7)"
    assert line.reason.startswith(told)
    assert line.reason.endswith(" on 100 items in 100 haystacks; fewer than 0.8 times as many")


def test_fewer_tokens_are_not_sure_where_a_question_that_runs_on_may_be_unseen():
    verdict = judge(one_cell(np.zeros(500)), tokens=tokens([200.0] * 10, [500.0] * 10))
    line = verdict.lines[-1]  # (5/6)¹⁰ = 0.16
    assert (verdict.outcome, line.outcome, line.p_pass) == (
        "inconclusive",
        "inconclusive",
        pytest.approx((5 / 6) ** 10),
    )
    assert line.items_needed is not None and verdict.items_needed == line.items_needed >= 17  # (5/6)¹⁷ < 0.05
    assert ElementTree.fromstring(verdict.to_junit_xml()).get("errors") == "1"


def test_a_model_that_writes_more_tokens_fails_whatever_its_score():
    better = one_cell(np.array([1.0] * 50 + [0.0] * 450))
    verdict = judge(better, GateRule(output_tokens=0.8), tokens=tokens([600.0] * 100, [500.0] * 100))
    assert [line.outcome for line in verdict.lines] == ["pass", "fail"] and verdict.outcome == "fail"
    assert verdict.lines[-1].reason.endswith("more than 0.8 times as many")
    assert json.loads(verdict.to_json())["rule"]["output_tokens"] == 0.8


@pytest.mark.parametrize(("most", "outcome"), [(0.8, "fail"), (1.0, "pass")])
def test_a_model_that_is_its_baseline_writes_as_many_tokens(most: float, outcome: str):
    assert same_merge(GateRule(output_tokens=most), new="a", old="b").outcome == outcome
