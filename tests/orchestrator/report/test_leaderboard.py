"""The table's numbers, worked out by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from jobs.evaluate import RaceSpec
from orchestrator.evaluating.subjects import RacePlan
from orchestrator.judging.estimates import macro_score
from orchestrator.judging.race import Departure
from orchestrator.judging.sampled import by_item
from orchestrator.judging.samples import cell_sample
from orchestrator.report.leaderboard import context_note, leaderboard, perplexity_by_position
from orchestrator.report.terminal.leaderboard import print_leaderboard
from orchestrator.words import short_length
from tests.orchestrator.scores import cell, result, row, standing
from workers.benchmarks.ruler.tasks import TASKS

POINT = [
    *cell("a", "vt", 512, [1, 1, 1, 0]),  # 75
    *cell("a", "cwe", 512, [0.5, 0.5, 0.5, 0.5]),  # 50
    *cell("a", "vt", 1024, [1, 0, 0, 0]),  # 25
    *cell("a", "cwe", 1024, [0.5, 0.5, 0, 0]),  # 25
]


def test_tasks_count_alike_within_a_length_and_lengths_alike() -> None:
    [line] = leaderboard(result(POINT, [standing("a")]))
    assert dict(line.by_length) == {512: 62.5, 1024: 25}
    assert line.score == pytest.approx((62.5 + 25) / 2)
    assert line.weighted is not None and line.weighted[0] == pytest.approx((1 * 62.5 + 2 * 25) / 3)
    assert line.items == 16


def test_the_interval_is_students_over_haystacks() -> None:
    # one cell, four haystacks: sd of (1, 1, 1, 0) is 1/2, its standard error 1/4, t(0.975; 3) = 3.182446
    [line] = leaderboard(result(cell("a", "vt", 512, [1, 1, 1, 0]), [standing("a")]))
    assert line.half_width == pytest.approx(100 * 3.182446 / 4, rel=1e-5)


def test_answers_that_are_all_right_are_not_sure_to_stay_so() -> None:
    # two successes and two failures more: 22 of 24, variance 22/24 · 2/24 / 24 = 0.0031829; t(0.975; 19) = 2.093024
    [line] = leaderboard(result(cell("a", "vt", 512, [1.0] * 20), [standing("a")]))
    assert (line.score, line.half_width) == (100, pytest.approx(100 * 2.093024 * 0.0031829**0.5, rel=1e-4))


def test_where_two_benchmarks_rank_each_has_its_own_score() -> None:
    rows = [*cell("a", "vt", 512, [1, 1]), *cell("a", "needle", 512, [0, 0.5], benchmark="needle")]
    [line] = leaderboard(result(rows, [standing("a")]))
    assert (line.score, dict(line.by_benchmark)) == (62.5, {"ruler": 100, "needle": 25})
    [alone] = leaderboard(result(cell("a", "vt", 512, [1, 1]), [standing("a")]))
    assert alone.by_benchmark == {}


def test_one_haystack_alone_has_no_interval(capsys: pytest.CaptureFixture[str]) -> None:
    evaluated = result(cell("a", "vt", 512, [1, 1], haystack="one"), [standing("a")])
    lines = leaderboard(evaluated)
    assert lines[0].half_width == math.inf
    assert json.loads(json.dumps(lines[0].document(), allow_nan=False))["half_width"] is None
    print_leaderboard(lines, evaluated)
    assert "inf" not in capsys.readouterr().out


def test_the_effective_length_is_the_longest_with_everything_before_it_above_the_threshold() -> None:
    rows = [*cell("a", "vt", 512, [1] * 8), *cell("a", "vt", 1024, [0] * 8), *cell("a", "vt", 2048, [1] * 8)]
    [line] = leaderboard(result(rows, [standing("a")]))
    assert line.effective is not None and line.effective.length == 512


def test_relative_to_each_parent_a_lower_score_will_do() -> None:
    rows = [
        *cell("a", "vt", 512, [1, 1, 0, 0]),  # 50: below RULER's threshold, above 85 % of 55
        *cell("long", "vt", 512, [1, 1, 0.2, 0]),  # 55
        *cell("fmt", "vt", 512, [1, 1, 1, 0]),  # 75
    ]
    evaluated = result(rows, [standing("a")], baselines=("long", "fmt"), parents={"long": "long", "fmt": "fmt"})
    line, *_ = leaderboard(evaluated)
    assert line.effective is not None and line.effective.length == 0
    assert {parent: length.length for parent, length in line.relative.items()} == {"long": 512, "fmt": 0}


def test_effective_is_what_the_columns_show() -> None:
    rows = [
        *cell("a", "vt", 4096, [1, 1, 1, 0]),  # 75; with the needle 87.5, above the threshold
        *cell("a", "needle", 4096, [1] * 8, benchmark="needle"),
        *cell("a", "needle", 131072, [1] * 8, benchmark="needle"),
    ]
    [line] = leaderboard(result(rows, [standing("a")]))
    assert line.by_length == {4096: 87.5, 131072: 100.0}
    assert line.effective is not None and (line.effective.length, line.effective.low) == (131072, 0)
    assert line.weighted == pytest.approx(((87.5 + 2 * 100) / 3, (2 * 87.5 + 100) / 3)) and not line.as_published


def test_benchmarks_weigh_alike_and_a_table_of_fifties_reaches_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        entry
        for length in (512, 1024)
        for entry in (
            *(answer for task in TASKS for answer in cell("a", task, length, [1] * 8)),
            *cell("a", "needle", length, [0] * 8, benchmark="needle"),
        )
    ]
    evaluated = result(rows, [standing("a")])
    [line] = leaderboard(evaluated)
    assert line.score == pytest.approx(50) and dict(line.by_length) == pytest.approx({512: 50, 1024: 50})
    assert line.effective is not None and (line.effective.length, line.effective.high) == (0, 0)
    assert line.document()["effective_length_as_published"] is False
    print_leaderboard([line], evaluated)
    out = " ".join(capsys.readouterr().out.split())
    assert "effective*" in out and "* not comparable with RULER's published lengths" in out
    assert "longest length at which RULER and the needle are ≥ 85.6" in out


def test_all_of_rulers_tasks_compare_with_what_is_published(capsys: pytest.CaptureFixture[str]) -> None:
    evaluated = result([entry for task in TASKS for entry in cell("a", task, 512, [1] * 4)], [standing("a")])
    lines = leaderboard(evaluated)
    print_leaderboard(lines, evaluated)
    out = capsys.readouterr().out
    assert lines[0].document()["effective_length_as_published"] is True
    assert "effective" in out and "*" not in out and "not comparable" not in out


def test_the_fresh_items_of_a_winner_stay_out_of_its_score() -> None:
    race = RacePlan(RaceSpec(), "ruler", items=4, fresh=2, share=1)
    rows = [*cell("a", "vt", 512, [1, 1, 1, 1, 0, 0]), *cell("b", "vt", 512, [1, 1, 1, 0])]
    first, second = leaderboard(result(rows, [standing("a", confirmed=0.0), standing("b")], race=race))
    assert (first.score, second.score) == (100.0, 75.0)
    assert first.effective is not None and first.effective.length == 512
    assert first.note == "0.0 on fresh items"


def test_wavg_weighs_lengths_as_ruler_does() -> None:
    rows = [*cell("a", "vt", 512, [1] * 4), *cell("a", "vt", 1024, [1, 1, 0, 0]), *cell("a", "vt", 2048, [0] * 4)]
    [line] = leaderboard(result(rows, [standing("a")]))
    assert line.weighted == pytest.approx(((1 * 100 + 2 * 50) / 6, (3 * 100 + 2 * 50) / 6))


def test_without_ruler_the_needle_says_how_far_a_context_reaches() -> None:
    rows = [
        *cell("a", "needle", 512, [1] * 8, benchmark="needle"),
        *cell("a", "needle", 1024, [0] * 8, benchmark="needle"),
    ]
    evaluated = replace(result(rows, [standing("a")]), ranked=("needle",))
    [line] = leaderboard(evaluated)
    assert line.effective is not None and line.effective.length == 512
    assert context_note(evaluated) == "the needle is"


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        (TASKS, "RULER is"),
        ([*TASKS, "qa_generated"], "RULER and qa_generated are"),
        ([*TASKS[:-1], "qa_generated"], "12 of RULER's 13 tasks and qa_generated are"),
        (TASKS[:11], "11 of RULER's 13 tasks are"),
        (["vt"], "1 of RULER's 13 tasks is"),
        (["qa_generated"], "qa_generated is"),
    ],
)
def test_effective_says_how_many_of_rulers_real_tasks_were_asked(tasks: Sequence[str], said: str) -> None:
    evaluated = result([entry for task in tasks for entry in cell("a", task, 512, [1] * 4)], [standing("a")])
    assert context_note(evaluated) == said
    [line] = leaderboard(evaluated)
    assert line.document()["effective_length_of"] == said.rpartition(" ")[0]


def test_points_come_in_the_order_of_the_race_and_parents_after() -> None:
    rows = [row(name, "vt", 512, item, score) for name, score in (("a", 0), ("b", 1), ("p", 1)) for item in range(2)]
    departure = Departure("a", 0, "b", 1.0, 0.0, 0.0, 2, "far behind")
    evaluated = result(
        rows,
        [standing("b", confirmed=0.5), standing("a", departed_at_rung=0)],
        departures=(departure,),
        baselines=("p",),
        parents={"p": "p", "q": "b"},
        same={"twin": "b"},
    )
    lines = leaderboard(evaluated)
    assert [(line.kind, line.title, line.note) for line in lines] == [
        ("point", "b", "50.0 on fresh items, = twin, = parent q"),
        ("point", "a", "left at 2 items"),
        ("parent", "p (parent)", ""),
    ]


def test_what_does_not_rank_stands_beside() -> None:
    rows = [
        *cell("a", "vt", 512, [1, 1]),
        *cell("a", "needle", 1024, [1, 0], benchmark="needle"),
        *cell("a", "arc_easy:acc", 0, [1, 1, 1, 0], benchmark="lm_eval"),
    ]
    [line] = leaderboard(result(rows, [standing("a")], ranked=("ruler",)))
    assert line.score == 100 and dict(line.by_length) == {512: 100}
    assert dict(line.beside) == {"arc_easy:acc": 75, "needle": 50}


def test_items_that_were_too_long_to_ask_rank_nobody() -> None:
    rows = [
        *cell("a", "mine:acc", 0, [1, 0], benchmark="lm_eval"),
        *cell("a", "mine:over_long", 0, [0, 0, 1, 1], benchmark="lm_eval"),
    ]
    [line] = leaderboard(result(rows, [standing("a")], ranked=("lm_eval",)))
    assert line.score == 50 and line.effective is None
    assert dict(line.beside) == {"mine:acc": 50, "mine:over_long": 50}


def test_answers_that_are_no_numbers_are_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = cell("a", "vt", 512, [0, 0, 0], finite=False)
    evaluated = result(rows, [standing("a")])
    [line] = leaderboard(evaluated)
    assert line.note == "3 answers had NaN or infinite logits"
    monkeypatch.setenv("COLUMNS", "30")
    print_leaderboard([line], evaluated)
    assert "answers with NaN or infinite logits: a 3" in " ".join(capsys.readouterr().out.split())


def test_unanswered_questions_are_counted_in_a_column_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    silent = [*cell("a", "vt", 512, [0, 0, 0], status="empty"), *cell("a", "cwe", 512, [1, 1], answer="x")]
    for rows, shown in ((silent, True), (POINT, False)):
        evaluated = result([*rows, *cell("b", "vt", 512, [1, 1, 1])], [standing("a"), standing("b")])
        lines = leaderboard(evaluated)
        print_leaderboard(lines, evaluated)
        out = " ".join(capsys.readouterr().out.split())
        assert ("unanswered" in out) == shown
    assert lines[0].document()["unanswered"]["cells"] == []
    lines = leaderboard(result([*silent, *cell("b", "vt", 512, [1])], [standing("a"), standing("b")]))
    print_leaderboard(lines, evaluated)
    out = " ".join(capsys.readouterr().out.split())
    assert "3/5" in out and "0/1" not in out and "unanswered: of a, 3 of 5 answers are empty" in out
    found = lines[0].document()["unanswered"]
    assert (found["asked"], found["empty"], found["failed"]) == (5, 3, 0)
    assert [(cell["task"], cell["length"], cell["asked"], cell["empty"]) for cell in found["cells"]] == [
        ("vt", 512, 3, 3)
    ]


def test_an_interval_is_no_wider_than_scores_can_be(capsys: pytest.CaptureFixture[str]) -> None:
    # two haystacks, one right: standard error 1/2, t(0.975; 1) = 12.7
    evaluated = result(cell("a", "vt", 512, [1, 0]), [standing("a")])
    print_leaderboard(leaderboard(evaluated), evaluated)
    assert "50.0 ±100.0" in capsys.readouterr().out


def test_perplexity_weighs_every_token_alike() -> None:
    common = {"benchmark": "perplexity"}
    rows = [
        row("a", "position_block_0", 1024, 0, 0.5, tokens=100, **common),
        row("a", "position_block_0", 1024, 1, 0.125, tokens=300, **common),
        row("a", "position_block_1", 1024, 0, 0.25, tokens=256, **common),
        row("a", "position_block_2", 1024, 0, 0.0, tokens=512, finite=False, **common),
    ]
    by_position = perplexity_by_position(rows)
    # (100·ln 2 + 300·ln 8) / 400 = 2.5·ln 2
    assert by_position == {1024: {0: pytest.approx(2**2.5), 256: pytest.approx(4), 512: math.inf}}


def test_the_table_shows_every_figure(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*POINT, *cell("a", "position_block_0", 1024, [0.5], benchmark="perplexity")]
    evaluated = result(rows, [standing("a")], ranked=("ruler",))
    print_leaderboard(leaderboard(evaluated), evaluated)
    out = capsys.readouterr().out
    assert [word for word in out.split() if word in {"512", "1K", "43.8", "62", "25", "perplexity"}] == [
        *("512", "1K", "43.8", "62", "25", "perplexity", "1K")
    ]


def test_a_long_grid_shows_the_best_and_the_parents(capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"p{number:02d}" for number in range(30)]
    rows = [row(name, "vt", 512, item, 1) for name in [*names, "long"] for item in range(2)]
    evaluated = result(rows, [standing(name) for name in names], baselines=("long",), parents={"long": "long"})
    print_leaderboard(leaderboard(evaluated), evaluated)
    out = capsys.readouterr().out
    assert "p19" in out and "p20" not in out and "long" in out and "… and 10 more points" in out


@pytest.mark.parametrize(("length", "text"), [(512, "512"), (1024, "1K"), (131072, "128K"), (1500, "1500")])
def test_lengths_are_written_as_people_say_them(length: int, text: str) -> None:
    assert short_length(length) == text


@pytest.mark.parametrize("shares", [[0.99] * 6, [1, 1, 0.3], [0.9] * 3])
def test_the_interval_covers_where_most_cells_are_all_right(shares: list[float]) -> None:
    # of 400 intervals at 95 %, fewer than 368 cover with chance 0.001 (binomial); without the correction it is 0.76
    random = np.random.Generator(np.random.Philox(key=11))
    covered = 0
    for _ in range(400):
        cells = [cell_sample("vt", length, random.random(24) < share) for length, share in enumerate(shares)]
        found = macro_score(cells)
        covered += found.low <= np.mean(shares) <= found.high
    assert covered >= 368


def test_thoughts_and_samples_have_columns_where_there_are_any(capsys: pytest.CaptureFixture[str]) -> None:
    scored = cell("a", "vt", 512, [1.0, 0.0, 1.0])
    plain = leaderboard(result(scored, [standing("a")]))
    print_leaderboard(plain, result(scored, [standing("a")]))
    assert "thought" not in (out := capsys.readouterr().out) and "pass@" not in out
    answers = [
        replace(row, sample=sample, score=float(sample == row.item), tokens_thought=1000, tokens_out=1012)
        for row in scored
        for sample in (0, 1)
    ]
    drawn = result(by_item(answers), [standing("a")], samples=answers)
    [line] = leaderboard(drawn)
    assert line.score == pytest.approx(100 * (0.5 + 0.5 + 0) / 3)
    assert line.pass_at == pytest.approx({1: 100 / 3, 2: 200 / 3})
    print_leaderboard([line], drawn)
    out = capsys.readouterr().out
    assert all(word in out for word in ("pass@2", "67", "thought", "1000", "answer", "12"))
    assert line.document()["tokens"] == {"thought": 1000, "answer": 12}
    assert line.unanswered.asked == 6
    once = [*cell("a", "t:over_long", 512, [0, 0, 1]), *cell("a", "arc:acc", 512, [0, 1, 1])]
    with_once = [*answers, *once]
    [beside] = leaderboard(result(by_item(with_once), [standing("a")], samples=with_once))
    assert beside.pass_at == line.pass_at, "what is asked once has no pass@2"
