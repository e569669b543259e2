"""The race on paper, and its promises: deterministic, resumable in any order, never below `keep`."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict
from random import Random

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs.errors import BadInput, CorruptData
from orchestrator.judging.estimates import macro_mean
from orchestrator.judging.race import Block, Race, Standing, left_by_name
from orchestrator.judging.samples import Cell, cell_sample

CELLS = [Cell("vt", 4096), Cell("cwe", 4096), Cell("vt", 8192)]
Answer = Callable[[str, Cell, int], float]


def answers(seed: int, skill: dict[str, float], items: int = 200) -> Answer:
    """Right with the chance `skill[point]`, keyed by the seed; the harder items are the same for every point."""
    random = np.random.Generator(np.random.Philox(key=seed))
    easy = random.random((len(CELLS), items))
    own = {point: random.random((len(CELLS), items)) for point in sorted(skill)}
    column = {cell: index for index, cell in enumerate(CELLS)}

    def answer(point: str, cell: Cell, item: int) -> float:
        mixed = 0.7 * easy[column[cell], item] + 0.3 * own[point][column[cell], item]
        return float(mixed < skill[point])

    return answer


def drive(race: Race, answer: Answer) -> Race:
    while blocks := race.next_blocks():
        for block in blocks:
            race.record(block.point, block.cell, block.items, [answer(block.point, block.cell, i) for i in block.items])
        race.eliminate()
    return race


SKILL = {"a": 0.55, "b": 0.6, "c": 0.3, "d": 0.1, "e": 0.58, "f": 0.35}


def test_a_point_leaves_on_the_figures_on_paper():
    cell = Cell("vt", 4096)
    race = Race(["good", "bad", "fair"], [cell], rungs=[20, 40])
    race.record("good", cell, range(20), [1.0] * 20)
    race.record("bad", cell, range(20), [1.0] * 2 + [0.0] * 18)
    race.record("fair", cell, range(20), [1.0] * 13 + [0.0] * 7)
    (departure,) = race.eliminate()
    # differences: eighteen 1 and two 0; mean 0.9, error √(0.9·0.1/19) = 0.0688; Student's quantile with the tail of
    # three standard errors, 0.00135, and 19 degrees of freedom is 3.45
    # fair: mean 0.35, error √(0.35·0.65/19) = 0.109, bound 0.377: stays
    assert (departure.point, departure.rival, departure.rung, departure.items) == ("bad", "good", 0, 20)
    assert departure.gap == pytest.approx(0.9)
    assert departure.standard_error == pytest.approx(math.sqrt(0.09 / 19))
    assert departure.bound == pytest.approx(math.sqrt(0.09 / 19) * scipy.stats.t.ppf(scipy.stats.norm.cdf(3), 19))
    assert "90.00 points behind good after 20 items" in departure.reason
    assert race.live == ("fair", "good")
    assert {(block.point, block.items) for block in race.next_blocks()} == {
        ("fair", range(20, 40)),
        ("good", range(20, 40)),
    }


@pytest.mark.parametrize(("written", "left"), [(99, []), (100, ["bad"]), (math.inf, ["bad"])])
def test_a_point_that_writes_less_than_the_best_stays_where_the_race_says_so(written: float, left: list[str]) -> None:
    for shorter_stay in (False, True):
        race = Race(["good", "bad"], CELLS, rungs=[20], shorter_stay=shorter_stay)
        for cell in CELLS:
            race.record("good", cell, range(20), [1.0] * 20, [100] * 20)
            race.record("bad", cell, range(20), [1.0] * 2 + [0.0] * 18, [written] * 20)
        assert [departure.point for departure in race.eliminate()] == (left if shorter_stay else ["bad"])


def test_rare_total_losses_keep_a_point_that_the_spread_would_drop():
    # a steady lead of 0.3 and no loss seen: if the leader loses q = 0.3/1.3 of its haystacks completely, the points are
    # equal; it loses none of n with (1/1.3)ⁿ, 0.0014 of 25 and 0.00084 of 27; a race of 3 standard errors asks 0.00135
    for haystacks, leave in ((25, 0), (27, 1)):
        race = Race(["steady", "other"], [Cell("vt", 4096)], rungs=[haystacks])
        race.record("steady", Cell("vt", 4096), range(haystacks), [0.8] * haystacks)
        race.record("other", Cell("vt", 4096), range(haystacks), [0.5 + 1e-6 * (i % 2) for i in range(haystacks)])
        assert len(race.eliminate()) == leave


def test_where_one_task_tells_points_apart_its_haystacks_alone_are_degrees_of_freedom():
    tasks = [Cell(f"task_{number}", 4096) for number in range(13)]
    right = {"best": [1] * 12, "worse": [1, 1] + [0] * 10}
    race = Race(["best", "worse"], tasks, rungs=[12], z=2)
    for point, answers_of_one in right.items():
        for number, cell in enumerate(tasks):
            race.record(point, cell, range(12), answers_of_one if number == 0 else [1] * 12)
    (departure,) = race.eliminate()
    # differences in one task of 13: ten 1 and two 0, error √((10/12)(2/12)/11)/13
    error = math.sqrt(10 / 12 * 2 / 12 / 11) / 13
    assert departure.standard_error == pytest.approx(error)
    assert departure.bound == pytest.approx(error * scipy.stats.t.ppf(scipy.stats.norm.cdf(2), 11))


def test_nobody_leaves_before_five_haystacks_of_each_task():
    for haystacks, leave in ((4, 0), (5, 1)):
        race = Race(["right", "wrong"], [Cell(f"t{n}", 4096) for n in range(13)], rungs=[8 * haystacks], z=1,
                    items_per_haystack=8)  # fmt: skip
        for cell in race.cells:
            for point in race.points:
                race.record(point, cell, range(8 * haystacks), [float(point == "right")] * (8 * haystacks))
        assert len(race.eliminate()) == leave


def test_the_paired_error_is_that_of_the_statistics_module():
    random = np.random.Generator(np.random.Philox(key=1))
    scores = random.random((2, len(CELLS), 24)) * np.array([1.0, 0.2])[:, None, None]
    for haystack, shared in [(1, False), (4, False), (1, True), (4, True)]:
        race = Race(
            ["p", "q"], CELLS, rungs=[24], z=0.01, items_per_haystack=haystack, items_shared_across_lengths=shared
        )
        for point, rows in zip(["p", "q"], scores, strict=True):
            for cell, row in zip(CELLS, rows, strict=True):
                race.record(point, cell, range(24), row)
        (departure,) = race.eliminate()
        samples = [
            cell_sample(
                *cell[:2], p - q, [f"{cell.task} {'' if shared else cell.length} {i // haystack}" for i in range(24)]
            )
            for cell, p, q in zip(CELLS, *scores, strict=True)
        ]
        estimate = macro_mean(samples)
        assert departure.gap == pytest.approx(estimate.mean)
        assert departure.standard_error == pytest.approx(estimate.standard_error)


def test_alpha_is_shared_over_points_and_rungs():
    cell = Cell("vt", 4096)
    race = Race(["good", "bad"], [cell], rungs=[10, 20], alpha=0.05)
    race.record("good", cell, range(10), [1.0] * 10)
    race.record("bad", cell, range(10), [1.0] + [0.0] * 9)
    (departure,) = race.eliminate()
    assert departure.bound == pytest.approx(0.1 * scipy.stats.t.ppf(1 - 0.05 / 4, 9))


def test_with_keep_alpha_is_shared_over_the_best_too_and_each_of_them_must_be_ahead():
    cell = Cell("vt", 4096)
    scores = {"a": [1.0] * 30 + [0.0] * 10, "b": [0.0] * 10 + [1.0] * 30, "c": [1.0] * 28 + [0.0] * 12}
    race = Race([*scores, "d"], [cell], rungs=[40], keep=2, alpha=0.1)
    for point, answered in {**scores, "d": [0.0] * 40}.items():
        race.record(point, cell, range(40), answered)
    (departure,) = race.eliminate()
    # a and b are ahead of d by 30 of 40: error √(0.75·0.25/39); four points, one rung, two that must not be dropped
    assert departure.point == "d" and departure.rival in ("a", "b")
    assert departure.bound == pytest.approx(math.sqrt(0.75 * 0.25 / 39) * scipy.stats.t.ppf(1 - 0.1 / (2 * 4 * 1), 39))


def test_one_haystack_drops_nobody():
    cell = Cell("vt", 4096)
    race = Race(["good", "bad"], [cell], rungs=[8], items_per_haystack=8)
    race.record("good", cell, range(8), [1.0] * 8)
    race.record("bad", cell, range(8), [0.0] * 8)
    assert race.eliminate() == []


def test_two_haystacks_are_no_ground_to_leave_however_many_questions_they_carry():
    race = Race(["right", "wrong"], [Cell("vt", 4096)], rungs=[10, 80], items_per_haystack=8)
    for items, leave in ((range(16), 0), (range(16, 80), 1)):
        for point in race.live:
            race.record(point, Cell("vt", 4096), items, [float(point == "right")] * len(items))
        departures = race.eliminate()
        assert len(departures) == leave
    # ten haystacks that agree: one of two more might not, (1/12)(11/12)/10, and 9 degrees of freedom
    assert departures[0].bound == pytest.approx(math.sqrt(11 / 1440) * scipy.stats.t.ppf(scipy.stats.norm.cdf(3), 9))


def test_of_equal_points_few_leave_on_few_haystacks():
    """Eleven equal points, four questions a haystack that are right or wrong together: nobody should leave."""
    random, left, races = np.random.Generator(np.random.Philox(key=3)), 0, 100
    for _ in range(races):
        race = Race([f"p{i}" for i in range(11)], [Cell("vt", 4096)], rungs=[8, 12], items_per_haystack=4)
        for point in race.points:
            race.record(point, Cell("vt", 4096), range(12), np.repeat(random.random(3) < 0.5, 4).astype(float))
        left += bool(race.eliminate())
    assert left <= 3, "of a hundred; with three plain standard errors 40"


def test_the_second_best_is_not_lost_to_the_leader():
    cell = Cell("vt", 4096)
    right = {"best": 20, "second": 10, "third": 8, "worst": 0}
    for keep, gone in [(1, ["worst", "third", "second"]), (2, ["worst"])]:
        race = Race(list(right), [cell], rungs=[20], keep=keep)
        for point, count in right.items():
            race.record(point, cell, range(20), [1.0] * count + [0.0] * (20 - count))
        # third: two of twenty behind the second, error √(0.1·0.9/19) = 0.069; all lie 4 errors and more behind the best
        assert [departure.point for departure in race.eliminate()] == gone


def test_rungs_are_rounded_up_to_whole_haystacks():
    assert Race(["p"], CELLS, rungs=[10, 12, 25], items_per_haystack=8).rungs == (16, 32)


def test_the_best_wins_and_the_rest_left_with_reasons():
    race = drive(Race(list(SKILL), CELLS, rungs=[10, 50, 200]), answers(2, SKILL))
    assert race.finished
    assert race.standing()[0].point == "b"
    assert {departure.point for departure in race.departures} >= {"c", "d", "f"}
    assert all(departure.gap > departure.bound > 0 for departure in race.departures)
    assert race.spent() < race.full_cost()
    json.dumps([asdict(departure) for departure in race.departures])


@pytest.mark.parametrize("keep", [1, 2, 4, 6])
def test_never_fewer_than_keep_stay(keep: int):
    race = drive(Race(list(SKILL), CELLS, rungs=[10, 50, 200], keep=keep), answers(3, SKILL))
    assert len(race.live) >= keep
    standing = race.standing()
    assert {row.point for row in standing[: len(race.live)]} == set(race.live)
    assert all(row.items == 200 for row in standing[: len(race.live)])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 9))
def test_decisions_do_not_depend_on_the_order_or_size_of_what_is_recorded(seed: int, portion: int):
    random = Random(seed)
    answer = answers(4, SKILL, items=60)
    expected = drive(Race(list(SKILL), CELLS, rungs=[10, 60]), answer)
    everything = [
        (point, cell, range(start, min(start + portion, 60)))
        for point in SKILL
        for cell in CELLS
        for start in range(0, 60, portion)
    ]
    random.shuffle(everything)
    names = list(SKILL)
    random.shuffle(names)
    race = Race(names, CELLS, rungs=[10, 60])
    for point, cell, items in everything:
        race.record(point, cell, items, [answer(point, cell, item) for item in items])
        if random.random() < 0.2:
            race.eliminate()
    race.eliminate()
    assert race.departures == expected.departures
    assert race.standing()[: len(race.live)] == expected.standing()[: len(race.live)]


def test_resume_asks_only_for_what_is_missing():
    answer = answers(5, SKILL, items=60)
    recorded: list[Block] = []
    first = Race(list(SKILL), CELLS, rungs=[10, 60])
    for block in first.next_blocks()[:-3]:
        first.record(block.point, block.cell, block.items, [answer(block.point, block.cell, i) for i in block.items])
        recorded.append(block)
    again = Race(list(SKILL), CELLS, rungs=[10, 60])
    for block in reversed(recorded):
        again.record(block.point, block.cell, block.items, [answer(block.point, block.cell, i) for i in block.items])
    assert again.next_blocks() == first.next_blocks()
    assert len(again.next_blocks()) == 3
    assert drive(again, answer).departures == drive(first, answer).departures


def test_a_hole_in_the_middle_is_asked_for_alone():
    race = Race(["p"], [CELLS[0]], rungs=[10])
    race.record("p", CELLS[0], [0, 1, 2, 6, 9], [1, 1, 1, 1, 1])
    assert [(block.items.start, block.items.stop) for block in race.next_blocks()] == [(3, 6), (7, 9)]


def test_costly_blocks_come_first():
    race = Race(["p", "q"], CELLS, rungs=[10], costs={CELLS[0]: 1.0, CELLS[1]: 5.0, CELLS[2]: 3.0})
    assert [(block.cell, block.point) for block in race.next_blocks()] == [
        (cell, point) for cell in (CELLS[1], CELLS[2], CELLS[0]) for point in ("p", "q")
    ]
    assert race.full_cost() == 2 * 10 * 9
    race.record("p", CELLS[1], range(4), [0.0] * 4)
    assert race.spent() == 20


def test_ties_are_broken_by_name():
    race = drive(Race(["z", "m", "b"], CELLS, rungs=[10, 20]), lambda point, cell, item: float(item % 2))
    assert [row.point for row in race.standing()] == ["b", "m", "z"]
    assert race.departures == []


def test_the_macro_score_weighs_tasks_within_lengths():
    race = Race(["p"], CELLS, rungs=[10])
    for cell, score in zip(CELLS, [1.0, 0.0, 0.2], strict=True):
        race.record("p", cell, range(10), [score] * 10)
    assert race.standing()[0].score == pytest.approx((0.5 + 0.2) / 2)


def test_winners_are_confirmed_on_fresh_items():
    answer = answers(6, SKILL, items=260)
    race = Race(list(SKILL), CELLS, rungs=[10, 200], keep=2, confirmation=60)
    confirmed: set[tuple[str, int, int]] = set()
    while blocks := race.next_blocks():
        for block in blocks:
            if block.items.start >= 200:
                confirmed.add((block.point, block.items.start, block.items.stop))
            race.record(block.point, block.cell, block.items, [answer(block.point, block.cell, i) for i in block.items])
        race.eliminate()
    assert race.finished
    first, second, *rest = race.standing()
    assert confirmed == {(first.point, 200, 260), (second.point, 200, 260)}
    assert all(row.confirmed is None for row in rest)
    by_cell = [np.mean([answer(first.point, cell, item) for item in range(200, 260)]) for cell in CELLS]
    assert first.confirmed == pytest.approx((by_cell[0] + by_cell[1]) / 4 + by_cell[2] / 2)


def test_the_confirmed_score_is_free_of_the_winners_curse():
    # forty equal points: the winner's own score is too high by chance alone, its confirmed one is not
    skill = {f"p{index:02d}": 0.5 for index in range(40)}
    selected, confirmed = [], []
    for seed in range(20):
        random = np.random.Generator(np.random.Philox(key=seed))
        table = {(point, cell): random.random(50) < 0.5 for point in sorted(skill) for cell in CELLS}
        race = drive(
            Race(list(skill), CELLS, rungs=[25], confirmation=25),
            lambda point, cell, item, table=table: float(table[point, cell][item]),
        )
        winner = race.standing()[0]
        selected.append(winner.score)
        confirmed.append(winner.confirmed)
    assert np.mean(selected) > 0.57
    # sd of one macro score: √((½² + ¼² + ¼²)·¼/25) = 0.061
    assert np.mean(confirmed) == pytest.approx(0.5, abs=4 * 0.061 / math.sqrt(20))


def test_points_left_out_by_their_names_alone():
    scores = {"a": 0.75, "b": 0.5, "c": 0.5, "d": 0.5, "e": 0.25}
    standing = [Standing(point, score, 4, None, None) for point, score in scores.items()]
    standing.append(Standing("f", 0.5, 4, 0, None))  # left the race, with fewer items
    assert [left_by_name(standing, count) for count in range(1, 7)] == [[], ["c", "d"], ["d"], [], [], []]
    assert left_by_name([], 1) == []


def test_contradictions_are_refused():
    race = Race(["p"], CELLS, rungs=[10])
    race.record("p", CELLS[0], [0, 1], [0.0, 1.0])
    race.record("p", CELLS[0], [1, 2], [1.0, 1.0])
    with pytest.raises(CorruptData, match="two different scores"):
        race.record("p", CELLS[0], [0], [1.0])
    for items, scores in [([0], [1.5]), ([3], [math.nan]), ([3, 4], [1.0]), ([10], [1.0]), ([-1], [1.0])]:
        with pytest.raises(CorruptData, match="p, vt at 4096"):
            race.record("p", CELLS[0], items, scores)


@pytest.mark.parametrize(
    ("points", "options"),
    [
        (["p", "p"], {}),
        ([], {}),
        (["p"], {"rungs": []}),
        (["p"], {"rungs": [25, 10]}),
        (["p"], {"rungs": [0, 10]}),
        (["p"], {"keep": 0}),
        (["p"], {"z": 0.0}),
        (["p"], {"alpha": 1.0}),
    ],
)
def test_nonsense_is_refused(points: list[str], options: dict[str, float]):
    with pytest.raises(BadInput, match="race"):
        Race(points, CELLS, **options)
