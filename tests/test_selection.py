"""What tests/selection.py promises of the choice and the order of tests, held against planted tests."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest

Planted = Callable[..., str]
NOTED = "import os, pathlib, time\nnoted = pathlib.Path(__file__).parents[1] / f'noted-{os.getpid()}'\n"


@pytest.fixture
def planted(tmp_path: Path) -> Planted:
    """planted("-n", "2", file=text, …): what pytest says of these files of tests."""
    (tmp_path / "tests").mkdir()
    shutil.copy(Path(__file__).with_name("selection.py"), tmp_path / "tests" / "conftest.py")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    quick:\n    serial:\n    heavy:\n")

    def run(*options: str, **files: str) -> str:
        for name, text in files.items():
            path = tmp_path / "tests" / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
        ours["COLUMNS"] = "200"
        command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "--no-loadscope-reorder", "-rA", *options]
        done = subprocess.run(command, cwd=tmp_path, env=ours, capture_output=True, text=True, timeout=120)
        return done.stdout + done.stderr

    return run


def test_a_quick_test_that_starts_a_process_or_imports_ray_fails(planted: Planted) -> None:
    said = planted(
        "-m",
        "quick",
        test_a="import subprocess\ndef test_process(): subprocess.run(['true'])\ndef test_import(): import ray\n"
        "def test_quick(): pass\n",
        end_to_end__test_b="def test_named_as_slow(): pass\n",
    )
    assert "FAILED tests/test_a.py::test_process - Failed: not a quick test: subprocess.Popen true; make it" in said
    assert "FAILED tests/test_a.py::test_import - Failed: not a quick test: import ray" in said
    assert "PASSED tests/test_a.py::test_quick" in said and "test_named_as_slow" not in said


def test_tests_that_start_ray_share_a_worker(planted: Planted, tmp_path: Path) -> None:
    text = f"{NOTED}import pytest\n@pytest.mark.parametrize('one', range(6))\ndef test_it(one):\n    time.sleep(0.1)\n"
    assert "18 passed" in planted(
        "-n",
        "2",
        end_to_end__test_a=f"{text}    noted.touch()\n",
        end_to_end__test_b=f"{text}    noted.touch()\n",
        test_c=text,
    )
    assert len([*tmp_path.glob("tests/noted-*")]) == 1


def test_a_serial_test_runs_alone(planted: Planted, tmp_path: Path) -> None:
    noted = (
        "    began = time.monotonic()\n    time.sleep(0.1)\n"
        "    with noted.open('a') as file: print({}, began, time.monotonic(), file=file)\n"
    )
    text = f"{NOTED}import pytest\n@pytest.mark.parametrize('one', range(4))\ndef test_it(one):\n{noted.format(0)}"
    serial = f"@pytest.mark.serial\n@pytest.mark.parametrize('one', range(4))\ndef test_alone(one):\n{noted.format(1)}"
    assert "16 passed" in planted("-n", "2", test_a=text + serial, test_b=text + serial)
    lines = [line.split() for path in tmp_path.glob("noted-*") for line in path.read_text().splitlines()]
    times = sorted((float(began), float(ended), alone == "1") for alone, began, ended in lines)
    assert len([*tmp_path.glob("noted-*")]) == 2, "both workers ran some"
    assert all(after[0] >= before[1] for before, after in pairwise(times) if before[2] or after[2])
