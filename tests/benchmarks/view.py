"""How fast the viewer is: a made-up run of 100,000 answers in a real Chromium.

    python -m tests.benchmarks.view --answers 100000

prints milliseconds: the middle of several times, and the longest. A time ends after the frame that shows the result.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from orchestrator.viewing.exporting import export
from orchestrator.viewing.serving import ViewServer
from orchestrator.viewing.site import read_site
from tests.browser import Browser, Page
from tests.orchestrator.viewing.made_up import made_row, write_run

POINTS, TASKS, LENGTHS = 60, 13, (4096, 8192, 16384, 32768, 65536, 131072)
WORDS = ("the", "a", "of", "and", "number", "magic", "special", "city", "green", "blue", "river", "grass")

FRAME = "new Promise(done => requestAnimationFrame(() => setTimeout(done)))"
"""Ends after the next frame was drawn."""


def write_large_run(folder: Path, answers: int) -> str:
    """A run of so many answers of 300 characters; the first set has prompts, the longest of 128K tokens."""
    items = max(1, answers // (POINTS * TASKS * len(LENGTHS)))
    chance = random.Random(0)
    rows = [
        replace(
            made_row(f"w{point / POINTS:.3f}", f"task_{task:02d}", length, item, float(chance.random() < 0.8)),
            answer=" ".join(chance.choices(WORDS, k=60)),
        )
        for point in range(POINTS)
        for task in range(TASKS)
        for length in LENGTHS
        for item in range(items + 1)
    ][:answers]
    url = write_run(folder, rows, prompts=False)
    write_prompts(folder, [row for row in rows if row.task == "task_00" and row.point == rows[0].point])
    return url


def write_prompts(folder: Path, rows: list[Any]) -> None:
    """The items of these rows alone."""
    write_run(folder / "prompts", rows)
    (folder / "prompts/items").rename(folder / "items")


def timed(page: Page, action: str, done: str = "true") -> float:
    """Milliseconds from an action of the reader to the frame after `done` holds."""
    expression = f"""(async () => {{
        const began = performance.now();
        {action};
        do await {FRAME}; while (!({done}));
        return performance.now() - began;
    }})()"""
    found = page.browser.call(
        "Runtime.evaluate", page.session, expression=expression, awaitPromise=True, returnByValue=True
    )
    return found["result"]["value"]


def key(name: str) -> str:
    return f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{key: '{name}', bubbles: true}}))"


def measure(url: str, say: Callable[[str, list[float]], None]) -> None:
    """Times each action in a browser that has not seen the page."""
    first = "document.querySelector('.row .answer')"
    shown = f"{first} && !{first}.textContent.startsWith('…')"
    set_to = "(s => {{ s.value = '{}'; s.dispatchEvent(new Event('{}')) }})(document.getElementById('{}'))"
    with Browser() as browser:
        paints: list[float] = []
        for number in range(5):
            page = browser.open(f"{url}?{number}")
            browser.call("Network.setCacheDisabled", page.session, cacheDisabled=True)
            timed(page, "", shown)
            paints.append(page.evaluate("performance.getEntriesByName('first list')[0].startTime"))
        say("first list, from the request of the page", paints)
        count = "document.getElementById('count').textContent"
        box = "document.querySelector('[data-value=\"{}\"]').click()"
        filters = [
            box.format(f"{name}") for name in ("task=task_03", "length=131072", "outcome=missed", "point=w0.500")
        ]
        say("filter", [timed(page, action) for action in [*filters, *filters]])
        page = browser.open(url)
        timed(page, "", shown)
        orders = ("worst", "best", "longest", "slowest", "")
        say("another order", [timed(page, set_to.format(order, "change", "sort")) for order in orders])
        places = [f"document.getElementById('scroller').scrollTop = {place}" for place in (3e6, 1e5, 4e6, 2e6)]
        say("scroll to another place", [timed(page, place, shown) for place in places])
        page = browser.open(f"{url}#task=task_00&length=131072")
        timed(page, "", shown)
        title = "document.querySelector('#item h2')?.textContent"
        text = f"document.querySelector('#item .text') && {title} !== window.before"
        opened = [timed(page, f"window.before = {title}; {key('j')}", text) for _ in range(10)]
        say("open an item of 128K tokens", opened[:1])
        say("next item of 128K tokens", opened[1:])
        say("unfold 128K tokens", [timed(page, key("u"))])
        page = browser.open(f"{url}#beside=w0.500")
        timed(page, "", shown)
        say("only items that differ", [timed(page, key("d")) for _ in range(3)])
        page = browser.open(url)
        timed(page, "", shown)
        going = "document.getElementById('state').textContent.includes('searched')"
        searched = [
            timed(
                page,
                f"window.before = {count}; {set_to.format(words, 'input', 'search')}",
                f"{count} !== window.before && !{going}",
            )
            for words in ("river magic special", "green green blue", "city city city")
        ]
        say("search, all answers fetched (with 150 ms of waiting for the next key)", searched[:1])
        say("search again", searched[1:])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.view", description=__doc__)
    parser.add_argument("--answers", type=int, default=100_000)
    options = parser.parse_args()

    def say(what: str, times: list[float]) -> None:
        print(f"{what:72} {median(times):7.0f} {max(times):7.0f}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        run = write_large_run(Path(folder) / "run", options.answers)
        print(f"{f'{options.answers:,} answers; milliseconds':72} {'middle':>7} {'slowest':>7}")
        began = time.perf_counter()
        server = ViewServer(run, 0)
        say("start of the server: the run is read", [1000 * (time.perf_counter() - began)])
        with server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            measure(server.url, say)
            server.shutdown()
        began = time.perf_counter()
        found = export(read_site(run, live=False), f"{folder}/out")
        say(f"export: {found.files:,} files, {found.bytes / 1e6:.1f} MB", [1000 * (time.perf_counter() - began)])


if __name__ == "__main__":
    main()
