"""Two models side by side: numbers from papers and arithmetic, and the command on real and on written runs."""

from __future__ import annotations

import json
import math
import shutil
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import scipy.stats

from jobs.errors import BadInput
from jobs.evaluation_tasks import ScoreRow
from jobs.sealing import sealed
from orchestrator.evaluating.pairing import pairs
from orchestrator.evaluating.results import EvaluationResult, write_results
from orchestrator.judging.significance import FlipRate
from orchestrator.report.scored_models import ScoredModel
from orchestrator.report.terminal.comparison import visible
from orchestrator.report.two_models import Comparison, compare_models
from tests.orchestrator.conftest import Ended
from tests.orchestrator.scores import cell, result, standing
from tests.orchestrator.tiny_jobs import PARENTS, RULER, job_text
from workers.benchmarks.items import Item, write_items
from workers.storage import open_store

Mergeyard = Callable[..., Ended]


def model(name: str, rows: Sequence[ScoreRow], **more: Any) -> ScoredModel:
    fields = {"run": "runs/a", "ranked": ("ruler", "needle"), "noise": None, "seed": 0}
    return ScoredModel(name=name, rows=rows, **{**fields, **more})


def compared(old: Sequence[ScoreRow], new: Sequence[ScoreRow]) -> Comparison:
    return compare_models(model("old", old), model("new", new))


def answers(point: str, scores: Sequence[float], task: str = "vt", length: int = 512, **more: Any) -> list[ScoreRow]:
    return cell(point, task, length, scores, **more)


# 14 items differ of 48: twelve won, two lost, as in Armitage & Berry 1994, p. 127
OLD = answers("old", [0] * 12 + [1] * 2 + [1] * 20 + [0] * 14)
NEW = answers("new", [1] * 12 + [0] * 2 + [1] * 20 + [0] * 14)


# ---- the numbers


def test_only_benchmarks_of_the_score_must_weigh_alike() -> None:
    """The ratio of ruler to needle is the same; perplexity stands beside the score, at 1 in both runs."""

    def rows(name: str, unit: float) -> list[ScoreRow]:
        return [
            *answers(name, [1.0, 0.0] * 3, weight=2 * unit),
            *answers(name, [1.0, 0.0] * 3, task="needle", benchmark="needle", weight=unit),
            *answers(name, [0.3] * 6, task="books_0", benchmark="perplexity"),
        ]

    assert compared(rows("old", 1.0), rows("new", 2.0)).overall.difference == 0
    with pytest.raises(BadInput, match="ruler weighs 4 for new and 2 for old, beside other benchmarks"):
        other = [replace(row, weight=1.0) if row.benchmark == "needle" else row for row in rows("new", 2.0)]
        compared(rows("old", 1.0), other)


def test_right_or_wrong_scores_get_mcnemars_exact_test() -> None:
    [line] = compared(OLD, NEW).cells
    assert (line.test, line.items, line.haystacks) == ("mcnemar", 48, 48)
    assert line.p == pytest.approx(0.0129, abs=5e-5)
    assert (line.a, line.b, line.difference) == pytest.approx((100 * 22 / 48, 100 * 32 / 48, 100 * 10 / 48))


def test_its_interval_is_bonett_and_prices() -> None:
    # R statpsych, ci.prop.ps(.05, 12, 4, 26, 6): 0.44, 0.2548067 to 0.6251933
    old = answers("old", [0] * 26 + [1] * 4 + [1] * 12 + [0] * 6)
    new = answers("new", [1] * 26 + [0] * 4 + [1] * 12 + [0] * 6)
    [line] = compared(old, new).cells
    assert (line.low, line.high) == pytest.approx((25.48067, 62.51933), abs=1e-4)


def test_fractional_scores_get_sign_flips() -> None:
    [line] = compared(answers("old", [0, 0, 0, 0.5, 0.5]), answers("new", [1, 1, 1, 0.5, 0.5])).cells
    assert (line.test, line.p) == ("sign-flip", 2 / 8)  # all three up: only this pattern and its mirror are as extreme


def test_small_gains_alone_are_tested_by_the_losses_that_are_missing() -> None:
    # a true mean of zero with gains of 0.2 and losses of 1 needs a loss in 6; none of 12 has the chance (5/6)^12
    [line] = compared(answers("old", [0.8] * 12), answers("new", [1.0] * 12)).cells
    assert (line.test, line.p) == ("binomial", pytest.approx((5 / 6) ** 12 / 0.8))
    assert line.low == 0.0


