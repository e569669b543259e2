"""What lies beside the shards of a finished point, and what its manifest promises."""

from __future__ import annotations

import hashlib
import html
import json
import re
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from blake3 import blake3
from safetensors.torch import load_file

from jobs.errors import CorruptData, StorageError
from jobs.manifest import Manifest
from jobs.recipe import recipe_template
from jobs.yaml_nodes import load_document
from orchestrator.cluster.in_process import InProcessPool
from orchestrator.merging.driver import RunResult, drive
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.watching import Watcher
from tests.orchestrator.conftest import LINEAR, files_under
from tests.orchestrator.models import CONFIG, HEAD, load_model, weights, write_model
from workers.checkpoints.chat_templates import NAMED
from workers.digests import weights_digest
from workers.storage.local import LocalStore

Planning = Callable[..., Plan]


def run(plan: Plan) -> RunResult:
    return drive(plan, InProcessPool(), Watcher(visible=False))


@pytest.fixture
def finished(plan: Planning, tmp_path: Path) -> Path:
    """The folder of a run of two points in several shards."""
    run(plan(shard_size=3000))
    return tmp_path / "runs" / "soup"


def point(finished: Path, name: str = "w0.25") -> Path:
    return finished / "points" / name


def front_matter(card: str) -> Any:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_a_point_holds_what_the_libraries_look_for(finished: Path):
    names = {path.name for path in point(finished).iterdir() if not path.name.endswith(".safetensors")}
    assert names == {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "mergekit_config.yml",
        "README.md",
        "manifest.json",
    }
    assert json.loads((point(finished) / "config.json").read_text()) == CONFIG


def test_tokenizer_and_generation_settings_are_the_parents_bytes(finished: Path, parents: Path):
    for name in ("tokenizer.json", "generation_config.json"):
        assert (point(finished) / name).read_bytes() == (parents / "cos" / name).read_bytes()


def test_the_index_leads_to_every_tensor(finished: Path):
    index = json.loads((point(finished) / "model.safetensors.index.json").read_text())
    total = 0
    for name, file in index["weight_map"].items():
        total += load_file(point(finished) / file)[name].nbytes
    assert index["metadata"]["total_size"] == total


def test_the_manifest_holds_every_file_and_every_tensor(finished: Path):
    folder = point(finished)
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    assert manifest.files.keys() == {path.name for path in folder.iterdir()} - {"manifest.json"}
    for name, entry in manifest.files.items():
        content = (folder / name).read_bytes()
        assert entry.size == len(content)
        assert entry.sha256 in (None, hashlib.sha256(content).hexdigest())
        assert (entry.sha256 is None) == name.endswith(".safetensors")
    for name, tensor in load_model(folder).items():
        digest = f"blake3:{blake3(bytes(tensor.reshape(-1).view(torch.uint8).numpy())).hexdigest()}"
        assert manifest.tensors[name].digest == digest
    assert manifest.weights == weights_digest({name: entry.digest for name, entry in manifest.tensors.items()})


def test_the_manifest_is_the_last_file(finished: Path):
    for name in ("w0.25", "w0.5"):
        times = {path.name: path.stat().st_mtime_ns for path in point(finished, name).iterdir()}
        assert max(times, key=lambda name: times[name]) == "manifest.json"


def test_the_files_of_a_point_do_not_wait_for_each_other(plan: Planning, monkeypatch: pytest.MonkeyPatch):
    write, six = LocalStore.write, threading.Barrier(6, timeout=60)  # all files but shards and manifest

    def meet(store: LocalStore, key: str, data: bytes, **more: Any) -> Any:
        if "/points/" in f"/{key}" and not key.endswith("manifest.json"):
            six.wait()
        return write(store, key, data, **more)

    monkeypatch.setattr(LocalStore, "write", meet)
    assert len(run(plan(shard_size=3000)).points) == 2


