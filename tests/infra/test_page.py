"""What `infra/README.md` tells the reader to type is there to be typed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from click import NoSuchOption
from ray.scripts.scripts import start

from tests.infra.conftest import KUBERAY, ROOT
from tests.infra.reading import DOCKERFILE, counted, instructions
from tests.markdown import commands, fenced_blocks

PAGE = (ROOT / "infra" / "README.md").read_text("utf-8")


def rows(heading: str) -> list[list[str]]:
    """The cells of the table whose head begins with this."""
    table = PAGE.split(f"| {heading} |")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_every_path_of_this_folder_exists() -> None:
    named = set(re.findall(r"\binfra/[\w./-]*\w", PAGE)) - {"infra/kuberay/base/token.env"}
    assert len(named) >= 12
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_the_table_of_overlays_is_the_folder() -> None:
    listed = {row[0].strip("`") for row in rows("overlay")}
    assert listed == {path.name for path in (KUBERAY / "overlays").iterdir()}


def test_the_table_of_metrics_is_what_is_counted() -> None:
    listed = {
        name: set(labels.split(",")) - {""} for name, labels in re.findall(r"`(ray_mergeyard_\w+)(?:\{(.*?)\})?`", PAGE)
    }
    assert listed == counted()


def test_images_are_of_this_version_and_arguments_those_of_the_dockerfile() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    texts = (PAGE, DOCKERFILE.read_text("utf-8"))
    images = {image for text in texts for image in re.findall(r"\bmergeyard:([\w.]+)-[cg]pu\b", text)}
    assert images == {version}
    given = {name for text in texts for name in re.findall(r"--build-arg (\w+)=", text)}
    assert given == {rest.split("=")[0] for name, rest in instructions(texts[1]) if name == "ARG"}


def test_every_folder_has_its_paragraph() -> None:
    folders = [path.name for path in (ROOT / "infra").iterdir() if path.is_dir()]
    assert [name for name in folders if f"infra/{name}" not in PAGE] == []
    assert Path(ROOT / "infra" / "README.md").is_file()


def test_ray_takes_the_lines_that_start_a_head_and_a_worker() -> None:
    typed = [words for block in fenced_blocks(PAGE) for _, words in commands(block, "ray") if words[0] == "start"]
    head, worker = (start.make_context("ray start", words[1:]).params for words in typed)
    assert (head["head"], head["port"], head["num_cpus"], head["dashboard_host"]) == (True, 6379, 0, "127.0.0.1")
    assert worker["address"] == "HEAD:6379"
    assert head["object_store_memory"] == worker["object_store_memory"] == 200_000_000


def test_ray_refuses_an_option_that_it_does_not_have() -> None:
    with pytest.raises(NoSuchOption):
        start.make_context("ray start", ["--heads"])
