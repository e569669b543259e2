"""The proof of the GPU path tries itself on a CPU, so that the first machine with a GPU needs a single command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.benchmarks.gpu_proof.__main__ import main
from tests.test_house import ROOT, WITHOUT

BARE = """
import runpy, sys
sys.modules.update(dict.fromkeys(sys.argv.pop(1).split(","), None))  # to import one of these now fails
runpy.run_module("tests.benchmarks.gpu_proof", run_name="__main__", alter_sys=True)
"""
SECTIONS = ["machine", "correct", "swap", "merge", "speed", "grid", "memory"]


@pytest.mark.heavy
def test_the_proof_runs_without_the_libraries_that_a_bare_machine_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lacking = ",".join((*WITHOUT, "blake3", "wonderwords", "shtab"))
    out, environment = tmp_path / "proof.jsonl", os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = ["--tiny", "--device", "cpu", "--room", tmp_path / "room", "--out", out]
    run = [sys.executable, "-c", BARE, lacking, *SECTIONS, *options]
    done = subprocess.run(run, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [*dict.fromkeys(line["section"] for line in lines)] == SECTIONS
    assert {line["found"] for line in lines if line["section"] == "correct" and line["goal"] == "0, 0; 0"} == {
        "0, 0; 0"
    }
    assert all(line["found"] == "True" for line in lines if line["goal"] == "True")

    monkeypatch.setattr("sys.argv", ["gpu_proof", "--show", str(out)])
    capsys.readouterr()
    assert main() == 0
    assert capsys.readouterr().out.count("\n| ") == len(lines)
    assert (tmp_path / "proof.svg").stat().st_size > 1000
