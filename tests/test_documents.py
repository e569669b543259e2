"""The pages keep their word: jobs can be planned, commands run, tables agree with the code, links lead somewhere."""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch

import jobs.errors
from jobs.errors import MergeyardError
from jobs.job import Job, load_job, load_merge_document
from orchestrator.cli import main, parser
from orchestrator.judging.gate import EXIT_CODES
from orchestrator.planning.plan import make_plan
from tests.markdown import commands, fenced_blocks
from workers.methods import METHODS, Method
from workers.methods.tile import Inputs, PerModel, Tile

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "jobs" / "examples"
PARENTS = [EXAMPLES / "parents" / name for name in ("base", "long", "fmt")]
DIFFERENT = 1  # what `diff` says of two checkpoints that are not one


def pages() -> dict[str, str]:
    """Every Markdown page that git tracks, by its path."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z", "*.md"], cwd=ROOT, capture_output=True, check=True)
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return {name: (ROOT / name).read_text("utf-8") for name in names if (ROOT / name).is_file()}


def page(name: str) -> str:
    return (ROOT / name).read_text("utf-8")


def rows_below(text: str, heading: str) -> list[list[str]]:
    """The cells of the first table whose head begins with `heading`."""
    lines = text.splitlines()
    start = next(index for index, line in enumerate(lines) if line.startswith(f"| {heading} |"))
    rows: list[list[str]] = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


# ---- jobs and recipes


def documented_jobs() -> list[tuple[str, Job]]:
    """Every whole job and every mergekit document, of the pages and of the examples, with its place."""
    texts = [(f"jobs/examples/{path.name}", path.read_text("utf-8")) for path in sorted(EXAMPLES.glob("*.y*ml"))]
    texts += [
        (f"{name}:{block.line}", block.text)
        for name, text in pages().items()
        for block in fenced_blocks(text)
        if block.language.split()[:1] == ["yaml"] and re.search(r"^(recipe|merge_method):", block.text, re.MULTILINE)
        if block.language != "yaml fragment"
    ]
    return [
        (place, load_job(text, place) if re.search(r"^recipe:", text, re.MULTILINE) else merge_document(place, text))
        for place, text in texts
    ]


def merge_document(place: str, text: str) -> Job:
    return load_merge_document(text, place, "merged")


def with_parents_at_hand(job: Job, output: Path) -> Job:
    """The same job over tiny parents of our own, so that it can be planned without a bucket."""
    at_hand = dict(zip(job.parents, map(str, cycle(PARENTS)), strict=False))
    return replace(job, parents=at_hand, output=str(output))


def test_every_documented_job_can_be_planned(tmp_path: Path) -> None:
    found = documented_jobs()
    assert len(found) >= 9
    for place, job in found:
        plan = make_plan(with_parents_at_hand(job, tmp_path))
        assert len(plan.points) == len(job.points), place


def test_the_job_on_the_front_page_is_the_demo() -> None:
    block = next(block for block in fenced_blocks(page("README.md")) if block.language == "yaml")
    _what_it_shows, _, demo = (EXAMPLES / "demo.yaml").read_text("utf-8").partition("\n")
    assert block.text == demo


# ---- commands


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder like a fresh clone, as far as the commands need it; the demo asks few short items, and has no gate."""
    shutil.copytree(EXAMPLES, tmp_path / "jobs" / "examples")
    demo = tmp_path / "jobs" / "examples" / "demo.yaml"
    text = demo.read_text("utf-8")
    assert "items: 36" in text and "items: 12" in text and text.count("lengths: [256, 512, 1024]") == 2
    text, gates = re.subn("^gate:.*\n(?: .*\n)+", "", text, flags=re.MULTILINE)  # so few items allow no verdict
    assert gates == 1
    text = text.replace("items: 36", "items: 2").replace("items: 12", "items: 1")
    demo.write_text(text.replace("[256, 512, 1024]", "[256]"), "utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def verbs() -> dict[str, argparse.ArgumentParser]:
    """The verbs of the command line, each with its parser."""
    subparsers = next(action for action in parser()._actions if isinstance(action, argparse._SubParsersAction))
    return dict(subparsers.choices)


def elsewhere(words: list[str]) -> bool:
    """Whether a command speaks of a bucket, a cluster, a GPU or a file of the reader's own."""
    options = parser().parse_args(words)
    names = [getattr(options, name, None) for name in ("job", "config", "run", "a", "b")]
    names += getattr(options, "models", [])
    missing = [name for name in names if name is not None and not Path(name).exists()]
    return bool(missing) or any("://" in word or word in ("--address", "--device") for word in words)


def without_ray(words: list[str]) -> list[str]:
    takes_it = "--in-process" in verbs()[words[0]].format_usage()
    return [*words, "--in-process"] if takes_it and "--in-process" not in words else words


def test_the_commands_of_the_pages_run(reader: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran: dict[str, list[str]] = {}
    for name, text in sorted(pages().items()):
        for block in fenced_blocks(text):
            for line, words in commands(block, "mergeyard"):
                if "--help" in words or "--version" in words or elsewhere(words):
                    continue
                code = main(without_ray(words))
                said = capsys.readouterr()
                assert code in ((0, DIFFERENT) if words[0] == "diff" else (0,)), f"{name}:{line}: {said.err}"
                ran.setdefault(name, []).append(words[0])
    assert {"plan", "run", "merge"} <= set(ran["README.md"])
    needs_more = {"gate", "nightly", "submit"}  # more items, new parents, a cluster
    assert {verb for typed in ran.values() for verb in typed} == set(verbs()) - needs_more


def test_a_command_for_a_cluster_or_a_bucket_is_left_to_the_reader(reader: Path) -> None:
    demo = "jobs/examples/demo.yaml"
    assert not elsewhere(["plan", demo])
    assert elsewhere(["plan", demo, "--output", "s3://bucket/runs"])
    assert elsewhere(["run", demo, "--address", "auto"])
    assert elsewhere(["run", "job.yaml"])


@pytest.mark.heavy
def test_the_table_on_the_front_page_is_what_the_demo_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["run", str(EXAMPLES / "demo.yaml"), "--output", str(tmp_path), "--in-process", "--quiet"]
    assert main(run) == 0
    capsys.readouterr()
    assert main(["report", str(tmp_path / "demo"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    lines = {line["name"]: line for line in report["leaderboard"]}
    rows = rows_below(page("README.md"), "point")
    assert len(rows) == 4
    for cell, score, *lengths in rows:
        line = lines[re.match("`([^`]+)`", cell)[1]]  # type: ignore[index] # a cell without a name fails the test
        shown = [float(number) for number in [*score.split(" ± "), *lengths]]
        # another processor may change an answer or two of the 72 at each length
        assert shown == pytest.approx([line["score"], line["half_width"], *line["by_length"].values()], abs=3), cell
    assert f"> {report['verdict']['sentence'].split(':')[0]}:" in page("README.md")


def test_every_verb_has_its_row_on_the_front_page() -> None:
    listed = [re.match(r"`mergeyard ([\w-]+)", row[0]) for row in rows_below(page("README.md"), "command")]
    assert [match[1] for match in listed if match] == list(verbs())


def test_the_exit_codes_on_the_front_page_are_those_of_the_errors() -> None:
    kinds = [kind for kind in vars(jobs.errors).values() if isinstance(kind, type) and issubclass(kind, MergeyardError)]
    documented = {int(row[0]) for row in rows_below(page("README.md"), "exit code")}
    assert documented == {*EXIT_CODES.values()} | {kind.exit_code for kind in kinds}


# ---- links and names of files


def links(text: str) -> Iterator[str]:
    """Targets of the page's links, outside of code."""
    prose = re.sub(r"^(```+).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    prose = re.sub(r"``.*?``", "", prose)
    yield from re.findall(r"\]\(([^)\s]+)\)", prose)


def anchors(text: str) -> set[str]:
    """The names under which a page's headings can be linked."""
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_relative_link_leads_to_a_file_and_a_heading() -> None:
    broken: list[str] = []
    for name, text in pages().items():
        for target in links(text):
            path, _, anchor = target.partition("#")
            if "://" in target or target.startswith("mailto:"):
                continue
            file = (ROOT / name).parent / path if path else ROOT / name
            if not file.exists():
                broken.append(f"{name}: {target}")
            elif anchor and anchor not in anchors(file.read_text("utf-8")):
                broken.append(f"{name}: {target} has no such heading")
    assert broken == []


def test_a_broken_link_is_found() -> None:
    assert list(links("see [a](b.md#c) and `[x](y)`\n```\n[no](link)\n```\n[d](https://e)")) == [
        "b.md#c",
        "y",
        "https://e",
    ]
    assert anchors("# The job file\n## `keep`, and the rest\n") == {"the-job-file", "keep-and-the-rest"}


def test_the_page_of_the_programs_that_measure_lists_every_one() -> None:
    folder = ROOT / "tests" / "benchmarks"
    programs = {path.stem for path in folder.glob("*.py") if not path.name.startswith("test_")}
    programs |= {path.parent.name for path in folder.glob("*/__main__.py")}
    assert {row[0].strip("`") for row in rows_below(page("tests/benchmarks/README.md"), "program")} == programs


def test_every_documented_program_exists_and_has_the_options_shown() -> None:
    wrong: list[str] = []
    for name, text in pages().items():
        for block in fenced_blocks(text):
            for line, words in commands(block, "python"):
                if words[:1] == ["-m"] and words[1].startswith("tests."):
                    wrong += [f"{name}:{line}: {problem}" for problem in problems_of_program(words[1], words[2:])]
    assert wrong == []


def problems_of_program(module: str, words: list[str]) -> Iterator[str]:
    """A module that does not exist, or each `--option` that its source does not define."""
    path = ROOT.joinpath(*module.split("."))
    source = path / "__main__.py" if path.is_dir() else path.with_suffix(".py")
    if not source.is_file():
        yield f"no module {module}"
        return
    options = set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', source.read_text("utf-8")))
    yield from (f"{module} has no {word}" for word in words if word.startswith("--") and word not in options)


def test_a_program_that_does_not_exist_is_complained_about() -> None:
    assert [*problems_of_program("tests.benchmarks.no_such", [])] == ["no module tests.benchmarks.no_such"]
    assert [*problems_of_program("tests.fuzz", ["--inputs", "1", "--no-such"])] == ["tests.fuzz has no --no-such"]


def test_the_examples_page_lists_every_example() -> None:
    listed = {match[1] for row in rows_below(page("jobs/examples/README.md"), "file") if (match := LINK.match(row[0]))}
    assert listed == {path.name for path in EXAMPLES.glob("*.y*ml")}


LINK = re.compile(r"\[`[^`]+`\]\(([^)]+)\)")


# ---- the reference of the methods


def test_the_table_of_the_methods_is_the_schema() -> None:
    documented: dict[str, tuple[Any, ...]] = {}
    for method, base, models, *cells in rows_below(page("workers/methods/README.md"), "method"):
        name, file = re.fullmatch(r"\[`(\w+)`\]\((\w+\.py)\)", method).groups()  # type: ignore[union-attr] # as above
        assert METHODS[name].merge.__module__ == f"workers.methods.{file.removesuffix('.py')}"
        parameters = {
            parameter: (per_model, None if default == "required" else json.loads(default))
            for per_model, cell in zip((True, False), cells, strict=True)
            for parameter, default in re.findall(r"`(\w+)` ([^,]+)", cell)
        }
        documented[name] = (parameters, base, models)
    assert documented == {name: described(method) for name, method in METHODS.items()}


def described(method: Method) -> tuple[Any, ...]:
    """What the table has to say of a method."""
    parameters = {entry.name: (entry.per_model, entry.default) for entry in method.parameters.values()}
    models = f"{method.fewest} or more" if method.most is None else str(method.most)
    return parameters, method.base, models


def test_the_method_shown_works_as_shown() -> None:
    block = next(block for block in fenced_blocks(page("workers/methods/README.md")) if block.language == "python")
    names: dict[str, Any] = {"Inputs": Inputs, "PerModel": PerModel, "Tensor": torch.Tensor}
    exec("from __future__ import annotations\n" + block.text, names)
    parameters = Method(names["nearest"]).parameters
    assert {name: entry.per_model for name, entry in parameters.items()} == {"weight": True, "lambda": False}
    tile = Tile("w", 0, {"b": torch.tensor([1.0, 2.0]), "x": torch.tensor([3.0, 2.0])}, {})
    merged = names["nearest"](Inputs(tile, ("x",), "b", "float32"), weight=(0.5,), lambda_=3.0)
    assert merged.tolist() == [4.0, 2.0]


# ---- infrastructure

S3_ACTIONS = {  # https://docs.aws.amazon.com/AmazonS3/latest/userguide/using-with-s3-policy-actions.html
    "head_bucket": "s3:ListBucket",
    "head_object": "s3:GetObject",
    "create_multipart_upload": "s3:PutObject",
    "upload_part": "s3:PutObject",
    "complete_multipart_upload": "s3:PutObject",
    "abort_multipart_upload": "s3:AbortMultipartUpload",
    "list_multipart_uploads": "s3:ListBucketMultipartUploads",
}
OBSTORE_ACTIONS = {
    "get": "s3:GetObject",
    "head": "s3:GetObject",
    "put": "s3:PutObject",
    "list": "s3:ListBucket",
    "delete": "s3:DeleteObject",
}


def storage_code(name: str) -> str:
    return (ROOT / "workers" / "storage" / name).read_text("utf-8")


def test_the_bucket_policy_allows_what_the_code_does_and_no_more() -> None:
    block = next(block for block in fenced_blocks(page("infra/README.md")) if block.language == "json")
    policy = json.loads(block.text)
    assert policy["Version"] == "2012-10-17"
    assert all(statement["Effect"] == "Allow" for statement in policy["Statement"])
    allowed = {action for statement in policy["Statement"] for action in statement["Action"]}
    done = {S3_ACTIONS[call] for call in re.findall(r"client\.([a-z_]+)\(", storage_code("s3.py"))}
    done |= {OBSTORE_ACTIONS[call] for call in re.findall(r"\bobstore\.([a-z]+)\(", storage_code("cloud.py"))}
    assert allowed == done
    for statement in policy["Statement"]:
        of_objects = {"s3:ListBucket", "s3:ListBucketMultipartUploads"}.isdisjoint(statement["Action"])
        assert all(("/" in resource) == of_objects for resource in statement["Resource"])


def test_every_variable_of_our_own_is_documented() -> None:
    documented = set(re.findall(r"`(MERGEYARD_\w+)`", page("infra/README.md")))
    code = [path.read_text("utf-8") for folder in ("workers", "orchestrator") for path in (ROOT / folder).rglob("*.py")]
    used = {name for text in code for name in re.findall(r"\"(MERGEYARD_\w*[A-Z])\"", text)}
    assert documented == used


def test_the_variables_named_in_errors_are_documented() -> None:
    named = set(re.findall(r"\b((?:AWS|AZURE|GOOGLE|HF)_[A-Z_]+)\b", storage_code("translation.py")))
    named |= set(re.findall(r"set (HF_[A-Z]+)\b", storage_code("hub.py")))
    assert [name for name in sorted(named) if f"`{name}`" not in page("infra/README.md")] == []
