"""The page as people see it: a real Chromium without a network, on a desk, on a phone and on paper."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.nightly.book import Blessed
from orchestrator.nightly.page import nights_page
from orchestrator.report.page import page
from orchestrator.report.run import read_run, report_on
from tests.browser import CHROMIUM, Browser
from tests.browser import main as take_pictures
from tests.orchestrator.nights import a_night
from tests.orchestrator.report.made_up import write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

SECTIONS = {"gate", "leaderboard", "grid-length", "grid-task", "by-length", "pareto", "needles", "perplexity", "costs"}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with everything on it, and hostile answers."""
    folder = tmp_path_factory.mktemp("page")
    text = page(report_on(read_run(write_run(folder / "run", grid=(9, 4)))))
    (folder / "index.html").write_text(text, encoding="utf-8")
    return (folder / "index.html").as_uri()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


@pytest.mark.parametrize("width", [1280, 390])
def test_everything_is_there_and_nothing_sticks_out(browser: Browser, url: str, width: int) -> None:
    shown = browser.open(url, width=width)
    assert set(shown.evaluate("[...document.querySelectorAll('section')].map(section => section.id)")) >= SECTIONS
    charts = "[...document.querySelectorAll('figure')].filter(figure => !figure.closest('[hidden]'))"
    boxes = shown.evaluate(f"{charts}.map(figure => figure.firstElementChild.getBoundingClientRect().width)")
    assert len(boxes) >= 10 and min(boxes) > 200 and max(boxes) <= width
    assert shown.overflow() <= 0


def test_it_asks_for_nothing_and_complains_about_nothing(browser: Browser, url: str) -> None:
    shown = browser.open(url)
    assert shown.requests == [url]
    assert shown.messages == []


def test_a_script_in_an_answer_is_text(browser: Browser, url: str) -> None:
    shown = browser.open(url)
    assert shown.evaluate("document.scripts.length") == 1
    assert shown.evaluate("document.images.length") == 0
    assert "<script>alert(1)</script>" in shown.evaluate("document.getElementById('flips').innerText")


def test_the_page_complains_when_a_script_is_smuggled_in(browser: Browser, tmp_path: Path, url: str) -> None:
    text = Path(url.removeprefix("file://")).read_text(encoding="utf-8")
    changed = tmp_path / "changed.html"
    changed.write_text(text.replace("</main>", "</main><script>document.title = 'taken'</script>"), encoding="utf-8")
    shown = browser.open(changed.as_uri())
    assert shown.evaluate("document.title") == "made-up · mergeyard"
    assert any("Content Security Policy" in message for message in shown.messages)


@pytest.mark.parametrize("section", ["needles", "pareto"])
def test_a_choice_shows_one_and_hides_the_others(browser: Browser, url: str, section: str) -> None:
    shown = browser.open(url)
    charts = f"[...document.querySelectorAll('#{section} .charts')]"
    visible = f"{charts}.filter(chart => !chart.hidden).map(chart => chart.dataset.name)"
    names = shown.evaluate(f"[...document.querySelectorAll('#{section} option')].map(option => option.value)")
    assert len(names) > 2
    assert shown.evaluate(visible) == names[:1]
    shown.evaluate(
        f"(list => {{ list.value = {names[2]!r}; list.dispatchEvent(new Event('change', {{bubbles: true}})); }})"
        f"(document.querySelector('#{section} select'))"
    )
    assert shown.evaluate(visible) == [names[2]]


def test_the_leaderboard_sorts_by_any_column(browser: Browser, url: str) -> None:
    shown = browser.open(url)
    column = "[...document.querySelectorAll('.leaderboard tbody tr')].map(row => parseFloat(row.cells[3].textContent))"
    shown.evaluate("document.querySelectorAll('.leaderboard thead button')[3].click()")
    down = shown.evaluate(column)
    assert down == sorted(down, reverse=True) and len(set(down)) > 3
    shown.evaluate("document.querySelectorAll('.leaderboard thead button')[3].click()")
    assert shown.evaluate(column) == sorted(down)