def test_questions_that_share_a_haystack_are_flipped_together() -> None:
    def shared(point: str, scores: Sequence[float]) -> list[ScoreRow]:
        rows = answers(point, scores)
        return [replace(row, haystack=f"h{row.item // 2}") for row in rows]

    [line] = compared(shared("old", [0] * 6), shared("new", [1] * 6)).cells
    assert (line.test, line.haystacks, line.p) == ("sign-flip", 3, 2 / 8)


def test_p_values_are_adjusted_over_the_table_by_holm() -> None:
    def three(point: str, scores: Sequence[Sequence[float]]) -> list[ScoreRow]:
        return [row for task, of in zip("xyz", scores, strict=True) for row in answers(point, of, task)]

    old, new = three("old", [[0] * 6, [0] * 8, [1] * 8]), three("new", [[1] * 6, [1] * 8, [1] * 8])
    lines = compared(old, new).cells
    assert [line.p for line in lines] == pytest.approx([2 / 64, 2 / 256, 1.0])
    assert [line.p_holm for line in lines] == pytest.approx([2 * 2 / 64, 3 * 2 / 256, 1.0])


def test_the_guard_against_rare_losses_is_adjusted_over_the_table_too() -> None:
    # gains of 1/20 hide a loss in 21: none of 72 has the p (20/21)^72 / 0.8 = 0.037, one table of ten lines ten times
    tasks = [f"t{number}" for number in range(10)]
    old = [row for task in tasks for row in answers("old", [0.9] * 72, task)]
    new = [row for task in tasks for row in answers("new", [0.95] * 72, task)]
    for line in compared(old, new).cells:
        assert (line.test, line.p) == ("binomial", pytest.approx((20 / 21) ** 72 / 0.8))
        assert line.p_holm == pytest.approx(10 * (20 / 21) ** 72 / 0.8)
    [alone] = compared(old[:72], new[:72]).cells
    assert (alone.test, alone.p_holm) == ("sign-flip", 1e-4)


def test_the_macro_score_weighs_tasks_alike_and_lengths_alike() -> None:
    old = [*answers("old", [0] * 10, "x"), *answers("old", [0] * 40, "y"), *answers("old", [0] * 20, "x", 1024)]
    new = [*answers("new", [1] * 10, "x"), *answers("new", [0] * 40, "y"), *answers("new", [0] * 20, "x", 1024)]
    found = compared(old, new)
    assert [(line.length, line.difference) for line in found.lengths] == [(512, 50.0), (1024, 0.0)]
    assert (found.overall.difference, found.overall.b, found.overall.items) == (25.0, 25.0, 70)


def test_the_overall_p_value_and_interval_agree() -> None:
    """Students t on the differences, with one gain and one loss more than were seen."""
    old, new = answers("old", [0.0, 0.5] * 30), answers("new", [0.5, 0.0] * 15 + [0.5, 0.5] * 15)
    overall = compared(old, new).overall
    differences = [0.5, -0.5] * 15 + [0.5, 0] * 15
    error = math.hypot(float(scipy.stats.sem(differences)), math.sqrt(2) * 0.5 / 60)
    mean = sum(differences) / 60
    assert overall.p == pytest.approx(2 * scipy.stats.t.sf(mean / error, 59))
    assert overall.high == pytest.approx(100 * (mean + scipy.stats.t.ppf(0.975, 59) * error))
    assert overall.detectable == pytest.approx(100 * (1.959964 + 0.841621) * error, rel=1e-5)


def test_overall_and_the_one_cell_that_decides_have_one_p_value() -> None:
    old, new = answers("old", [0.0] * 11 + [1.0] * 25), answers("new", [1.0] * 11 + [0.0] + [1.0] * 24)
    found = compared(old, new)
    assert found.overall.test == "mcnemar" and found.overall.p == found.cells[0].p == pytest.approx(26 / 2**12)


def test_models_that_agree_everywhere_are_not_surely_equal() -> None:
    overall = compared(answers("old", [1.0] * 20), answers("new", [1.0] * 20)).overall
    assert (overall.difference, overall.p) == (0.0, 1.0)
    assert overall.low < -5 and overall.high > 5  # one of twenty may well differ


