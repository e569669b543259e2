"""The page as a file: what is on it, what may not be, how long it takes and how big it is."""

from __future__ import annotations

import html
import logging
import re
import time
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from jobs.sealing import sealed
from orchestrator.points.published_card import published_card
from orchestrator.report.live import LivePage, written_page
from orchestrator.report.page import page, sections
from orchestrator.report.run import PAGE, read_run, report_on
from orchestrator.report.searched import search_sections
from orchestrator.report.terminal.leaderboard import print_leaderboard
from orchestrator.searching.findings import Findings, Measured, Place, Share, Step
from orchestrator.searching.greedy import Ingredient
from tests.growth import growth
from tests.orchestrator.report.made_up import HOSTILE, TASKS, write_run
from workers.storage import open_store

ADDRESS = re.compile(r"""\b(?:src|href|action|data|poster)\s*=\s*(?!["']?#)|@import|url\((?!#)""")


class Elements(HTMLParser):
    """The elements of a page, and whether each that needs an end has one."""

    EMPTY = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self._open: list[str] = []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        assert not any(name.startswith("on") for name, _ in attrs)
        if tag not in self.EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    return page(report_on(read_run(write_run(tmp_path_factory.mktemp("run")))))


def test_it_is_well_formed_and_holds_nothing_that_an_answer_brought(text: str) -> None:
    elements = Elements(text).names
    assert elements.count("script") == 1
    assert not {"img", "iframe", "object", "link"} & set(elements)
    assert elements.count("svg") > 12
    assert not re.search("<use[^>]*clip-path", text), "which would clip the mark at another place"
    assert HOSTILE not in text and "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_it_refers_to_nothing(text: str) -> None:
    assert ADDRESS.findall(re.sub(r"<pre.*?</pre>|<q>.*?</q>", "", text, flags=re.DOTALL)) == []
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_a_look_of_the_gate_counts_all_items(text: str) -> None:
    assert "Looked 2 times: 8 items in all, +2.5, inconclusive" in text


def test_ids_are_there_once(text: str) -> None:
    ids = re.findall(r'\bid="([^"]+)"', text)
    double = {name for name in ids if ids.count(name) > 1}
    assert double == set()
    assert {name for name in re.findall(r'url\(#([^)]+)\)|href="#([^"]+)"', text) for name in name if name} <= set(ids)


def test_every_tile_has_its_story(text: str) -> None:
    assert text.count("against cos, p = ") >= 20 * 2
    assert "not sure</title>" in text


@pytest.mark.usefixtures("figures")
def test_a_page_of_an_unfinished_run_renews_itself(tmp_path: Path, text: str) -> None:
    unfinished = page(report_on(read_run(write_run(tmp_path, tasks=TASKS[:1], lengths=(4096,), finished=False))))
    assert 'http-equiv="refresh"' in unfinished and "So far, " in unfinished
    p_value = r"\bp [=<&l;t]+ ?0"
    assert re.search(p_value, text) and not re.search(p_value, unfinished), "p values hold for a fixed number of items"
    assert 'http-equiv="refresh"' not in text


@pytest.mark.usefixtures("figures")
def test_another_versions_job_file_costs_the_axes_alone(tmp_path: Path) -> None:
    url = write_run(tmp_path, grid=(7, 3), tasks=TASKS[:1], items=2)
    (tmp_path / "job.yaml").write_text("name: made-up\nof_a_later_version: true\n")
    run = read_run(url)
    assert run.job is None
    text = page(report_on(run))
    Elements(text)
    assert text.count("The 20 best of 21 points.") == 2, "without axes there is a row per point"
    assert "left early" in text and "95 %" not in re.findall("<h1>(.*?)</h1>", text)[0]


def test_what_workers_remarked_is_a_list_and_older_runs_have_none(tmp_path: Path, text: str) -> None:
    run = read_run(write_run(tmp_path))
    assert 'id="remarks"' not in text and run.result.remarks == ()
    run = replace(
        run,
        result=replace(run.result, remarks=("lm_eval tiny: em is <left> out",)),
        receipts=tuple(replace(receipt, nonfinite=("b", "a"), overflowed={"a": 2}) for receipt in run.receipts[:1]),
    )
    told = page(report_on(run))
    Elements(told)
    assert re.findall("<li>(.*)</li>", told.partition('id="remarks"')[2].partition("</section>")[0]) == [
        "lm_eval tiny: em is &lt;left&gt; out",
        "NaN or infinity in a parent&#39;s a, b",
        f"NaN or infinity in the weights of {run.receipts[0].point}, in no parent",
    ]


