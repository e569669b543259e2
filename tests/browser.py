"""A real headless Chromium, driven over the DevTools protocol: a page at a size, what it says, its picture, its print.

    with Browser() as browser:
        page = browser.open("file:///…/index.html", width=390)

Nothing but files and servers at 127.0.0.1 can be reached from it: every name resolves to nothing. The protocol is
spoken through two pipes (`--remote-debugging-pipe`), which need no port and no library.

    python -m tests.browser runs/soup/report/index.html --widths 1280,390

leaves a picture of each width, of the whole page, in this folder, and says how far the page sticks out of its window.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage"),
    *("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--remote-debugging-pipe"),
)
SECONDS = 90.0


@dataclass
class Page:
    """An open page and what it did: errors and messages of its scripts, addresses it asked for."""

    browser: Browser
    session: str
    messages: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        answer = self.browser.call("Runtime.evaluate", self.session, expression=expression, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def overflow(self) -> int:
        """Pixels by which the page is wider than its window."""
        return self.evaluate("document.scrollingElement.scrollWidth - window.innerWidth")

    def picture(self, path: Path) -> None:
        """The whole page as PNG."""
        answer = self.browser.call("Page.captureScreenshot", self.session, captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))

    def pdf(self) -> bytes:
        """The page as it prints on A4."""
        answer = self.browser.call("Page.printToPDF", self.session, paperWidth=8.27, paperHeight=11.69)
        return base64.b64decode(answer["data"])


class Browser:
    """One Chromium; it ends with all its processes at the end of the `with` block."""

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None, "no chromium here"
        self._folder = tempfile.mkdtemp(prefix="chromium-")
        for_browser, self._out = os.pipe()
        self._in, by_browser = os.pipe()
        shell = f'exec 3<&{for_browser} 4>&{by_browser}; exec "$@"'  # the protocol speaks on descriptors 3 and 4
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "bash", CHROMIUM, *FLAGS, f"--user-data-dir={self._folder}"],
            pass_fds=(for_browser, by_browser),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(for_browser)
        os.close(by_browser)
        self._number, self._rest, self._pages = 0, b"", dict[str, Page]()
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        os.close(self._in)
        os.close(self._out)
        shutil.rmtree(self._folder, ignore_errors=True)

    def open(self, url: str, *, width: int = 1280, height: int = 900, dark: bool = False) -> Page:
        """Loads a page in a window of this size."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = self._pages[session] = Page(self, session)
        for domain in ("Runtime", "Log", "Network", "Page"):
            self.call(f"{domain}.enable", session)
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", session, **size)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", session, features=scheme)
        self.call("Page.navigate", session, url=url)
        self._until_loaded(page)
        return page

    def _until_loaded(self, page: Page) -> None:
        deadline = time.monotonic() + SECONDS
        while page.evaluate("location.href + ' ' + document.readyState").split() in (["about:blank", "complete"],) or (
            page.evaluate("document.readyState") != "complete"
        ):
            assert time.monotonic() < deadline, "the page does not load"
            time.sleep(0.05)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """Asks the browser and returns its answer; what happens meanwhile is noted on its page."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        os.write(self._out, json.dumps(message | ({"sessionId": session} if session else {})).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], SECONDS)
            assert ready, "chromium does not answer"
            self._rest += (part := os.read(self._in, 1 << 20))
            assert part, "chromium ended"
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        page, told = self._pages.get(event.get("sessionId", "")), event.get("params", {})
        if page is None:
            return
        match event["method"]:
            case "Runtime.exceptionThrown":
                page.messages.append(str(told["exceptionDetails"]))
            case "Runtime.consoleAPICalled":
                page.messages.append(str(told["args"]))
            case "Log.entryAdded":
                page.messages.append(told["entry"]["text"])
            case "Network.requestWillBeSent":
                page.requests.append(told["request"]["url"])
            case _:
                pass


def main() -> None:
    """Takes the pictures."""
    parser = argparse.ArgumentParser(prog="python -m tests.browser", description="pictures of a page, as PNG")
    parser.add_argument("page", help="a file, or its file:// URL")
    parser.add_argument("--widths", default="1280,390", help="of the window, in pixels")
    parser.add_argument("--dark", action="store_true", help="as on a dark desktop")
    parser.add_argument("--into", type=Path, default=Path(), help="the folder for the pictures")
    options = parser.parse_args()
    url = options.page if "://" in options.page else Path(options.page).resolve().as_uri()
    with Browser() as browser:
        for width in map(int, options.widths.split(",")):
            page = browser.open(url, width=width, dark=options.dark)
            path = options.into / f"{Path(url).stem}-{width}.png"
            page.picture(path)
            print(f"{path}: {max(0, page.overflow())} pixels too wide, {len(page.messages)} messages")


if __name__ == "__main__":
    main()