def test_one_haystack_shows_nothing() -> None:
    found = compared(answers("old", [0, 0], haystack="h"), answers("new", [1, 0], haystack="h"))
    assert (found.overall.p, found.overall.low, found.overall.high) == (1.0, -100, 100)
    assert json.loads(json.dumps(found.document(), allow_nan=False))["overall"]["detectable"] is None


def test_only_what_both_answered_counts() -> None:
    found = compared(answers("old", [0] * 10), answers("new", [1] * 4))
    assert (found.overall.items, found.overall.difference) == (4, 100.0)


def test_benchmarks_that_do_not_rank_stay_out_of_the_macro_score() -> None:
    old = [*OLD, *cell("old", "boolq:acc", 0, [0] * 5, benchmark="lm_eval")]
    new = [*NEW, *cell("new", "boolq:acc", 0, [1] * 5, benchmark="lm_eval")]
    found = compared(old, new)
    assert found.overall.items == 48 and [line.task for line in found.cells] == ["boolq:acc", "vt"]


def test_perplexity_stands_beside() -> None:
    def likely(point: str, score: float) -> list[ScoreRow]:
        return cell(point, "perplexity_0", 512, [score] * 3, benchmark="perplexity")

    found = compared([*OLD, *likely("old", 0.5)], [*NEW, *likely("new", 0.25)])
    assert [line.task for line in found.cells] == ["vt"]
    assert found.perplexity[512][0] == pytest.approx((2.0, 4.0))
    assert not any(flip.benchmark == "perplexity" for flip in found.flips)


def test_flips_come_with_the_worst_losses_first() -> None:
    old = [*answers("old", [1, 0, 0.5, 1]), *answers("old", [1], "vt", 1024)]
    new = [*answers("new", [0, 1, 0.25, 1]), *answers("new", [0], "vt", 1024)]
    flips = compared(old, new).flips
    assert [(flip.length, flip.item) for flip in flips] == [(1024, 0), (512, 0), (512, 1), (512, 2)]


def test_pairs_are_new_minus_old_by_cell() -> None:
    [sample] = pairs(NEW, OLD)
    assert sample.values.sum() == 10 and sample.cell[:2] == ("vt", 512)
    with pytest.raises(BadInput, match="no items in common"):
        pairs(NEW, answers("old", [1], items="another set"))


# ---- what has nothing in common


@pytest.mark.parametrize(
    ("rows", "more", "says"),
    [
        (answers("new", [1], "cwe"), {}, "their tasks differ (vt against cwe)"),
        (answers("new", [1], "vt", 1024), {}, "their lengths differ (512 against 1024)"),
        (answers("new", [1], items="other"), {"seed": 7}, "their seeds differ (0 against 7)"),
        (answers("new", [1], items="other"), {}, "their tokenizers differ"),
        ([replace(row, item=row.item + 99) for row in answers("new", [1])], {}, "other items of the same sets"),
    ],
)
def test_no_question_in_common_says_what_differs(rows: list[ScoreRow], more: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput) as caught:
        compare_models(model("old", OLD), model("new", rows, **more))
    assert says in str(caught.value) and str(caught.value).startswith("old and new answered no question in common: ")


# ---- the command, on runs as they are left


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    """written(name, rows, **of the result): a run's folder with these scores, its job, plan and items."""

    def write(name: str, rows: Sequence[ScoreRow], seed: int = 0, ruler: dict[str, Any] = RULER, **more: Any) -> Path:
        run = tmp_path / "runs" / name
        store = open_store(run)
        points = list(dict.fromkeys(row.point for row in rows))
        job = job_text(tmp_path, name=name, seed=seed, evaluate={"ruler": ruler})
        store.write("job.yaml", job.encode())
        plan = {"parents": {"long": {"url": "/models/long"}}, "points": [{"name": p, "digest": p} for p in points]}
        store.write("plan.json", sealed(plan))
        evaluation: EvaluationResult = result(rows, [standing(point) for point in points], seed=seed, **more)
        write_results(store, evaluation)
        items = [
            Item("ruler", "vt", 512, index, (0.5,), f"vt-{index}", "", "?", "", (f"right {index}",), "all", 8, 10, "p")
            for index in range(48)
        ]
        store.write("items/set/000000-000024.parquet", write_items(items[:24]))
        store.write("items/set/000024-000048.parquet", write_items(items[24:]))
        return run

    return write


