"""A merge of several stages has the bytes of the same merges made one after another, and writes nothing between."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from jobs.job import load_job
from jobs.manifest import Manifest
from orchestrator.evaluating.subjects import _baselines_alone
from orchestrator.planning.plan import make_plan
from tests.orchestrator.conftest import files_under
from tests.orchestrator.models import CONFIG, load_model, weights, write_adapter
from workers.checkpoints.chat_templates import NAMED
from workers.merging.resident import ResidentParents

Mergeyard = Callable[..., Any]
Folders = tuple[Path, Path]
OWN = ("README.md", "manifest.json", "mergekit_config.yml")
"""Files that say how a merge was made."""

T, W = {"parameters": {"t": 0.3}}, {"parameters": {"weight": 0.5}}
SPARSE = {"parameters": {"weight": 0.7, "density": 0.4}}


def document(method: str, base: object, *models: object, **more: Any) -> dict[str, Any]:
    """A mergekit document; without a base if it is None."""
    listed = [{"model": str(model)} for model in models]
    named = {} if base is None else {"base_model": str(base)}
    return {"merge_method": method, **named, "models": listed, **more}


@pytest.fixture
def merged(mergeyard: Mergeyard, tmp_path: Path) -> Callable[..., Path]:
    """merged(documents, options…, to=…): the folder of the result."""

    def merge(*documents: Any, options: tuple[str, ...] = (), to: Path) -> Path:
        file = tmp_path / "merge.yml"
        file.write_text(yaml.safe_dump_all(documents))
        ended = mergeyard("merge", file, to, "--quiet", *options)
        assert ended.code == 0, ended.err
        return to

    return merge


@pytest.fixture
def both_ways(merged: Callable[..., Path], tmp_path: Path) -> Callable[..., Folders]:
    """both_ways(stages, result): the result of all stages at once, and of each stage written and read again.

    The name of a stage is the folder where it is written in the second case.
    """

    def merge(stages: Mapping[Path, Any], result: Any, *options: str) -> Folders:
        named = [{"name": str(path), **stage} for path, stage in stages.items()]
        before = {path.name for path in tmp_path.iterdir()}
        at_once = merged(result, *named, options=options, to=tmp_path / "at-once")
        assert {path.name for path in tmp_path.iterdir()} - before == {"merge.yml", "at-once"}, "nothing between"
        for path, stage in stages.items():
            merged(stage, options=options, to=path)
        return at_once, merged(result, options=options, to=tmp_path / "step-by-step")

    return merge


def files_of(folder: Path) -> dict[str, bytes]:
    """All files but those that say how the merge was made."""
    return {name: data for name, data in files_under(folder).items() if name not in OWN}


STAGES = {
    "slerp, then ties": (("slerp", "cos", "fmt", T), ("ties", "base", "ONE", "cos", SPARSE)),
    "linear, then slerp": (("linear", None, "cos", "fmt", W), ("slerp", "ONE", "base", T)),
    "dare_ties, then linear": (("dare_ties", "base", "cos", "fmt", SPARSE), ("linear", None, "ONE", "base", W)),
    "linear, then dare_linear": (("linear", None, "cos", "fmt", W), ("dare_linear", "base", "ONE", "fmt", SPARSE)),
    "ties, then the base of della": (("ties", "base", "cos", "fmt", SPARSE), ("della", "ONE", "cos", SPARSE)),
    "karcher, then model_stock": (("karcher", None, "cos", "fmt", {}), ("model_stock", "base", "ONE", "cos", {})),
    "breadcrumbs, then sce": (("breadcrumbs", "base", "cos", "fmt", SPARSE), ("sce", "base", "ONE", "fmt", {})),
    "a copy, then arcee_fusion": (("passthrough", None, "cos", {}), ("arcee_fusion", "base", "ONE", {})),
}
DTYPES = [
    ({"dtype": "bfloat16"}, {"dtype": "bfloat16"}),
    ({"dtype": "float32"}, {"dtype": "bfloat16"}),
    ({"dtype": "bfloat16", "out_dtype": "float16"}, {"out_dtype": "float32"}),
    ({}, {}),
]


@pytest.mark.parametrize(("number", "recipes"), [*enumerate(STAGES.values())], ids=[*STAGES])
def test_a_stage_is_to_the_next_merge_as_if_it_had_been_written(
    both_ways: Callable[..., Folders], parents: Path, tmp_path: Path, number: int, recipes: Any
) -> None:
    one = tmp_path / "one"
    dtypes = DTYPES[number % len(DTYPES)]

    def made(recipe: Any, dtype: Mapping[str, str]) -> dict[str, Any]:
        method, base, *models, more = recipe
        paths = [None if name is None else one if name == "ONE" else parents / name for name in (base, *models)]
        return document(method, *paths, **more, **dtype)

    first, second = (made(recipe, dtype) for recipe, dtype in zip(recipes, dtypes, strict=True))
    at_once, by_step = both_ways({one: first}, second, "--numerics", "float32" if number % 2 else "mergekit")
    assert files_of(at_once) == files_of(by_step)
    assert load_model(at_once).keys() == weights("cos").keys()


def test_stages_feed_each_other_and_may_feed_several(
    both_ways: Callable[..., Folders], parents: Path, tmp_path: Path
) -> None:
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    stages = {
        one: document("linear", None, parents / "cos", parents / "fmt", **W, dtype="bfloat16"),
        two: document("ties", parents / "base", one, parents / "cos", **SPARSE),
        three: document("slerp", one, two, **T, dtype="float32"),
    }
    at_once, by_step = both_ways(stages, document("linear", None, three, two, **W, dtype="bfloat16"))
    assert files_of(at_once) == files_of(by_step)


@pytest.mark.parametrize("asked", [{}, {"chat_template": "{{ messages[0] }}"}], ids=["of the stage", "of the result"])
def test_tokenizer_template_and_config_follow_as_if_the_stage_had_been_written(
    both_ways: Callable[..., Folders], parents: Path, tmp_path: Path, asked: dict[str, str]
) -> None:
    """The stage takes the config of its base, the tokenizer of another parent, and a template of its own."""
    (parents / "cos" / "config.json").write_text(json.dumps({**CONFIG, "initializer_range": 0.5}))
    (parents / "cos" / "preprocessor.json").write_text("{}")
    template = json.dumps({"chat_template": "{{ messages }}", "model_max_length": 99})
    (parents / "fmt" / "tokenizer_config.json").write_text(template)
    one = tmp_path / "one"
    first = document(
        "slerp", parents / "cos", parents / "fmt", **T, tokenizer_source=str(parents / "fmt"), chat_template="chatml"
    )
    at_once, by_step = both_ways({one: first}, document("slerp", one, parents / "base", **T, **asked))
    files = files_of(at_once)
    assert files == files_of(by_step)
    assert json.loads(files["config.json"])["initializer_range"] == 0.5
    assert json.loads(files["tokenizer_config.json"])["model_max_length"] == 99
    assert files["chat_template.jinja"].decode() == (asked.get("chat_template") or NAMED["chatml"])


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA adapter of two weights, one of them the head, which the parents tie to the embeddings."""
    generator = torch.Generator().manual_seed(3)
    parts: dict[str, torch.Tensor] = {}
    for module, name in {"model.layers.0.mlp.down_proj": "", "lm_head": "model.embed_tokens"}.items():
        rows, columns = weights("cos")[f"{name or module}.weight"].shape
        parts[f"{module}.lora_A.weight"] = torch.randn(2, columns, generator=generator) * 0.1
        parts[f"{module}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * 0.1
    return write_adapter(tmp_path / "lora", parts)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_an_adapter_is_applied_to_a_stage_as_if_that_had_been_written(
    both_ways: Callable[..., Folders], parents: Path, adapter: Path, tmp_path: Path, dtype: str
) -> None:
    """The stage feeds one merge with the adapter and another without it."""
    one, two = tmp_path / "one", tmp_path / "two"
    stages = {
        one: document("slerp", parents / "cos", parents / "fmt", **T, dtype=dtype),
        two: document("linear", None, f"{one}+{adapter}", parents / "base", **W, dtype=dtype),
    }
    result = document("dare_ties", one, two, f"{one}+{adapter}", **SPARSE, dtype="bfloat16")
    at_once, by_step = both_ways(stages, result)
    assert files_of(at_once) == files_of(by_step)
    assert "lm_head.weight" in load_model(at_once)


def test_a_point_names_its_real_parents_and_all_documents(
    merged: Callable[..., Path], parents: Path, tmp_path: Path
) -> None:
    stage = {"name": "half", **document("linear", None, parents / "fmt", **W)}
    stage["models"].insert(0, {"model": str(parents / "cos"), "parameters": {"weight": 0.25}})
    result = document("slerp", "half", parents / "base", **T)
    folder = merged(stage, result, to=tmp_path / "out")
    assert [document.get("name") for document in yaml.safe_load_all((folder / "mergekit_config.yml").read_text())] == [
        "half",
        None,
    ]
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes())
    paths = [str(parents / name) for name in ("cos", "fmt", "base")]
    assert manifest.parents == {path: path for path in paths}
    assert [document["merge_method"] for document in manifest.recipe] == ["linear", "slerp"]
    card = (folder / "README.md").read_text()
    assert f"A `slerp` merge in 2 stages of `{paths[0]}`, `{paths[1]}` and `{paths[2]}`" in card
    assert f"| `{paths[0]}` | `{paths[0]}` | `0.25` in `half` |" in card


