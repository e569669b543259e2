"""The package of notebooks: the lines on the front page, what objects show, errors as exceptions."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from jobs.errors import BadInput
from tests.markdown import fenced_blocks
from tests.orchestrator.report.made_up import HOSTILE, write_run
from tests.orchestrator.tiny_jobs import PARENTS, job_text
from workers.storage import open_store

ROOT = Path(__file__).parents[3]
HOME = ROOT / "orchestrator" / "notebook"


@pytest.fixture
def mergeyard(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(HOME))
    return importlib.import_module("mergeyard")


def test_the_distribution_has_it_at_the_top_level() -> None:
    targets = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert targets["wheel"]["force-include"] == {"orchestrator/notebook/mergeyard": "mergeyard"}
    assert (HOME / "mergeyard" / "py.typed").is_file()


@pytest.mark.usefixtures("figures")
def test_the_lines_on_the_front_page_run(
    mergeyard: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo with fewer points and items."""
    shutil.copytree(ROOT / "jobs" / "examples", tmp_path / "jobs" / "examples")
    demo = tmp_path / "jobs" / "examples" / "demo.yaml"
    text = demo.read_text()
    for long, short in {"step: 0.1": "step: 0.5", "items: 36": "items: 3", "items: 12": "items: 3"}.items():
        assert long in text
        text = text.replace(long, short)
    demo.write_text(text)
    monkeypatch.chdir(tmp_path)
    (lines,) = [
        block.text for block in fenced_blocks((ROOT / "README.md").read_text()) if "import mergeyard" in block.text
    ]
    names: dict[str, object] = {}
    exec(lines, names)
    run = names["run"]
    assert len(names["facts"]["points"]) == 3 and len(names["answers"]) == len(run.report.run.result.answers)
    assert run.url.endswith("/runs/demo") and run.verdict is not None
    assert (tmp_path / "runs" / "soup" / "config.json").is_file()


@pytest.mark.usefixtures("figures")
def test_objects_show_themselves_and_escape_names(mergeyard: ModuleType, tmp_path: Path) -> None:
    run = mergeyard.open_run(write_run(tmp_path / "run", grid=(3, 2), items=3))
    assert {"grid-length", "profiles", "importance", "pairs"} <= {*run.figures}
    assert "<svg" in run.figures["importance"]._repr_html_() and len(run.figures["profiles"].svgs()) == 2
    html = run._repr_html_()
    assert html.count("<tr>") == 1 + len(run.leaderboard.lines) == 1 + run.leaderboard.table().num_rows
    assert "<i>fell" not in html
    assert set(run.answers().column("answer").to_pylist()) >= {HOSTILE}


@pytest.mark.usefixtures("figures")
def test_a_run_in_a_bucket_is_the_run_on_a_disk(mergeyard: ModuleType, tmp_path: Path, s3_url: str) -> None:
    here, there = (
        mergeyard.open_run(write_run(place, grid=(3, 2), items=3)) for place in (tmp_path / "run", f"{s3_url}/run")
    )
    assert there.url == f"{s3_url}/run" and there.verdict == here.verdict
    assert there.leaderboard.html() == here.leaderboard.html()
    answers, same = (run.answers().drop_columns(["depth"]) for run in (there, here))  # NaN where there is no needle
    assert answers == same and answers.num_rows > 0
    drawn, expected = (
        {name: re.findall('aria-label="([^"]+)"', figure._repr_html_()) for name, figure in run.figures.items()}
        for run in (there, here)
    )
    assert drawn == expected and len(drawn["profiles"]) == 2


def test_jobs_as_objects_write_into_a_bucket(mergeyard: ModuleType, tmp_path: Path, s3_url: str) -> None:
    job = yaml.safe_load(job_text(tmp_path))
    facts = mergeyard.plan(job, output=s3_url)
    run = mergeyard.evaluate(job, output=s3_url, in_process=True)
    assert run.url == mergeyard.open_run(f"{s3_url}/tiny").url == f"{s3_url}/tiny"
    assert {line.name for line in run.leaderboard.lines if line.kind == "point"} == {*facts["points"]}
    assert not (tmp_path / "runs").exists()
    soup = job["recipe"] | {"models": [{"model": str(PARENTS / "long"), "parameters": {"weight": 1}}]}
    assert len(mergeyard.merge(soup, f"{s3_url}/soup").points) == 1
    assert "config.json" in {info.key for info in open_store(f"{s3_url}/soup").list()}


def test_errors_are_the_lines_of_the_commands(mergeyard: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no scores there; `mergeyard evaluate` makes them"):
        mergeyard.open_run(tmp_path)
    with pytest.raises(BadInput, match=r"nowhere\.yaml: no such file"):
        mergeyard.plan("nowhere.yaml")
    for wrong in ("", "a\0b"):
        with pytest.raises(BadInput, match=r"^'.*': not a path; name a YAML file$"):
            mergeyard.plan(wrong)
    with pytest.raises(BadInput, match=r"^job: the document needs the key \"parents\"$"):
        mergeyard.plan({"name": "x"})


def test_the_import_is_light() -> None:
    heavy = "{'torch', 'ray', 'transformers', 'pyarrow', 'pandas', 'matplotlib', 'scipy', 'numpy'}"
    code = f"import sys; sys.path[:0] = {[str(HOME), str(ROOT)]!r}; import mergeyard; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
