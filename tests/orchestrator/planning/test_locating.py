"""References to models and adapters, and the places they lead to."""

from __future__ import annotations

from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from jobs.errors import BadInput
from jobs.job import load_job
from orchestrator.planning import locating
from orchestrator.planning.locating import locate, open_parents

Place = tuple[str, str | None]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the folders base, lora, a+b and v@1."""
    for name in ("base", "lora", "a+b", "v@1"):
        (tmp_path / name).mkdir()
    return tmp_path


def located(reference: str, folder: Path, *, bare_names: bool = True) -> Place:
    """The place, with paths relative to the folder."""
    base, adapter = locate(reference.format(folder), folder, "m.yml:2", bare_names=bare_names)
    return base.removeprefix(f"{folder}/"), adapter.removeprefix(f"{folder}/") if adapter else adapter


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("base", ("base", None)),
        ("base+lora", ("base", "lora")),
        ("{0}/base+{0}/lora", ("base", "lora")),
        ("./base+./lora", ("base", "lora")),
        ("a+b", ("a+b", None)),
        ("a+b+lora", ("a+b", "lora")),
        ("base+a+b", ("base", "a+b")),
        ("v@1", ("v@1", None)),
        ("v@1+lora", ("v@1", "lora")),
        ("org/base+org/lora", ("hf://org/base", "hf://org/lora")),
        ("org/base@v1+org/lora@main", ("hf://org/base@v1", "hf://org/lora@main")),
        ("org/base+lora", ("hf://org/base", "lora")),
        ("base+org/lora", ("base", "hf://org/lora")),
        ("hf://org/base@v1+org/lora", ("hf://org/base@v1", "hf://org/lora")),
        ("hf://org/base+hf://org/lora@v2", ("hf://org/base", "hf://org/lora@v2")),
        ("s3://bucket/base", ("s3://bucket/base", None)),
        ("s3://bucket/a+b", ("s3://bucket/a+b", None)),
        ("s3://bucket/runs/a+b/point", ("s3://bucket/runs/a+b/point", None)),
        ("s3://bucket/base+s3://bucket/lora", ("s3://bucket/base", "s3://bucket/lora")),
        ("s3://bucket/a+b+s3://bucket/lora", ("s3://bucket/a+b", "s3://bucket/lora")),
        ("s3://bucket/base+{0}/lora", ("s3://bucket/base", "lora")),
        ("huggingface.co/org/base+org/lora", ("https://huggingface.co/org/base", "hf://org/lora")),
    ],
)
def test_a_reference_leads_to_a_model_and_its_adapter(folder: Path, reference: str, expected: Place) -> None:
    assert located(reference, folder) == expected


def test_in_a_job_a_repository_needs_its_scheme(folder: Path) -> None:
    assert located("base+lora", folder, bare_names=False) == ("base", "lora")
    assert located("hf://org/base+org/lora", folder, bare_names=False) == ("hf://org/base", "hf://org/lora")
    with pytest.raises(BadInput, match=r"m\.yml:2: no folder .*/org/base; give a path, or hf://"):
        located("org/base", folder, bare_names=False)


@pytest.mark.parametrize(
    ("reference", "line"),
    [
        ("base+nowhere", r'"base\+nowhere": no folder .*/nowhere for the adapter after the \+; give a path, or hf://'),
        ("hf://org/base+nowhere", r"no folder .*/nowhere for the adapter after the \+"),
        ("base+lora+nowhere", r"no folder .*/lora\+nowhere for the adapter"),
        ("nowhere+lora", r"no folder .*/nowhere\+lora; give a path"),
        ("nowhere", r"no folder .*/nowhere; give a path"),
    ],
)
def test_a_part_that_is_nowhere_is_named(folder: Path, reference: str, line: str) -> None:
    with pytest.raises(BadInput, match=rf"^m\.yml:2: .*{line}"):
        located(reference, folder)


def test_parents_are_opened_at_once_and_the_first_fault_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (
        "name: both\nparents: {a: base, b: lora}\nrecipe: {merge_method: linear, models: [{model: a}, {model: b}]}\n"
        "output: runs\n"
    )
    job, together = load_job(text, "job.yaml"), Barrier(2, timeout=60)

    def opened(url: str, name: str) -> Any:
        together.wait()
        return url

    monkeypatch.setattr(locating, "open_checkpoint", opened)
    found: Any = open_parents(job, folder, bare_names=False)
    assert found == {"a": str(folder / "base"), "b": str(folder / "lora")}

    def faulty(url: str, name: str) -> Any:
        together.wait()
        raise BadInput(f"{name} is wrong")

    monkeypatch.setattr(locating, "open_checkpoint", faulty)
    with pytest.raises(BadInput, match="a is wrong"):
        open_parents(job, folder, bare_names=False)
