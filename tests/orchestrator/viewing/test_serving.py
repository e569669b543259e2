"""The server of the page: this machine only, its own files only, and newer results as they come."""

from __future__ import annotations

import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import BadInput
from orchestrator.viewing import serving
from orchestrator.viewing.serving import ViewServer
from tests.orchestrator.viewing.made_up import changed, right_rows, write_run

Ask = Callable[..., tuple[int, dict[str, str], bytes]]


@pytest.fixture
def run(tmp_path: Path) -> str:
    return write_run(tmp_path / "run", right_rows(), finished=False)


@pytest.fixture
def ask(run: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ask]:
    """ask(path, host=None): status, headers and body of a request."""
    monkeypatch.setattr(serving, "LOOK_SECONDS", 0.0)
    with ViewServer(run, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()

        def asked(path: str, host: str | None = None) -> tuple[int, dict[str, str], bytes]:
            connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
            connection.request("GET", path, headers={"Host": host} if host else {})
            answer = connection.getresponse()
            found = answer.status, dict(answer.headers), answer.read()
            connection.close()
            return found

        yield asked
        server.shutdown()


def document(ask: Ask) -> dict[str, Any]:
    status, _, body = ask("/run.json")
    assert status == 200
    return json.loads(body)


def test_the_page_and_its_files(ask: Ask) -> None:
    status, headers, body = ask("/")
    assert status == 200 and headers["Content-Type"].startswith("text/html") and b"<!doctype html>" in body
    version = document(ask)["version"]
    status, headers, body = ask(f"/rows/{version}/answers-0.json.gz")
    assert (
        status == 200
        and headers["X-Content-Type-Options"] == "nosniff"
        and len(json.loads(gzip.decompress(body))) == 32
    )
    assert ask("/prompts/vt1024/0.json.gz")[0] == 200


@pytest.mark.parametrize("path", ["/plan.json", "/../plan.json", "/%2e%2e/plan.json", "//etc/passwd", "/items/vt1024/"])
def test_no_other_file_is_served(ask: Ask, path: str) -> None:
    assert ask(path)[0] == 404


def test_a_page_of_another_name_is_refused(ask: Ask) -> None:
    """DNS rebinding: a foreign page whose name leads to 127.0.0.1 would otherwise read the answers."""
    assert ask("/run.json", host="evil.example")[0] == 403


def test_newer_results_are_served_and_older_chunks_are_gone(ask: Ask, run: str) -> None:
    before = document(ask)
    assert before["renews"] == 10 and not before["finished"] and document(ask)["version"] == before["version"]
    write_run(Path(run), changed(right_rows(items=5), lambda row: row.item == 4, score=0.0), finished=True)
    after = document(ask)
    assert (after["rows"], after["finished"]) == (40, True) and after["version"] != before["version"]
    assert ask(f"/rows/{before['version']}/numbers.bin.gz")[0] == 404
    assert ask("/prompts/vt1024/4.json.gz")[0] == 200


def test_a_port_that_is_taken_is_one_line(run: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BadInput, match=rf"--port {port}: cannot be used \(.+\); give another, or 0 for a free one"):
            ViewServer(run, port)
    with pytest.raises(BadInput, match="--port 99999: cannot be used"):
        ViewServer(run, 99999)


def test_the_command_opens_the_address_in_the_browser_of_the_environment_and_ends_with_ctrl_c(run: str) -> None:
    program = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1]).status, sys.argv[1])"
    browser = f'{sys.executable} -c "{program}" %s'
    command = [sys.executable, "-m", "orchestrator.cli", "view", run, "--port", "0", "--at", "point=b"]
    started = subprocess.Popen(
        command,
        env=os.environ | {"BROWSER": browser},
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # in the background it would be ignored
    )
    assert started.stdout is not None
    told, seen = started.stdout.readline(), started.stdout.readline()
    started.send_signal(signal.SIGINT)
    assert started.wait(20) == 0
    url = told.split()[0]
    assert url.startswith("http://127.0.0.1:") and seen == f"200 {url}#point=b\n"