def test_a_point_is_complete_only_once_each_of_its_files_is_written(
    plan: Planning, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    planned, write = plan(shard_size=3000), LocalStore.write

    def refuse(store: LocalStore, key: str, data: bytes, **more: Any) -> Any:
        if key.endswith("README.md"):
            raise StorageError(f"{key}: the disk is full")
        return write(store, key, data, **more)

    with monkeypatch.context() as patch, pytest.raises(StorageError, match=r"README\.md: the disk is full"):
        patch.setattr(LocalStore, "write", refuse)
        run(planned)
    folder = tmp_path / "runs" / "soup" / "points"
    assert [*folder.rglob("config.json")] and not [*folder.rglob("manifest.json")]
    assert len(run(planned).points) == len([*folder.rglob("manifest.json")]) == 2


def test_the_recipe_beside_a_point_is_the_points_recipe(finished: Path, plan: Planning):
    text = (point(finished) / "mergekit_config.yml").read_text()
    assert recipe_template(load_document(text, "job.yaml")).bind({}) == plan().points[0].point.recipe
    assert yaml.safe_load(text)["models"][1] == {"model": "fmt", "parameters": {"weight": 0.75}}


def test_the_card_says_what_the_hub_looks_for(finished: Path, parents: Path):
    card = (point(finished) / "README.md").read_text()
    front = front_matter(card)
    assert front["base_model"] == [str(parents / "cos"), str(parents / "fmt")]
    assert front["base_model_relation"] == "merge"
    assert {"mergekit", "merge", "linear"} <= set(front["tags"])
    assert front["library_name"] == "transformers"
    assert "512 tokens" in card
    assert "theta 10000" in card
    assert "| `fmt` |" in card
    assert "`0.75`" in card


def test_two_runs_of_a_job_give_the_same_files(plan: Planning, job_text: Callable[..., str], tmp_path: Path):
    first = plan(shard_size=3000)
    run(first)
    run(make_plan(replace(first.job, output=str(tmp_path / "again"))))
    one, two = (files_under(tmp_path / folder / "soup" / "points") for folder in ("runs", "again"))
    assert one == two


def test_a_twin_has_a_manifest_that_refers_to_its_original(plan: Planning, tmp_path: Path):
    recipe = """
  merge_method: linear
  models:
  - {model: cos, parameters: {weight: "${w}"}}
  - {model: fmt, parameters: {weight: "${w}"}}
"""
    result = run(plan(recipe=recipe, grid="{w: [1, 2]}"))
    folder = tmp_path / "runs" / "soup" / "points"
    assert {path.name for path in (folder / "w2").iterdir()} == {"manifest.json"}
    twin = Manifest.from_json((folder / "w2" / "manifest.json").read_bytes())
    original = Manifest.from_json((folder / "w1" / "manifest.json").read_bytes())
    assert (twin.same_as, twin.weights, twin.digest) == ("w1", original.weights, original.digest)
    assert result.points.keys() == {"w1", "w2"}
    assert result.units_merged == 1


def test_the_chosen_tokenizer_and_template_are_taken(plan: Planning, parents: Path, tmp_path: Path):
    other = {"model": {"type": "WordLevel", "vocab": {"z": 0}}}
    write_model(parents / "fmt", weights("fmt"), tokenizer=other)
    recipe = """
  merge_method: linear
  models:
  - {model: cos, parameters: {weight: 1}}
  - {model: fmt, parameters: {weight: 1}}
  tokenizer_source: fmt
  chat_template: "{{ messages[0].content }} and no more"
"""
    run(plan(recipe=recipe, grid=""))
    folder = tmp_path / "runs" / "soup" / "points" / "merge"
    assert json.loads((folder / "tokenizer.json").read_text()) == other
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0].content }} and no more"


def test_a_named_chat_template_is_written_out_and_the_recipe_keeps_the_name(
    plan: Planning, parents: Path, tmp_path: Path
):
    (parents / "cos" / "chat_template.json").write_text('{"chat_template": "{{ messages }}"}')
    old = [{"name": "default", "template": "{{ messages }}"}, {"name": "tool_use", "template": "{{ messages }}"}]
    (parents / "cos" / "tokenizer_config.json").write_text(json.dumps({"padding_side": "left", "chat_template": old}))
    (parents / "cos" / "processor_config.json").write_text('{"patch_size": 14}')
    run(plan(recipe=LINEAR + "  chat_template: chatml\n", grid="{w: [0.5]}"))
    folder = tmp_path / "runs" / "soup" / "points" / "w0.5"
    assert (folder / "chat_template.jinja").read_text() == NAMED["chatml"]
    assert not (folder / "chat_template.json").exists(), "it would say otherwise"
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config == {"padding_side": "left", "chat_template": NAMED["chatml"]}
    assert (folder / "processor_config.json").read_text() == '{"patch_size": 14}'
    assert yaml.safe_load((folder / "mergekit_config.yml").read_text())["chat_template"] == "chatml"


HOSTILE = "Qwen2 |\n\n# Licence: MIT\n<img src=x onerror=alert(1)> [a](https://evil.example) `x` \x1b[2J\u202e"


def test_a_config_that_speaks_in_markdown_is_text_on_the_card(plan: Planning, parents: Path, tmp_path: Path):
    import markdown_it  # of rich, in GitHub's dialect

    for who in ("cos", "fmt"):
        write_model(parents / who, weights(who), config={"architectures": [HOSTILE]})
    (parents / "cos" / "<b>`x`.py").write_text("")
    run(plan(grid="{w: [0.25]}"))
    card = (tmp_path / "runs" / "soup" / "points" / "w0.25" / "README.md").read_text()
    assert not [letter for letter in card if not (letter.isprintable() or letter == "\n")]
    page = markdown_it.MarkdownIt("gfm-like", {"linkify": False}).render(card.split("---\n", 2)[2])
    assert not re.search(r"<(img|a|b|h1)\b(?!>w0\.25)", page)
    row = next(line for line in page.splitlines() if "Qwen2 " in line)
    assert row == f"<td><code>{html.escape(SHOWN)}</code></td>"


