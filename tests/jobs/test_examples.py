"""Every example is a job that loads, and says in its first line what it is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.evaluate import RulerSpec
from jobs.job import load_job

EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_example_loads_and_introduces_itself(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# ")
    job = load_job(text, path.name)
    assert job.points
    assert max(len(line) for line in text.splitlines()) <= 120


def test_the_demo_has_its_parents_beside_it() -> None:
    job = load_job((EXAMPLES / "demo.yaml").read_text(encoding="utf-8"), "demo.yaml")
    assert len(job.points) == 11
    assert all((EXAMPLES / url / "model.safetensors").is_file() for url in job.parents.values())
    ruler = job.evaluate.benchmarks["ruler"] if job.evaluate is not None else None
    assert isinstance(ruler, RulerSpec) and ruler.lengths == (256, 512, 1024)