def test_unanswered_questions_have_a_column_where_there_are_any(tmp_path: Path, text: str) -> None:
    assert "unanswered" not in text
    run = read_run(write_run(tmp_path))
    silent = [replace(row, status="empty", score=0.0) for row in run.result.rows]
    told = page(report_on(replace(run, result=replace(run.result, rows=silent))))
    Elements(told)
    assert '<th scope="col">unanswered</th>' in told and "answers are empty" in told
    assert "<h1>No recommendation: of " in told


@pytest.mark.usefixtures("figures")
def test_the_time_and_the_size_of_a_page_grow_as_its_points(tmp_path: Path) -> None:
    grids = {25: (5, 5), 200: (20, 10)}
    urls = {
        points: write_run(tmp_path / str(points), grid=grid, tasks=TASKS[:1], lengths=[4096], items=2, answer="42")
        for points, grid in grids.items()
    }
    pages: dict[int, str] = {}

    def draw(points: int) -> None:
        pages[points] = page(report_on(read_run(urls[points])))

    assert growth(draw, *grids, at_most=8) <= 8, "at most 8 if linear: the frames of the charts are the same"
    assert len(pages[200]) <= 8 * len(pages[25])


@pytest.mark.heavy
@pytest.mark.usefixtures("figures")
def test_two_hundred_points_thirteen_tasks_three_lengths_are_a_page_below_ten_megabytes(tmp_path: Path) -> None:
    lengths = [4096 << step for step in range(0, 6, 2)]
    url = write_run(tmp_path, grid=(20, 10), tasks=TASKS, lengths=lengths, items=4, answer="42")
    assert len(page(report_on(read_run(url))).encode()) < 10_000_000


def test_a_page_that_cannot_be_drawn_costs_the_page_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = write_run(tmp_path)
    (tmp_path / "gate" / "verdict.json").write_text("{")
    with caplog.at_level(logging.WARNING):
        assert written_page(url) is None
        live = LivePage(url)
        live.renew()
        live.close()
    assert len(caplog.records) == 2 and "not JSON" in caplog.text
    assert not (tmp_path / PAGE).exists()


def test_a_running_evaluation_shows_its_page_and_a_closed_one_writes_no_more(tmp_path: Path) -> None:
    url = write_run(tmp_path, finished=False)
    live = LivePage(url)
    live.renew()
    until = time.monotonic() + 60
    while not (tmp_path / PAGE).exists() and time.monotonic() < until:
        time.sleep(0.05)
    assert "So far, " in (tmp_path / PAGE).read_text(encoding="utf-8")
    live.close()
    (tmp_path / PAGE).unlink()
    live.renew()
    assert not (tmp_path / PAGE).exists()


@pytest.mark.usefixtures("figures")
def test_a_search_shows_its_points_in_the_order_of_asking_and_why(tmp_path: Path) -> None:
    store = open_store(write_run(tmp_path / "run", tasks=TASKS[:1], lengths=(4096,)))
    report = report_on(read_run(store.url))
    assert not [section for section in sections(report) if section.id == "search"], "a grid has none"
    names = [line.name for line in report.lines if line.kind == "point"][:3]
    for number, asked in enumerate(([names[2]], [names[0], "asked-but-not-answered", names[1]])):
        proposals = [{"name": name, "choice": [0], "bindings": {}, "reason": f"<{name}>"} for name in asked]
        batch = {"format": 1, "number": number, "seen": "", "proposals": proposals, "promotions": []}
        store.write(f"search/{number:06d}.json", sealed(batch))
    report = report_on(read_run(store.url))
    (section,) = [section for section in sections(report) if section.id == "search"]
    score = {line.name: f"{line.score:.1f}" for line in report.lines}
    assert section.tables[0].rows == tuple(
        (batch, name, score[name], f"<{name}>") for batch, name in (("0", names[2]), ("1", names[0]), ("1", names[1]))
    )
    assert f"&lt;{names[0]}&gt;" in page(report), "a reason is escaped"