def test_a_long_leaderboard_opens(browser: Browser, url: str) -> None:
    shown = browser.open(url)
    height = "document.getElementById('more-lines').getBoundingClientRect().height"
    assert shown.evaluate(height) == 0
    shown.evaluate("document.querySelector('button[data-more]').click()")
    assert shown.evaluate(height) > 100


def test_it_prints(browser: Browser, url: str) -> None:
    pdf = browser.open(url).pdf()
    assert pdf.startswith(b"%PDF-") and len(re.findall(rb"/Type\s*/Page\b", pdf)) >= 3


def test_paper_has_every_line_and_chart_and_says_what_it_has_not(browser: Browser, url: str) -> None:
    shown = browser.open(url)
    browser.call("Emulation.setEmulatedMedia", shown.session, media="print")
    heights = "(chosen => [...document.querySelectorAll(chosen)].map(part => part.getBoundingClientRect().height))"
    rows = shown.evaluate(f"{heights}('.leaderboard tbody tr')")
    assert len(rows) == 38 and min(rows) > 5
    charts = shown.evaluate(f"{heights}('figure')")
    assert len(charts) > 30 and min(charts) > 50
    told = "[...document.querySelectorAll('details')].filter(part => !part.open).map(part => [part.firstElementChild"
    told += ".getBoundingClientRect().height, getComputedStyle(part.firstElementChild, '::after').content])"
    for height, words in shown.evaluate(told):
        assert height > 5 and "printed only where it was opened first" in words


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_of_nights_fits_asks_for_nothing_and_complains_about_nothing(
    browser: Browser, tmp_path: Path, width: int
) -> None:
    nights = [a_night(1), a_night(2, "fail", "nonce 1"), a_night(3, "inconclusive", "nonce 1", changed=())]
    path = tmp_path / "index.html"
    path.write_text(nights_page("soup", nights, Blessed("s3://b/p", "w", "0001-abcdef01", 1, "nonce 1")))
    for dark in (False, True):
        shown = browser.open(path.as_uri(), width=width, dark=dark)
        assert (shown.requests, shown.messages) == ([path.as_uri()], [])
        assert shown.overflow() <= 0
        boxes = shown.evaluate(
            "[...document.querySelectorAll('svg')].map(chart => chart.getBoundingClientRect().width)"
        )
        assert len(boxes) == 3 and min(boxes) > 200 and max(boxes) <= width
        assert shown.evaluate("document.querySelectorAll('tbody tr').length") == 3
        beyond = "text.getBoundingClientRect().right - text.closest('svg').getBoundingClientRect().right"
        assert shown.evaluate(f"Math.max(...[...document.querySelectorAll('svg text')].map(text => {beyond}))") <= 0


def test_a_picture_shows_the_whole_page_at_a_width(tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["browser", url, "--widths", "390", "--into", str(tmp_path)])
    take_pictures()
    width, height = struct.unpack(">II", (tmp_path / "index-390.png").read_bytes()[16:24])  # PNG's first chunk
    assert width == 390 and height > 3000


def test_words_can_be_read_on_either_background(browser: Browser, url: str) -> None:
    for dark in (False, True):
        shown = browser.open(url, dark=dark)
        colours = shown.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color,"
            " getComputedStyle(document.querySelector('#by-length svg text')).fill]"
        )
        paper, ink, chart = (_luminance(colour) for colour in colours)
        assert (paper < ink) is dark
        for words in (ink, chart):
            assert (max(paper, words) + 0.05) / (min(paper, words) + 0.05) >= 4.5  # WCAG 2.2, 1.4.3


def _luminance(colour: str) -> float:
    """Relative luminance of `rgb(r, g, b)`, as WCAG 2.2 defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