def test_a_stage_that_overflows_ends_the_merge_and_its_remedy_works(
    mergeyard: Mergeyard, parents: Path, tmp_path: Path
) -> None:
    """Written alone, such a merge ends with exit code 1 too."""
    large = {"parameters": {"weight": 1e7, "normalize": False}}
    stage = {"name": "half", **document("linear", None, parents / "cos", parents / "fmt", **large)}
    file = tmp_path / "merge.yml"
    for dtype, code in (("float16", 1), ("bfloat16", 0)):
        result = document("slerp", "half", parents / "base", **T, dtype="float32")
        file.write_text(yaml.safe_dump_all([{**stage, "dtype": dtype}, result]))
        ended = mergeyard("merge", file, tmp_path / dtype, "--quiet")
        assert ended.code == code, ended.err
        if code:
            assert 'the merge "half": of tensor ' in ended.err
            assert "give this merge another `dtype:`, such as bfloat16, or smaller weights" in ended.err


def test_a_stage_has_no_aim(mergeyard: Mergeyard, parents: Path, tmp_path: Path) -> None:
    aim = {"aim": {"statistics": "cos.safetensors"}}
    stage = {"name": "half", **document("task_arithmetic", parents / "base", parents / "fmt", **W, **aim)}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump_all([stage, document("slerp", "half", parents / "cos", **T)]))
    ended = mergeyard("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert ended.code == 2
    assert 'a merge that feeds another has no `aim:`; write "half" first, and name the result' in ended.err


def test_several_results_have_a_folder_each_with_the_bytes_of_files_of_their_own(
    mergeyard: Mergeyard, merged: Callable[..., Path], parents: Path, tmp_path: Path
) -> None:
    half = {"name": "half", **document("linear", None, parents / "cos", parents / "fmt", **W, dtype="bfloat16")}
    ends = [document("slerp", "half", parents / name, **T, dtype="bfloat16") for name in ("cos", "fmt")]
    together = merged(half, {"name": "a", **ends[0]}, {"name": "b", **ends[1]}, to=tmp_path / "out")
    assert {path.name for path in together.iterdir()} == {"a", "b"}, "no records are left"
    for name, end in zip("ab", ends, strict=True):
        assert files_of(together / name) == files_of(merged(half, end, to=tmp_path / f"alone-{name}"))

    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump_all([half, {"name": "a", **ends[0]}, {"name": "b", **ends[0]}]))
    ended = mergeyard("merge", file, together)
    assert (ended.code, ended.err) == (
        2,
        f"mergeyard: {together}: there is another model already (b/config.json); give an empty folder\n",
    )
    file.write_text(yaml.safe_dump_all([half, {"name": "a", **ends[0]}, {"name": "b", **ends[1]}]))
    ended = mergeyard("merge", file, together)
    assert ended.code == 0
    assert [line.partition(": ")[0] for line in ended.out.splitlines()] == [f"{together}/a", f"{together}/b"]