@pytest.mark.usefixtures("figures")
def test_a_search_that_ended_shows_trace_surface_importance_front_and_the_drop_on_fresh_items(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = read_run(write_run(tmp_path / "run", tasks=TASKS[:1], lengths=(4096,)))
    first, second = [standing.point for standing in run.result.standing][:2]
    found = Findings(
        size=1000,
        objectives=("score", "-output_tokens"),
        sure=False,
        steps=(Step(0, 1, second, 60.0, 50.0, 70.0, 12.0), Step(1, 2, first, 70.0, 66.0, 74.0, 3.25)),
        points=(
            Measured(second, (61.0, 40.0), 55.0, 9.0, 10),
            Measured(first, (70.0, 50.0), 75.0, 5.0, 40),
        ),
        front=(first, second),
        importance=(Share("w", 0.75, 0.5, 0.9), Share("d", 0.1, 0.0, 0.3)),
        axes=("w", "d"),
        others="method=ties",
        surface=tuple(
            Place((w, d), mean, 4.0, behind, point)
            for w, d, mean, behind, point in (
                ("0.25", "0", 70.0, 0.0, first),
                ("0.5", "0", 69.0, 2.0, None),
                ("0.25", "1", 40.0, 3.0, second),
            )
        ),
    )
    gate = {"fresh": True, "new": first, "scores": {first: {"score": 67.0, "half": 3.0}}}
    asked = ((0, second, "drawn"), (1, first, "<expected>"))
    report = report_on(replace(run, result=replace(run.result, search=found), asked=asked))
    report = replace(report, run=replace(report.run, gate={**(report.run.gate or {}), **gate}))
    shown = {section.id: section for section in sections(report)}
    words = shown["search"].words
    assert f"asked 2 of 1,000 points, 40 items of each cell for {first}" in words and "70.0 ± 4.0" in words
    assert "The best point of the space is better by at most 3.2 points (95 %" in words and "x over the space." in words
    alone, *_ = search_sections(replace(found, axes=(), importance=(), surface=()), asked, None)
    assert "The best of the points asked is better by at most 3.2 points" in alone.words, "no model of other points"
    assert "x over the points asked." in alone.words and "of the space" not in alone.words
    tried = (
        Ingredient("a", True, 0.0, 0.0, 40, "the best alone"),
        Ingredient("b", False, -2.5, 4.375, 40, "not sure"),
    )
    told_soup, soup, *_ = search_sections(replace(found, ingredients=tried), asked, None)
    assert "The greedy soup is a, 1 of 2 models that were tried." in told_soup.words
    assert soup.tables[0].rows == (
        ("a", "yes", "", "40", "the best alone"),
        ("b", "no", "-2.5 ± 4.4", "40", "not sure"),
    )
    assert "w 75 % (50 to 90), d 10 % (0 to 30)" in words
    assert f"{first}: 70.0 ± 4.0 in the search, 67.0 ± 3.0 on fresh items: a drop of 3.0 ± 5.0." in words
    assert words.startswith(" ".join(report.searched)) and len(report.searched) == 4
    trace, points = shown["search"].tables
    assert trace.rows[1] == ("1", "2", first, "70.0 ± 4.0", "3.2")
    assert points.rows[1] == ("1", first, "70.0", "50.0", "75.0 ± 5.0", "40", "<expected>")
    assert [row[0] for row in shown["front"].tables[0].rows] == [second, first]
    rows = tuple(tuple(map(str, row)) for row in shown["surface"].tables[0].rows)
    assert rows == (("0.25", "70.0", "40.0"), ("0.5", "69.0 (not sure)", ""))
    assert shown["importance"].tables[0].rows[0] == ("w", "75", "50 to 90")
    text = page(report)
    assert Elements(text).names.count("script") == 1 and "&lt;expected&gt;" in text
    print_leaderboard(report.lines, report.run.result)
    told = " ".join(capsys.readouterr().out.split())
    assert all("in the order of the search's model" in where for where in (told, html.unescape(text)))
    card = published_card("# p\n## Parents\n", {}, {}, report.lines[0], {"ruler": 1.0}, report.searched)
    assert f"|\n\n{' '.join(report.searched)}\n\n## Parents" in card
    assert "w 0.5, d 0: 69.0 ± 4.0; 1.0 ± 2.0 behind the best" in text
