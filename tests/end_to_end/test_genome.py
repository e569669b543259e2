"""A genome of mergekit-evolve is searched on a task of lm-evaluation-harness, and the best merge is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orchestrator.cli import main

ROOT = Path(__file__).parents[2]
GENOME = ROOT / "jobs" / "examples" / "evolve" / "genome.yml"


@pytest.mark.heavy
def test_a_genome_is_searched_on_tasks_of_the_harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    docs = [{"prompt": f"The number is {number}. The number is", "answer": str(number)} for number in range(10, 40)]
    (tmp_path / "docs.json").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "task.yaml").write_text(
        "task: copies\noutput_type: generate_until\ndataset_path: json\n"
        "dataset_kwargs: {data_files: {test: docs.json}}\ntest_split: test\n"
        'doc_to_text: "{{prompt}}"\ndoc_to_target: answer\n'
        'generation_kwargs: {until: ["."], max_gen_toks: 4, do_sample: false}\n'
        "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n"
    )
    text = (
        GENOME.read_text().replace("name: arc_easy", f"name: {tmp_path}/task.yaml").replace("acc_norm", "exact_match")
    )
    (tmp_path / "genome.yml").write_text(text.replace("limit: 100", "limit: 20"))
    run = ["search", str(tmp_path / "genome.yml"), str(tmp_path / "out"), "--in-process", "--max-fevals", "5", "--json"]
    assert main(run) == 0
    rows = json.loads(capsys.readouterr().out)["leaderboard"]
    assert len(rows) == 5 + 3
    assert (tmp_path / "out" / "genome" / "points").is_dir()
    batches = sorted((tmp_path / "out" / "genome" / "search").iterdir())
    before = [path.read_bytes() for path in batches]
    assert main(run) == 0
    assert json.loads(capsys.readouterr().out)["leaderboard"] == rows
    assert [path.read_bytes() for path in batches] == before
