"""The files of the page: what they hold, which there are, and what a run without them says."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest

from jobs.errors import ObjectMissing
from orchestrator.cli import main
from orchestrator.points.verifying import verify
from orchestrator.viewing.address import address
from orchestrator.viewing.exporting import export
from orchestrator.viewing.site import Site, read_site
from tests.orchestrator.report import made_up as report_run
from tests.orchestrator.viewing.made_up import (
    changed,
    number_of,
    perplexity_row,
    prompt,
    right_rows,
    write_run,
)
from tests.seaweedfs import SeaweedFS
from workers.storage import open_store


def unpacked(site: Site, path: str) -> Any:
    return json.loads(gzip.decompress(site.read(path)))


def test_each_prompt_is_there_once_for_all_points(tmp_path: Path) -> None:
    site = read_site(write_run(tmp_path, right_rows(points=("a", "b", "c"), items=3)), live=False)
    prompts = [path for path in site.paths() if path.startswith("prompts/")]
    assert len(prompts) == len(set(prompts)) == 2 * 2 * 3
    found = unpacked(site, "prompts/vt2048/2.json.gz")
    assert found["text"] == prompt(2, 2048) and found["answers"] == [number_of(2)]
    assert (found["depths"], found["answer_prefix"], found["tokens"]) == ([0.5], " It is", 2040)


def test_the_answers_come_in_chunks_of_the_columns_order(tmp_path: Path) -> None:
    rows = changed(right_rows(items=2), lambda row: row.point == "b", answer="of b", thought="hm")
    site = read_site(write_run(tmp_path, rows), live=False)
    answers = unpacked(site, f"rows/{site.version}/answers-0.json.gz")
    assert answers == [row.answer for row in site.columns.rows] and answers[-1] == "of b"
    assert unpacked(site, f"rows/{site.version}/thoughts-0.json.gz") == [""] * 8 + ["hm"] * 8


@pytest.mark.parametrize(
    "path",
    [
        *("../plan.json", "plan.json", "rows/0000/numbers.bin.gz", "prompts/vt1024/99.json.gz"),
        *("prompts/nothing/0.json.gz", "rows/{version}/answers-7.json.gz", "rows/{version}/thoughts-0.json.gz", ""),
    ],
)
def test_any_other_path_is_missing(tmp_path: Path, path: str) -> None:
    site = read_site(write_run(tmp_path, right_rows()), live=True)
    with pytest.raises(ObjectMissing):
        site.read(path.format(version=site.version))


def test_an_export_is_every_file_and_a_second_one_leaves_no_old_answers(tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out"
    first = read_site(write_run(run, right_rows()), live=False)
    export(first, str(out))
    (out / "notes.txt").write_text("of somebody")
    second = read_site(write_run(run, changed(right_rows(), lambda row: row.item == 0, score=0.0)), live=False)
    found = export(second, str(out))
    assert second.version != first.version
    files = {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert files == {path: second.read(path) for path in second.paths()} | {"notes.txt": b"of somebody"}
    assert (found.files, found.bytes) == (len(files) - 1, sum(map(len, files.values())) - len("of somebody"))


@pytest.mark.usefixtures("figures")
def test_an_export_without_an_address_goes_into_the_run_and_the_report_links_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = report_run.write_run(tmp_path / "run", tasks=("vt",), lengths=(4096,))
    assert main(["report", run]) == 0
    page = Path(run) / "report/index.html"
    assert "view/index.html" not in page.read_text("utf-8")
    assert f"mergeyard view {run}" in page.read_text("utf-8")
    capsys.readouterr()
    assert main(["view", run, "--export", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["export"] == f"{run}/report/view" and (Path(run) / "report/view/index.html").is_file()
    link = address(point="cos", length=4096).replace("&", "&amp;")
    text = page.read_text("utf-8")
    assert f'href="view/index.html{link}"' in text
    [name, *_] = re.findall(
        r'<a href="view/index.html#point=([^&]+)&amp;length=4096&amp;outcome=missed" tabindex', text
    )
    link = address(point=name, task="vt").replace("&", "&amp;")
    assert re.search(f'<td><a href="view/index.html{link}">[0-9.]+', text), "a number of the table by task"
    _, records = verify(run)
    assert {check.record: (check.sealed, check.problems) for check in records}["report/view/index.html"] == (True, ())


def test_a_run_without_prompts_is_shown_without_them(tmp_path: Path) -> None:
    rows = [*right_rows(), perplexity_row("a"), perplexity_row("b")]
    site = read_site(write_run(tmp_path, rows, prompts=False), live=False)
    assert not any(cell["prompts"] for cell in site.document["cells"])
    assert not any(path.startswith("prompts/") for path in site.paths())


def test_only_benchmarks_with_prompts_have_them(tmp_path: Path) -> None:
    url = write_run(tmp_path, [*right_rows(), perplexity_row("a")])
    open_store(url).write("items/windows/000000-000001.parquet", b"of another kind")
    cells = read_site(url, live=False).document["cells"]
    assert {cell["benchmark"]: cell["prompts"] for cell in cells} == {"ruler": True, "perplexity": False}


@pytest.mark.parametrize("more", [[], ["--export", "{folder}/out"]])
def test_a_folder_without_answers_is_one_line_with_a_remedy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("of somebody")
    options = [option.format(folder=tmp_path) for option in more]
    for run in (tmp_path / "run", tmp_path / "nowhere"):
        assert main(["view", str(run), *options]) == 2
        assert capsys.readouterr().err == f"mergeyard: {run}: no scores there; `mergeyard evaluate` makes them\n"
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_hold_an_export_is_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run", right_rows(items=2))
    (tmp_path / "file").write_text("of somebody")
    assert main(["view", run, "--export", str(tmp_path / "file" / "out")]) == 2
    assert "is a file, not a folder; choose another path" in capsys.readouterr().err


def test_an_empty_evaluation_is_one_line_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    url = write_run(tmp_path, [], finished=False)
    assert main(["view", url]) == 2
    assert capsys.readouterr().err == f"mergeyard: {url}: no scores there yet; `mergeyard evaluate` makes them\n"


def test_the_address_can_be_read_and_written_by_people() -> None:
    assert address(point="a b&c", task="vt", length=4096) == "#point=a+b%26c&task=vt&length=4096&outcome=missed"
    assert address(point="a", outcome="", beside="b") == "#point=a&beside=b&differ=1"


def test_an_export_to_a_bucket_is_a_page_for_browsers(s3_server: SeaweedFS, s3_url: str, tmp_path: Path) -> None:
    site = read_site(write_run(tmp_path, right_rows(items=2)), live=False)
    export(site, f"{s3_url}/answers")
    store = open_store(f"{s3_url}/answers")
    assert {info.key: bytes(store.read(info.key)) for info in store.list()} == {
        path: site.read(path) for path in site.paths()
    }
    bucket, _, prefix = s3_url.removeprefix("s3://").partition("/")
    served = s3_server.client().head_object(Bucket=bucket, Key=f"{prefix}/answers/index.html")
    assert served["ContentType"] == "text/html; charset=utf-8"