def test_the_table_says_who_won_and_shows_the_answers_that_flipped(
    mergeyard: Mergeyard, written: Callable[..., Path]
) -> None:
    new = [replace(row, answer=f" is {row.item}\n") for row in NEW]
    run = written("demo", [*OLD, *new], noise=FlipRate(1, 48, 1 / 48, 0.004, 0.109))
    ended = mergeyard("compare", run / "old", run / "new", "--flips", 3)
    assert ended.code == 0, ended.err
    assert "A  old\nB  new\nB − A: +20.83 points" in ended.out
    assert "vt   " in ended.out and "0.013" in ended.out
    assert "14 of 48 answers differ in score: 2 lost, 12 won" in ended.out
    assert "vt at 512, item 12: 100 → 0\n  expected  right 12\n  A         ∅\n  B         ·is 12↵" in ended.out
    assert ended.out.count("expected") == 3
    assert "2.1% of 48 answers changed their score (at most 10.9%)" in ended.out


def test_json_has_everything(mergeyard: Mergeyard, written: Callable[..., Path]) -> None:
    run = written("demo", [*OLD, *NEW])
    facts = mergeyard("compare", run / "old", run / "new", "--json").facts
    assert facts["cells"][0]["p"] == pytest.approx(0.0129, abs=5e-5)
    assert len(facts["flips"]) == 14 and all(flip["expected"] == [f"right {flip['item']}"] for flip in facts["flips"])
    assert (facts["a"]["name"], facts["b"]["name"]) == ("old", "new")


@pytest.mark.parametrize("columns", [40, 60, 80, 200])
def test_no_line_is_wider_than_the_terminal(
    mergeyard: Mergeyard, written: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, columns: int
) -> None:
    rows = [replace(row, task="a_task_with_a_rather_long_name", answer="x" * 300) for row in (*OLD, *NEW)]
    run = written("demo", rows)
    monkeypatch.setenv("COLUMNS", str(columns))
    out = mergeyard("compare", run / "old", run / "new").out
    assert max(len(line) for line in out.splitlines()) <= columns
    table = next(line for line in out.splitlines() if line.startswith("a_"))
    assert "+20.8" in table and "(+5.3 to +34.7)" in table  # (13 − 3 ± 1.96·√(16 − 100/50))/50


def test_an_answer_cannot_command_the_terminal(mergeyard: Mergeyard, written: Callable[..., Path]) -> None:
    evil = "\x1b[2J\x1b]0;title\x07 [red]x[/red] \u202egnirts\x00\x9b5m\u2028\ud83d"
    rows = [replace(row, answer=evil.encode("utf-8", "ignore").decode(), point=row.point) for row in (*OLD, *NEW)]
    run = written("demo", rows)
    out = mergeyard("compare", run / "old", run / "new").out
    assert "[red]x[/red]" in out and "\\x1b[2J" in out and "\\u202e" in out
    assert not [letter for letter in out if unicodedata.category(letter)[0] == "C" and letter != "\n"]
    assert visible(evil).isprintable()


def test_items_that_are_gone_leave_the_answers(mergeyard: Mergeyard, written: Callable[..., Path]) -> None:
    run = written("demo", [*OLD, *NEW])
    shutil.rmtree(run / "items")
    out = mergeyard("compare", run / "old", run / "new").out
    assert "14 of 48 answers differ" in out and "expected" not in out


def test_two_runs_are_compared_where_they_share_items(mergeyard: Mergeyard, written: Callable[..., Path]) -> None:
    first, second = written("first", OLD), written("second", [replace(row, point="old") for row in NEW])
    ended = mergeyard("compare", first / "old", second / "old")
    assert ended.code == 0, ended.err
    assert f"A  {first}/old"[:70] in ended.out and "12 won" in ended.out
    facts = mergeyard("compare", first, second, "--json").facts
    assert (facts["a"]["run"], facts["a"]["name"], facts["b"]["name"]) == (str(first), "old", "old"), "the best of each"