# ---- jobs

STAGED = """
  - name: half
    merge_method: linear
    models:
    - {model: cos, parameters: {weight: "${w}"}}
    - {model: fmt, parameters: {weight: 1}}
    dtype: bfloat16
  - name: whole
    merge_method: linear
    models: [{model: fmt}, {model: base}]
    parameters: {weight: 1}
  - merge_method: ties
    base_model: whole
    models:
    - {model: half, parameters: {weight: "${t}", density: 0.5}}
    - {model: cos, parameters: {weight: 0.5, density: 0.3}}
"""
GRID = "{w: [1, 3], t: [0.5, 1]}"


def test_a_grid_over_stages_has_the_points_of_as_many_files(
    mergeyard: Mergeyard, merged: Callable[..., Path], job_text: Callable[..., str], parents: Path, tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(job_text(grid=GRID, recipe=STAGED))
    ended = mergeyard("run", tmp_path / "job.yaml", "--in-process", "--json")
    assert ended.code == 0, ended.err
    for point in load_job(job_text(grid=GRID, recipe=STAGED), "job.yaml").points:
        written = tmp_path / "runs" / "soup" / "points" / point.name
        text = yaml.safe_dump_all(point.documents())
        for name in ("base", "cos", "fmt"):
            text = text.replace(f"model: {name}\n", f"model: {parents / name}\n")
        alone = merged(*yaml.safe_load_all(text), to=tmp_path / point.name)
        assert files_of(written) == files_of(alone)
    again = mergeyard("run", tmp_path / "job.yaml", "--in-process", "--json")
    assert again.code == 0, again.err
    assert again.facts["units_merged"] == 0


def test_points_share_the_layout_of_stages_that_no_axis_changes(plan: Callable[..., Any]) -> None:
    first, second, third, fourth = plan(grid=GRID, recipe=STAGED).points
    assert first.layout is second.layout is not third.layout is fourth.layout
    tensors = [planned.layout.shards[0].tensors[0].sources for planned in (first, third)]
    assert tensors[0]["whole"] is tensors[1]["whole"], "no axis changes it"
    assert first.layout.parents == ("cos",), "of the others, only stages are made"


def test_stages_are_merged_in_the_memory_of_a_worker_too(
    mergeyard: Mergeyard, plan: Callable[..., Any], job_text: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "job.yaml").write_text(job_text(grid=GRID, recipe=STAGED))
    assert mergeyard("run", tmp_path / "job.yaml", "--in-process").code == 0
    planned = plan(grid=GRID, recipe=STAGED)
    parents = {name: checkpoint.parent for name, checkpoint in planned.parents.items()}
    for point in planned.points:
        tensors = [tensor for shard in point.layout.shards for tensor in shard.tensors]
        resident = ResidentParents(tensors, parents, seed=0, numerics="float32")
        expected = load_model(tmp_path / "runs" / "soup" / "points" / point.name)
        found = {name: tensor.clone() for name, tensor in resident.merged(point.settings, {})}
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in found)


