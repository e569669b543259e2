"""The viewer as people use it: a real Chromium, the keyboard, a desk and a phone."""

from __future__ import annotations

import functools
import http.server
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import ObjectMissing
from orchestrator.viewing import serving, site
from orchestrator.viewing.exporting import export
from orchestrator.viewing.serving import ViewServer
from orchestrator.viewing.site import read_site
from tests.browser import CHROMIUM, Browser, Page
from tests.orchestrator.viewing.made_up import HOSTILE, changed, number_of, perplexity_row, right_rows, write_run

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")

POINTS = ("a", "b", "a|b & <i>c</i>")
PLANTED = {("b", "vt", 2048, 11), ("a", "niah_single_1", 1024, 3), ("a|b & <i>c</i>", "vt", 1024, 7)}


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A run of 240 right answers but for three, one of them hostile, and a perplexity."""
    rows = right_rows(points=POINTS, items=20)
    rows = changed(
        rows, lambda row: (row.point, row.task, row.length, row.item) in PLANTED, score=0.0, answer="no idea"
    )
    rows = changed(rows, lambda row: row.score == 0 and row.point == "b", answer=HOSTILE, thought=f"hm {HOSTILE}")
    rows = changed(rows, lambda row: row.score == 0 and row.point == "a", answer="", status="empty")
    run = write_run(tmp_path_factory.mktemp("view") / "run", [*rows, perplexity_row("a")])
    with ViewServer(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.url
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as started:
        yield started


def until(page: Page, condition: str) -> Any:
    """The value of an expression, once it is true."""
    deadline = time.monotonic() + 20
    while not (value := page.evaluate(condition)):
        assert time.monotonic() < deadline, f"never: {condition}; {page.messages}"
        time.sleep(0.02)
    return value


def opened(browser: Browser, url: str, **window: Any) -> Page:
    page = browser.open(url, **window)
    until(page, "document.querySelector('.row .answer, .nothing') && !document.querySelector('#state.error')")
    return page


def press(page: Page, *keys: str) -> None:
    for key in keys:
        for kind in ("keyDown", "keyUp"):
            text = {"text": key} if len(key) == 1 and kind == "keyDown" else {}
            page.browser.call("Input.dispatchKeyEvent", page.session, type=kind, key=key, **text)


COUNT = "document.getElementById('count').textContent"
ROWS = "[...document.querySelectorAll('.row')].map(row => row.querySelector('.about').innerText.replace(/\\s+/g, ' '))"
ITEM = "document.querySelector('#item h2')?.textContent"
TEXT = "document.querySelector('#item .text')?.innerText"


def test_three_wrong_answers_are_one_key_away(browser: Browser, url: str) -> None:
    page = opened(browser, url)
    press(page, "m")
    until(page, f"{COUNT} === '3 of 241'")
    rows = page.evaluate(ROWS)
    assert sorted(rows) == sorted(
        [
            "✗ wrong vt at 2K, item 11 b",
            "✗ empty niah_single_1 at 1K, item 3 a",
            "✗ wrong vt at 1K, item 7 a|b & <i>c</i>",
        ]
    )
    press(page, "j")
    first = until(page, f"({TEXT} || '').includes('number of door') && {ITEM}")
    press(page, "j")
    assert until(page, f"{ITEM} !== {first!r} && {ITEM}")
    press(page, "k")
    until(page, f"{ITEM} === {first!r}")


def test_counts_beside_the_values_are_those_of_the_other_filters(browser: Browser, url: str) -> None:
    page = opened(browser, f"{url}#point=a&length=1024&outcome=missed")
    count = "document.querySelector('[data-value=\"{}\"]').closest('label').querySelector('output').textContent"
    values = ("outcome=right", "outcome=empty", "outcome=missed", "point=a", "point=b", "task=vt", "length=2048")
    found = {value: page.evaluate(count.format(value)) for value in values}
    # of a at 1K: 39 right of 40, and one empty; b has nothing that is not right there
    expected = {"outcome=right": "39", "outcome=empty": "1", "outcome=missed": "1", "point=a": "1"}
    assert found == expected | {"point=b": "0", "task=vt": "0", "length=2048": "0"}


def test_an_item_shows_prompt_needle_depth_references_and_facts(browser: Browser, url: str) -> None:
    page = opened(browser, f"{url}#item=a|ruler|vt|2048|4|0")
    assert until(page, f"{TEXT} && {ITEM}") == "vt at 2K, item 4"
    assert page.evaluate("document.querySelector('.references').innerText") == number_of(4)
    marks = page.evaluate("[...document.querySelectorAll('.text .needle mark')].map(mark => mark.textContent)")
    assert marks == [number_of(4)]
    needle = page.evaluate("document.querySelector('.text .needle').textContent")
    assert needle == f"The number of door 4 is {number_of(4)}."
    assert page.evaluate("document.querySelector('.depth i').style.left") == "50%"
    assert page.evaluate("document.querySelector('.begun').textContent") == " It is"
    assert page.evaluate("document.querySelector('.side .facts').innerText").split("\n") == [
        *("✓ right", "score 100", "2,048 tokens", "7 of the answer", "0.250 s")
    ]
    folded = page.evaluate("[...document.querySelectorAll('.fold')].map(fold => fold.textContent)")
    assert len(folded) == 2 and "What is the number of door 4?" in page.evaluate(TEXT)
    press(page, "u")
    assert not page.evaluate("document.querySelector('.fold')")
    assert page.evaluate("document.querySelector('.text').textContent").count("The sky is blue.") == 2 * (
        4 * 2048 // 74
    )


def test_a_script_in_answers_thoughts_and_names_is_text(browser: Browser, url: str) -> None:
    page = opened(browser, f"{url}#outcome=wrong&item=b|ruler|vt|2048|11|0&beside={POINTS[2].replace('&', '%26')}")
    until(page, f"{TEXT} && document.querySelectorAll('.side').length === 2")
    press(page, "u")
    said = page.evaluate("document.querySelector('#item').innerText")
    assert HOSTILE[:53] in said and f"hm {HOSTILE[:53]}" in said and "<i>c</i>" in said
    assert page.evaluate("document.title") == "made-up · answers"
    assert page.evaluate(
        "[document.scripts.length, document.images.length, document.querySelectorAll('i:empty').length]"
    ) == [1, 0, 1]
    assert page.messages == []


def test_two_points_side_by_side_and_only_the_items_that_differ(browser: Browser, url: str) -> None:
    page = opened(browser, f"{url}#point=a&beside=b&differ=1")
    assert page.evaluate(ROWS) == [
        "✗ empty, beside 100 niah_single_1 at 1K, item 3",
        "✓ right, beside 0 vt at 2K, item 11",
    ]
    press(page, "j")
    until(page, TEXT)
    titles = "[...document.querySelectorAll('.side h3')].map(title => title.textContent)"
    assert page.evaluate(titles) == ["a", "b"]
    press(page, "d")
    until(page, f"{COUNT} === '81 of 241'")


def test_search_finds_words_of_answers(browser: Browser, url: str) -> None:
    page = opened(browser, url)
    press(page, "/", *"no", " ", *"IDEA")
    until(page, f"{COUNT} === '1 of 241'")
    assert "q=no+IDEA" in page.evaluate("location.hash")
    press(page, "Escape", "Escape")
    until(page, f"{COUNT} === 'all answers'")


def test_the_address_holds_what_is_seen(browser: Browser, url: str) -> None:
    page = opened(browser, f"{url}#task=vt&point=a%7Cb+%26+%3Ci%3Ec%3C%2Fi%3E")
    press(page, "m", "j")
    until(page, TEXT)
    again = opened(browser, page.evaluate("location.href"))
    until(again, TEXT)
    assert again.evaluate(f"[{COUNT}, {ITEM}]") == ["1 of 241", "vt at 1K, item 7"]
    page.evaluate("history.back()")
    until(page, "!location.hash.includes('item=')")
    assert until(page, "!document.querySelector('#item h2')")


def test_an_answer_without_a_prompt_says_so(browser: Browser, url: str) -> None:
    page = opened(browser, f"{url}#benchmark=perplexity")
    press(page, "j")
    assert "perplexity keeps no prompts" in until(page, f"{ITEM} && document.getElementById('item').innerText")


@pytest.mark.parametrize("width", [1280, 390])
def test_nothing_sticks_out_and_a_phone_shows_one_thing_at_a_time(browser: Browser, url: str, width: int) -> None:
    for dark in (False, True):
        page = opened(browser, f"{url}#beside=b", width=width, dark=dark)
        visible = "document.getElementById(id).checkVisibility({visibilityProperty: true})"
        seen = f"['filters', 'list', 'item'].filter(id => {visible})"
        assert page.evaluate(seen) == (["filters", "list", "item"] if width > 900 else ["list"])
        assert page.overflow() <= 0
        press(page, "j")
        until(page, TEXT)
        assert page.evaluate(seen) == (["filters", "list", "item"] if width > 900 else ["item"])
        assert page.overflow() <= 0
        assert page.messages == []


def test_an_export_needs_no_server_of_ours(browser: Browser, url: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", right_rows(), finished=False)
    export(read_site(run, live=False), str(tmp_path / "out"))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "out"))
    handler.log_message = lambda *_: None  # type: ignore[attr-defined]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as plain:
        threading.Thread(target=plain.serve_forever, daemon=True).start()
        page = opened(browser, f"http://127.0.0.1:{plain.server_port}/index.html#item=b|ruler|vt|1024|0|0")
        assert number_of(0) in until(page, TEXT)
        assert "was going on" in page.evaluate("document.getElementById('state').textContent")
        assert {"127.0.0.1"} == {request.split("/")[2].split(":")[0] for request in page.requests if "://" in request}
        plain.shutdown()


def test_a_page_opened_as_a_file_says_what_to_do(browser: Browser, tmp_path: Path) -> None:
    export(read_site(write_run(tmp_path / "run", right_rows()), live=False), str(tmp_path / "out"))
    page = browser.open((tmp_path / "out/index.html").as_uri())
    assert "mergeyard view" in page.evaluate("document.getElementById('state').textContent")


def test_a_long_list_and_a_long_prompt_draw_what_is_seen(browser: Browser, tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", right_rows(points=("a",), tasks=("vt",), lengths=(131072,), items=3000), prompts=False
    )
    one = write_run(tmp_path / "one", right_rows(points=("a",), tasks=("vt",), lengths=(131072,), items=1))
    with ViewServer(run, 0) as many, ViewServer(one, 0) as long:
        for server in (many, long):
            threading.Thread(target=server.serve_forever, daemon=True).start()
        page = opened(browser, many.url)
        assert page.evaluate("document.querySelectorAll('.row').length") < 60
        page.evaluate("document.getElementById('scroller').scrollTop = 1e9")
        until(page, "[...document.querySelectorAll('.row')].some(row => row.innerText.includes('item 2999'))")
        page = opened(browser, f"{long.url}#item=a|ruler|vt|131072|0|0")
        text = until(page, TEXT)
        assert len(text) < 5_000 and number_of(0) in text and "What is the number" in text
        for server in (many, long):
            server.shutdown()


def test_a_run_that_goes_on_renews_the_list_and_keeps_the_open_answer(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site, "RENEW_SECONDS", 0.1)
    monkeypatch.setattr(serving, "LOOK_SECONDS", 0.0)
    run = write_run(tmp_path / "run", right_rows(points=("b",)), finished=False)
    with ViewServer(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = opened(browser, f"{server.url}#item=b|ruler|vt|1024|2|0")
        until(page, TEXT)
        assert "goes on" in page.evaluate("document.getElementById('state').textContent")
        write_run(tmp_path / "run", right_rows(points=("a", "b")), finished=True)
        until(page, "document.getElementById('state').textContent === '32 answers of 2 models'")
        assert until(page, f"{TEXT} && {ITEM}") == "vt at 1K, item 2"
        assert page.evaluate("document.querySelector('.side h3').textContent") == "b"
        server.shutdown()
    assert page.messages == []


def test_a_server_that_ended_is_named(browser: Browser, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", right_rows())
    with ViewServer(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = opened(browser, server.url)
        server.shutdown()
    press(page, "j")
    until(page, "document.getElementById('item').innerText.includes('Run `mergeyard view` again')")


def test_an_answer_that_does_not_come_is_said_where_it_would_stand(
    browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = ViewServer.read

    def lacking(server: ViewServer, path: str) -> bytes:
        if "/answers-" in path:
            raise ObjectMissing(f"{path}: gone")
        return read(server, path)

    monkeypatch.setattr(ViewServer, "read", lacking)
    with ViewServer(write_run(tmp_path / "run", right_rows()), 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = browser.open(server.url)
        until(page, "document.querySelector('.row') && document.querySelector('#state.error') !== null")
        press(page, "j")
        until(page, "/answers-0.*: 404/.test(document.getElementById('item').innerText)")
        server.shutdown()