def test_the_same_weights_in_two_runs_are_noise(mergeyard: Mergeyard, written: Callable[..., Path]) -> None:
    first, second = written("first", OLD), written("second", [replace(row, weights="old") for row in NEW])
    assert "the same weights, so this is noise" in mergeyard("compare", first / "old", second / "new").out.replace(
        "\n", " "
    )


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ("one/old", "one/nwe", 'no point or parent "nwe" was scored; did you mean "new"?'),
        ("one/old", "one/old", "are the same model, old; name two"),
        ("one/old", "one/points/old", "are the same model, old; name two"),
        ("one/old", "nowhere/x", "scored no such point or checkpoint; `mergeyard evaluate` scores any"),
        ("nowhere/y", "nowhere/x", "no point or parent of a run with scores; name one as RUN/POINT"),
        ("one/old", "bare/old", "no scores there; `mergeyard evaluate` makes them"),
        ("one/old", "other/new", "the jobs' ruler.questions differ"),
        ("one/old", "seeded/new", "their seeds differ (0 against 5)"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_one_line(
    mergeyard: Mergeyard, written: Callable[..., Path], tmp_path: Path, a: str, b: str, message: str
) -> None:
    written("one", [*OLD, *NEW])
    written("other", [replace(row, items="others") for row in NEW], ruler={**RULER, "questions": 2})
    written("seeded", [replace(row, items="others") for row in NEW], seed=5)
    (tmp_path / "runs" / "bare").mkdir()
    (tmp_path / "runs" / "bare" / "plan.json").write_bytes(sealed({}))
    ended = mergeyard("compare", tmp_path / "runs" / a, tmp_path / "runs" / b)
    assert (ended.code, ended.out) == (2, "") and message in ended.err and ended.err.count("\n") == 1


def test_the_written_point_of_a_search_is_counted_by_status_and_found_by_its_copy(
    mergeyard: Mergeyard, tmp_path: Path
) -> None:
    search = {"over": {"w": [0.2, 0.4, 0.95]}, "budget": {"points": 3}}
    job = job_text(tmp_path, grid=None, keep=None, search=search)
    (tmp_path / "job.yaml").write_text(job)
    run = tmp_path / "runs" / "tiny"
    assert mergeyard("evaluate", tmp_path / "job.yaml", "--in-process", "--quiet").code == 0
    waiting = mergeyard("status", run, "--json").facts
    assert (waiting["points"], waiting["points_wanted"], waiting["points_done"]) == (3, 1, 0)
    assert mergeyard("run", tmp_path / "job.yaml", "--in-process", "--quiet").code == 0
    assert "1 of 1 complete, the best of 3" in mergeyard("status", run).out
    assert "the best of 3; complete" in mergeyard("status", run.parent).out
    [point] = (run / "points").iterdir()
    assert point.name == waiting["waiting"][0]
    shutil.copytree(point, tmp_path / "copy")
    facts = mergeyard("compare", run / "long", tmp_path / "copy", "--json").facts
    assert facts["b"]["name"] == point.name


def test_a_negative_number_of_flips_is_refused(mergeyard: Mergeyard) -> None:
    assert mergeyard("compare", "a", "b", "--flips", -1).code == 2


def test_points_parents_and_copies_of_them_are_found_by_every_name(mergeyard: Mergeyard, tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job_text(tmp_path, grid={"w": [0.2, 1]}, keep="all"))
    assert mergeyard("run", tmp_path / "job.yaml", "--in-process", "--quiet").code == 0
    run = tmp_path / "runs" / "tiny"
    shutil.copytree(run / "points" / "w0.2", tmp_path / "copy")

    def names(a: object, b: object) -> tuple[str, str]:
        ended = mergeyard("compare", a, b, "--json")
        assert ended.code == 0, ended.err
        return ended.facts["a"]["name"], ended.facts["b"]["name"]

    assert names(run / "w0.2", run / "w1") == ("w0.2", "w1")
    assert names(run / "points" / "w0.2", tmp_path / "job.yaml" / "fmt") == ("w0.2", "fmt")
    assert names(run / "parents" / "fmt", run / "long") == ("fmt", "w1"), "w1 is the parent itself"
    assert names(PARENTS / "fmt", run / "w0.2") == ("fmt", "w0.2")
    assert names(run / "w1", tmp_path / "copy") == ("w1", "w0.2")
    facts = mergeyard("compare", run / "fmt", run / "w0.2", "--json").facts
    assert all(flip["expected"] and flip["expected"][0].isdigit() for flip in facts["flips"])
    assert mergeyard("compare", run / "w1", PARENTS / "long").code == 2, "the same model twice"
