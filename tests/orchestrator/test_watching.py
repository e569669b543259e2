"""The progress of a command where no terminal is: lines on stderr, and the facts that the lease carries."""

from __future__ import annotations

import sys
import time

import pytest

from orchestrator import watching
from orchestrator.watching import Watcher


def test_without_a_terminal_a_stage_prints_one_line_and_then_one_per_interval(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(watching, "LINE_SECONDS", 0.05)
    with Watcher(visible=False, tells=True) as watcher:
        watcher.begin(2, 4_000_000)
        said = capsys.readouterr().err
        watcher.moved(9, 1_000_000)
        watcher.point_done("w0.5")
        while said.count("\n") < 3:
            time.sleep(0.01)
            said += capsys.readouterr().err
        watcher.moved(0, 3_000_000)
        time.sleep(0.1)
        said += capsys.readouterr().err
        time.sleep(0.2)
        assert capsys.readouterr().err == "", "a stage that is done has no more to say"
        watcher.begin_stage(300, "evaluating 2 models")
    assert capsys.readouterr().err.splitlines()[0] == "evaluating 2 models: 300 tokens"
    first, *lines = said.splitlines()
    assert first == "merging 0/2 points: 4 MB"
    for line in lines:
        assert line.startswith("merging 1/2 points: 1 MB of 4 MB, ")
        assert line.endswith(" left") and "/s, " in line


def test_quiet_means_silence(capsys: pytest.CaptureFixture[str]):
    with Watcher(visible=False) as watcher:
        watcher.begin(1, 10)
        watcher.begin_stage(10, "asking again")
        watcher.tell("w0.5 leaves")
    assert capsys.readouterr().err == ""


def test_facts_have_the_present_stage_and_the_newest_failures():
    with Watcher(visible=False) as watcher:
        assert watcher.facts() == {"failed": 0, "failures": []}
        watcher.begin_stage(100, "evaluating 2 models")
        watcher.advance(25)
        for number in range(5):
            watcher.failed(OSError(f"node {number}\nis gone"))
        facts = watcher.facts()
    assert facts.pop("seconds") < 60
    assert facts == {
        "stage": "evaluating 2 models",
        "unit": "tokens",
        "done": 25,
        "total": 100,
        "failed": 5,
        "failures": [f"node {number} is gone" for number in (2, 3, 4)],
    }


def test_a_terminal_has_a_bar_and_decisions_above_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Watcher(visible=True, tells=True) as watcher:
        watcher.begin_stage(4000, "racing 9 points")
        watcher.advance(1000)
        watcher.tell("w0.1 leaves: too far behind")
    shown = capsys.readouterr().err
    assert "racing 9 points" in shown
    assert "w0.1 leaves: too far behind" in shown
