"""`mergeyard report` and `mergeyard status` over a finished, an unfinished and an empty run."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest

from jobs.sealing import unsealed
from orchestrator.cli import main
from orchestrator.evaluating.results import RESULTS, read_results
from orchestrator.report.run import PAGE, read_run, report_on
from tests.orchestrator.report.made_up import HOSTILE, write_run
from workers.evaluating.scores import write_scores


@pytest.fixture
def run(tmp_path: Path) -> str:
    return write_run(tmp_path / "made-up", tasks=("vt",), lengths=(4096, 8192))


def test_report_prints_the_table_and_the_sentence_and_writes_the_page(
    run: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", run]) == 0
    out = capsys.readouterr().out
    best = read_results(run).standing[0].point
    assert out.splitlines()[1].split()[0] == best
    recommendation = report_on(read_run(run)).recommendation
    assert recommendation is not None and recommendation.sentence in " ".join(out.split())
    assert out.splitlines()[-1] == f"{run}/{PAGE}" and (Path(run) / PAGE).stat().st_size > 10_000


def test_report_as_json(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", run, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["leaderboard"]) == 22
    assert found["verdict"]["keep"] == found["leaderboard"][0]["name"]
    assert found["baseline"] == "cos" and len(found["comparisons"]) == 20
    assert found["gate"]["outcome"] == "inconclusive" and len(found["departures"]) == 10


def test_every_score_as_csv(run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", run, "--csv", "-"]) == 0
    text = capsys.readouterr().out
    assert main(["report", run, "--csv", str(tmp_path / "scores.csv")]) == 0
    assert (tmp_path / "scores.csv").read_text(encoding="utf-8") == text
    rows, answered = list(csv.DictReader(io.StringIO(text))), read_results(run).rows
    assert len(rows) == len(answered)
    for row, answer in zip(rows, answered, strict=True):
        assert (row["point"], float(row["score"]), int(row["item"])) == (answer.point, answer.score, answer.item)
    assert HOSTILE in {row["answer"] for row in rows}


def test_a_csv_that_cannot_be_written_is_bad_input(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    page = Path(run, "report/index.html")
    page.unlink(missing_ok=True)
    assert main(["report", run, "--csv", "/nowhere/at/all.csv"]) == 2
    assert not page.exists()
    assert "--csv /nowhere/at/all.csv: there is no folder /nowhere/at" in capsys.readouterr().err


def test_a_run_that_cannot_be_written_is_read(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(run, PAGE).unlink(missing_ok=True)
    Path(run, PAGE, "in the way").mkdir(parents=True)
    for options in ([], ["--json"]):
        assert main(["report", run, *options]) == 2
        told = capsys.readouterr()
        assert read_results(run).standing[0].point in told.out
        assert PAGE in told.err


def test_a_run_without_scores_is_told_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "`mergeyard evaluate`" in capsys.readouterr().err


def test_status_shows_how_it_stands_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path, finished=False, tasks=("vt",))
    assert main(["status", run]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "0 of 20 complete" in out and "So far, with the evaluation unfinished, " in out
    assert " p = " not in out and " p < " not in out and "95 % +" not in out
    assert main(["status", run, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["finished"] is False and len(facts["leaderboard"]) == 22


def test_status_before_the_first_answer_has_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, tasks=("vt",))
    (tmp_path / "report" / "evaluation.json").unlink()
    assert main(["status", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "0 of 20 complete" in out and "score" not in out
    assert main(["status", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["leaderboard"] is None


def one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends for damaged files."""
    assert main(words) == 1
    said = capsys.readouterr()
    assert said.err.startswith("mergeyard: ") and said.err.count("\n") == 1 and said.out == "", said.err
    return said.err


def test_an_evaluation_that_lacks_something_is_one_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(run) / "report" / "evaluation.json"
    document = unsealed(path.read_bytes())
    first, second = (f"{run}/{entry['point']}" for entry in document["standing"][:2])
    lacking = [
        {key: entry for key, entry in document.items() if key != name} for name in ("ranked", "race", "finished")
    ]
    for damaged in ([], *lacking, {**document, "standing": [{"point": "a"}]}):
        path.write_text(json.dumps(damaged))
        for words in (["report", run], ["status", run], ["compare", first, second]):
            assert "report/evaluation.json: damaged" in one_line(words, capsys)


def test_a_verdict_that_lacks_something_is_one_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path(run) / "gate" / "verdict.json"
    document = json.loads(path.read_text())
    for damaged in ([1], {**document, "lines": []}, {**document, "looks": [{}]}, {**document, "new": None}):
        path.write_text(json.dumps(damaged))
        for verb in ("report", "status"):
            assert "gate/verdict.json: damaged" in one_line([verb, run], capsys)


def test_a_run_without_an_answer_is_told_what_to_do(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    (Path(run) / RESULTS).write_bytes(write_scores([]))
    assert main(["report", run]) == 2
    assert "no scores there yet; `mergeyard evaluate` makes them" in capsys.readouterr().err
    assert main(["status", run]) == 0
    assert "score" not in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["report", "status"])
def test_forty_columns_are_enough(
    run: str, verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    assert main([verb, run]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if run not in line]
    assert max(map(len, lines)) <= 40
    best = next(line for line in lines if line.split()[:1] == [read_results(run).standing[0].point])
    assert "±" in best and "…" not in best


def test_the_run_in_mlflow(run: str, tmp_path: Path) -> None:
    mlflow = pytest.importorskip("mlflow")
    for _ in range(2):  # the second time renews what the first logged
        assert main(["report", run, "--mlflow", str(tmp_path / "store")]) == 0
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "store").as_uri())
    experiment = client.get_experiment_by_name("made-up")
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert len(runs) == 1 + 22
    best = read_results(run).standing[0].point
    logged = next(entry for entry in runs if entry.info.run_name == best)
    assert {"w", "d"} == logged.data.params.keys()
    steps = {(metric.step, metric.value) for metric in client.get_metric_history(logged.info.run_id, "score_by_length")}
    by_length = {step for step, _ in steps}
    assert by_length == {4096, 8192} and all(0 <= value <= 100 for _, value in steps)
    top = next(entry for entry in runs if entry.info.run_name == "made-up")
    assert logged.data.tags["mlflow.parentRunId"] == top.info.run_id
    assert {entry.data.tags["mergeyard.score_of"] for entry in (top, logged)} == {"ruler and needle"}
    assert [file.path for file in client.list_artifacts(top.info.run_id)] == ["index.html"]


def test_without_mlflow_it_says_what_to_install(
    run: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    assert main(["report", run, "--mlflow", "somewhere"]) == 2
    assert "pip install 'mergeyard[mlflow]'" in capsys.readouterr().err


def test_an_mlflow_server_that_is_not_there_is_one_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("mlflow")
    assert main(["report", run, "--mlflow", "http://127.0.0.1:9"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