SHOWN = r"Qwen2 \x7c\n\n# Licence: MIT\n<img src=x onerror=alert(1)> [a](https://evil.example) `x` \x1b[2J\u202e"


def test_a_point_gets_what_its_donor_has_beside_the_weights(plan: Planning, parents: Path, tmp_path: Path):
    beside = {
        "preprocessor_config.json": b'{"size": 224}',
        "qwen.tiktoken": b"YQ== 0",
        "additional_chat_templates/rag.jinja": b"{{ messages }}",
        "modules.json": b'[{"path": "1_Pooling"}]',
        "1_Pooling/config.json": b"{}",
        "LICENSE": b"as is",
    }
    left = {"training_args.bin": b"x", "logo.png": b"x", "checkpoint-5/vocab.txt": b"x", ".git/config": b"x"}
    for name, data in (beside | left).items():
        (parents / "cos" / name).parent.mkdir(exist_ok=True)
        (parents / "cos" / name).write_bytes(data)
    run(plan(grid="{w: [0.25]}"))
    folder = tmp_path / "runs" / "soup" / "points" / "w0.25"
    files = files_under(folder)
    own = {"config.json", "generation_config.json", "tokenizer.json", "mergekit_config.yml", "README.md"}
    assert files.keys() == own | beside.keys() | {"manifest.json", "model.safetensors"}
    assert {name: files[name] for name in beside} == beside
    assert Manifest.from_json(files["manifest.json"]).files.keys() == files.keys() - {"manifest.json"}


@pytest.mark.parametrize("asked", [False, True])
def test_code_is_copied_when_asked_for_and_never_named_without_its_file(
    plan: Planning, parents: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], asked: bool
):
    tokenizer = {"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}, "model_max_length": 512}
    processor = {"auto_map": {"AutoProcessor": "gone_x.X"}, "size": 224}
    (parents / "cos" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    (parents / "cos" / "processor_config.json").write_text(json.dumps(processor))
    (parents / "cos" / "tokenization_x.py").write_text("class X: ...")
    with Watcher(visible=False, tells=True) as watcher:
        drive(plan(grid="{w: [0.25]}", copy_code=str(asked).lower()), InProcessPool(), watcher)
    folder = tmp_path / "runs" / "soup" / "points" / "w0.25"
    said = "not copied from cos, because it is code: tokenization_x.py; `copy_code: true` copies it"
    card = (folder / "README.md").read_text()
    assert (folder / "tokenization_x.py").exists() == asked
    assert (said in capfd.readouterr().err) == (not asked)
    assert ("| Not copied from the parents | `tokenization_x.py` |" in card) == (not asked)
    written = json.loads((folder / "tokenizer_config.json").read_text())
    assert written == (tokenizer if asked else {"model_max_length": 512})
    assert json.loads((folder / "processor_config.json").read_text()) == {"size": 224}


def test_the_head_of_an_untied_parent_meets_the_embeddings_of_a_tied_one(plan: Planning, parents: Path, tmp_path: Path):
    untied = weights("fmt", tied=False)
    write_model(parents / "fmt", untied)
    run(plan(grid="{w: [0.25]}", config_from="fmt"))
    merged = load_model(tmp_path / "runs" / "soup" / "points" / "w0.25")
    cos = weights("cos")["model.embed_tokens.weight"].double()
    assert merged[HEAD].equal((0.25 * cos + 0.75 * untied[HEAD].double()).bfloat16())


def test_a_finished_point_is_not_written_again(plan: Planning, tmp_path: Path):
    planned = plan(shard_size=3000)
    run(planned)
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("points/*/*")}
    result = run(planned)
    assert (result.units_merged, result.units_found) == (0, len(planned.units))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("points/*/*")} == times


def test_a_manifest_of_other_weights_is_a_contradiction(plan: Planning, tmp_path: Path):
    planned = plan(grid="{w: [0.25]}")
    run(planned)
    path = tmp_path / "runs" / "soup" / "points" / "w0.25" / "manifest.json"
    path.write_bytes(replace(Manifest.from_json(path.read_bytes()), weights=f"blake3:{0:064}").to_json())
    with pytest.raises(CorruptData) as contradiction:
        run(planned)
    assert str(contradiction.value).endswith("complete already, with other weights; run `mergeyard verify`")