ADAPTED = """
  - name: half
    merge_method: linear
    models: [{model: cos}, {model: fmt}]
    parameters: {weight: 1}
  - merge_method: ties
    base_model: half
    models: [{model: half+lora, parameters: {weight: "${w}", density: 0.5}}]
"""


def test_an_adapter_on_a_stage_is_a_parent_of_the_job(
    mergeyard: Mergeyard,
    merged: Callable[..., Path],
    job_text: Callable[..., str],
    parents: Path,
    adapter: Path,
    tmp_path: Path,
) -> None:
    text = job_text(grid="{w: [0.5, 1]}", recipe=ADAPTED).replace("parents:\n", f"parents:\n  lora: {adapter}\n")
    (tmp_path / "job.yaml").write_text(text)
    ended = mergeyard("run", tmp_path / "job.yaml", "--in-process", "--json")
    assert ended.code == 0, ended.err
    planned = make_plan(load_job(text, "job.yaml"))
    places = {name: checkpoint.parent for name, checkpoint in planned.parents.items()}
    for point in planned.points:
        written = tmp_path / "runs" / "soup" / "points" / point.name
        document = yaml.safe_dump_all(point.point.documents())
        for name in ("cos", "fmt", "half+lora"):
            path = f"half+{adapter}" if name == "half+lora" else parents / name
            document = document.replace(f"model: {name}\n", f"model: {path}\n")
        assert files_of(written) == files_of(merged(*yaml.safe_load_all(document), to=tmp_path / point.name))
        tensors = [tensor for shard in point.layout.shards for tensor in shard.tensors]
        resident = ResidentParents(tensors, places, seed=0, numerics="float32")
        found = {name: tensor.clone() for name, tensor in resident.merged(point.settings, {})}
        expected = load_model(written)
        assert all(torch.equal(found[name].view(torch.int16), expected[name].view(torch.int16)) for name in expected)
    manifest = Manifest.from_json((written / "manifest.json").read_bytes())
    assert manifest.parents["lora"] == str(adapter)
    assert f"| `lora` | `{adapter}` | adapter |" in (written / "README.md").read_text()
    assert [subject.name for subject in _baselines_alone(planned)] == ["cos", "fmt"], "an adapter answers nothing"
    again = mergeyard("run", tmp_path / "job.yaml", "--in-process", "--json")
    assert (again.code, again.facts["units_merged"]) == (0, 0)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("one+PARENTS/cos", "adapter PARENTS/cos: no adapter_config.json there; after the + stands a LoRA adapter"),
        ("one+PARENTS/cos+LORA2", "is a model with an adapter, and is applied to a merge; name the adapter alone"),
        ("one+PARENTS/lost", "no folder PARENTS/lost"),
        ("one+LORA2", "[2, 2] do not fit model.layers.0.mlp.down_proj.weight [16, 32]"),
    ],
)
def test_what_is_no_adapter_of_a_stage_is_refused(
    mergeyard: Mergeyard, parents: Path, tmp_path: Path, model: str, message: str
) -> None:
    other = {f"model.layers.0.mlp.down_proj.lora_{key}.weight": torch.ones(2, 2) for key in "AB"}
    places = {"PARENTS": str(parents), "LORA2": str(write_adapter(tmp_path / "lora2", other))}
    for key, value in places.items():
        model, message = model.replace(key, value), message.replace(key, value)
    one = {"name": "one", **document("slerp", parents / "cos", parents / "fmt", **T)}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump_all([one, document("linear", None, model, "one", **W)]))
    ended = mergeyard("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert (ended.code, (tmp_path / "out").exists()) == (2, False)
    assert message in ended.err


def test_an_adapter_on_a_stage_is_no_model_beside_it(
    mergeyard: Mergeyard, parents: Path, adapter: Path, tmp_path: Path
) -> None:
    """The remedy is followed."""
    one = {"name": "one", **document("slerp", parents / "cos", parents / "fmt", **T)}
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump_all([one, document("linear", None, f"one+{adapter}", adapter, **W)]))
    ended = mergeyard("merge", file, tmp_path / "out")
    assert ended.code == 2
    assert ended.err.rstrip().endswith(f"in the place of the model, write its base before it: `BASE+{adapter}`")
    file.write_text(file.read_text().replace(f"model: {adapter}\n", f"model: {parents / 'base'}+{adapter}\n"))
    assert mergeyard("merge", file, tmp_path / "out", "--quiet").code == 0
