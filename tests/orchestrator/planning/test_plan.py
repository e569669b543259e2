"""Planning reads headers alone: what will be made, in which files, by which tasks, and what is refused at the desk."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import BadInput, ObjectMissing
from jobs.job import Job, load_job
from jobs.merge_tasks import DTYPE_BITS
from orchestrator.planning.plan import MOST_UPLOADS, Plan, make_plan
from tests.orchestrator.models import CONFIG, EMBEDDINGS, HEAD, TOKENIZER, shapes, weights, write_model

Planning = Callable[..., Plan]
Jobs = Callable[..., Job]

TIES = """
  merge_method: ties
  base_model: base
  models:
  - {model: cos, parameters: {weight: 0.5, density: "${d}"}}
  - {model: fmt, parameters: {weight: 0.5, density: "${d}"}}
  - {model: base}
"""
TWO = """
  merge_method: linear
  models:
  - {model: cos, parameters: {weight: "${a}"}}
  - {model: fmt, parameters: {weight: "${b}"}}
"""
EVEN = TWO.replace('"${a}"', "1").replace('"${b}"', "1")


def refusal(plan: Planning, **more: Any) -> str:
    with pytest.raises(BadInput) as refused:
        plan(**more)
    line = str(refused.value)
    assert len(line.splitlines()) == 1
    return line


# ---- files


def test_one_shard_has_the_plain_name_and_no_index(plan: Planning):
    layout = plan().points[0].layout
    assert [shard.name for shard in layout.shards] == ["model.safetensors"]
    assert layout.index is None
    assert {tensor.name: tensor.shape for tensor in layout.shards[0].tensors} == shapes()


def test_shards_are_named_and_cut_as_promised(plan: Planning):
    layout = plan(shard_size=3000).points[0].layout
    count = len(layout.shards)
    assert count > 3
    assert [shard.name for shard in layout.shards] == [
        f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)
    ]
    names = [tensor.name for shard in layout.shards for tensor in shard.tensors]
    assert Counter(names) == Counter(list(shapes()))
    for shard, following in zip(layout.shards, layout.shards[1:], strict=False):
        assert shard.bytes <= 3000 or len(shard.tensors) == 1
        assert shard.bytes + following.tensors[0].bytes > 3000, "one more tensor would have fitted"
    assert layout.index == {
        "metadata": {"total_size": sum(2 * torch.Size(shape).numel() for shape in shapes().values())},
        "weight_map": {tensor.name: shard.name for shard in layout.shards for tensor in shard.tensors},
    }


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(plan: Planning):
    layout = plan(shard_size=1).points[0].layout
    assert [len(shard.tensors) for shard in layout.shards] == [1] * len(shapes())


def test_layers_come_in_their_natural_order(plan: Planning, parents: Path):
    for who in ("cos", "fmt"):
        tensors = {f"model.layers.{number}.w": torch.ones(2) for number in (10, 2, 0)}
        write_model(parents / who, tensors, config={"tie_word_embeddings": True})
    (shard,) = plan().points[0].layout.shards
    assert [tensor.name for tensor in shard.tensors] == [f"model.layers.{number}.w" for number in (0, 2, 10)]


def test_wider_dtypes_come_first_in_a_file(plan: Planning, parents: Path):
    for who in ("cos", "fmt"):
        tensors = weights(who)
        tensors["model.layers.0.a"] = torch.tensor([True])
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
        write_model(parents / who, tensors)
    recipe = EVEN
    (shard,) = plan(recipe=recipe, grid="").points[0].layout.shards
    widths = [DTYPE_BITS[tensor.dtype] for tensor in shard.tensors]
    assert widths == sorted(widths, reverse=True)
    assert set(widths) == {32, 16, 8}


# ---- points


def test_equal_merges_are_planned_once(plan: Planning):
    planned = plan(recipe=TWO, grid="{points: [{a: 0.7, b: 0.3}, {a: 1.4, b: 0.6}, {a: 7, b: 3}, {a: 1, b: 1}]}")
    first = planned.points[0].name
    assert [point.same_as for point in planned.points] == [None, first, first, None]
    assert len(planned.units) == 2
    assert sum(len(task.points) for task in planned.tasks([], 1)) == 2


def test_density_one_is_the_merge_without_trimming(plan: Planning):
    planned = plan(recipe=TIES, grid="{d: [1, 0.5]}")
    assert [point.same_as for point in planned.points] == [None, None]
    assert planned.points[0].settings != planned.points[1].settings


def test_points_with_other_configs_are_not_the_same(plan: Planning, parents: Path):
    recipe = EVEN + '  tokenizer_source: "${t}"\n'
    planned = plan(recipe=recipe, grid="{t: [cos, fmt]}")
    assert [point.same_as for point in planned.points] == [None, None]
    assert planned.points[0].digest == planned.points[1].digest
    assert len(planned.units) == 2


def test_points_that_share_a_shard_have_units_of_their_own(plan: Planning):
    recipe = EVEN.replace("1}", '[{filter: embed_tokens, value: "${w}"}, {value: 1}]}', 1)
    planned = plan(recipe=recipe, grid="{w: [1, 2, 3]}", shard_size=3000)
    shards = len(planned.points[0].layout.shards)
    contents = {content for point in planned.points for content in point.contents}
    assert len(contents) == shards + 2
    assert len(planned.units) == 3 * shards
    assert sorted(planned.units.values()) == sorted(
        f"points/{point.name}/{shard.name}" for point in planned.points for shard in point.layout.shards
    )


def test_plans_of_the_same_job_are_the_same(plan: Planning):
    first, second = plan(shard_size=3000), plan(shard_size=3000)
    assert first.document() == second.document()
    assert first.units == second.units


def test_a_plan_is_another_when_its_parents_recipe_or_seed_are(plan: Planning, parents: Path):
    first = plan().digest
    assert plan(grid="{w: [0.25, 0.75]}").digest != first
    assert plan(seed=1).digest == first, "linear draws nothing"
    assert plan(workers="{memory: 2GB, cpus: 2}").digest == first
    write_model(parents / "cos", weights("cos"), config={"attention_dropout": 0.5})
    assert plan().digest != first


@pytest.mark.parametrize("workers", [1, 2, 7, 100])
@pytest.mark.parametrize("shard_size", [1, 3000, "1GB"])
def test_tasks_cover_every_missing_unit_once(plan: Planning, workers: int, shard_size: object):
    planned = plan(grid="{w: {from: 0.1, to: 0.9, step: 0.1}}", shard_size=shard_size)
    done = set(list(planned.units)[::3])
    tasks = planned.tasks(done, workers)
    assert sorted(unit.unit for task in tasks for unit in task.points) == sorted(planned.units.keys() - done)
    for task in tasks:
        for unit in task.points:
            assert planned.units[unit.unit] == unit.key
            assert unit.receipt == f"receipts/{unit.unit[:2]}/{unit.unit}.json"
    assert len(tasks) >= min(workers, len(planned.units) - len(done))


def test_a_task_never_holds_more_files_open_than_a_process_may(plan: Planning):
    planned = plan(grid="{w: {from: 0.001, to: 0.999, num: 999}}", workers="{memory: 64GB}")
    assert max(len(task.points) for task in planned.tasks([], 1)) <= MOST_UPLOADS


@pytest.mark.serial
def test_ten_thousand_points_are_planned_in_seconds(job: Jobs, parents: Path):
    started = time.perf_counter()
    planned = make_plan(job(grid="{w: {from: 0, to: 1, num: 10000}}"))
    tasks = planned.tasks([], 8)
    seconds = time.perf_counter() - started
    assert (len(planned.points), sum(len(task.points) for task in tasks)) == (10_000, 10_000)
    print(f"{seconds:.1f} s")
    assert seconds < 20


def test_points_that_are_not_written_cost_nothing_a_shard(plan: Planning):
    planned = plan(grid="{w: {from: 0.1, to: 0.9, num: 50}}", shard_size=3000).keeping(["w0.1"])
    planned.document()
    assert {unit.point for task in planned.tasks([], 4) for unit in task.points} == {"w0.1"}
    named = [point.name for point in planned.points if {"contents", "units"} & vars(point).keys()]
    assert named == ["w0.1"]


# ---- parents that do not fit together

DISAGREEMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "max_position_embeddings": ({"max_position_embeddings": 1024}, "max_position_embeddings: cos 512, fmt 1024"),
    "rope_theta": ({"rope_theta": 1e6}, "rope_theta: cos 10000.0, fmt 1000000.0"),
    "rope_scaling": (
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        'rope_scaling: cos null, fmt {"rope_type": "yarn", "factor": 4.0}',
    ),
    "rope_parameters": (
        {"rope_theta": None, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
        "rope_theta: cos 10000.0, fmt 500000.0",
    ),
    "sliding_window": (
        {"use_sliding_window": True, "sliding_window": 128},
        "sliding_window: cos null, fmt 128",
    ),
    "vocab_size": ({"vocab_size": 64}, "vocab_size: cos 48, fmt 64"),
}


@pytest.mark.parametrize("field", DISAGREEMENTS)
def test_parents_that_disagree_on_the_context_are_refused_side_by_side(field: str, plan: Planning, parents: Path):
    config, values = DISAGREEMENTS[field]
    write_model(parents / "fmt", weights("fmt"), config=config)
    line = refusal(plan)
    assert line == f"job.yaml:5: the parents disagree on {values}; say whose holds with `config_from: PARENT`"


@pytest.mark.parametrize("field", DISAGREEMENTS)
def test_the_config_that_was_chosen_holds(field: str, plan: Planning, parents: Path):
    config, _ = DISAGREEMENTS[field]
    write_model(parents / "fmt", weights("fmt"), config=config)
    expected = {key: value for key, value in {**CONFIG, **config}.items() if value is not None}
    assert plan(config_from="cos").points[0].layout.config == CONFIG
    assert plan(config_from="fmt").points[0].layout.config == expected


def test_old_and_new_spellings_of_rope_agree(plan: Planning, parents: Path):
    new = {"rope_theta": None, "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}
    write_model(parents / "fmt", weights("fmt"), config=new)
    plan()


def test_a_window_that_is_not_used_does_not_matter(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt"), config={"sliding_window": 4096, "use_sliding_window": False})
    plan()


def test_tokenizers_that_differ_are_refused_with_the_token(plan: Planning, parents: Path):
    vocabulary = {"model": {"type": "WordLevel", "vocab": {"a": 0, "c": 1}}, "added_tokens": TOKENIZER["added_tokens"]}
    write_model(parents / "fmt", weights("fmt"), tokenizer=vocabulary)
    assert refusal(plan) == (
        "job.yaml:5: the tokenizers of cos and fmt differ (token 'b' is 1 and missing); say whose to take with"
        " `tokenizer_source: PARENT` if you know that the rest agrees"
    )
    recipe = EVEN + "  tokenizer_source: fmt\n"
    assert plan(recipe=recipe, grid="").points[0].layout.tokenizer_from == "fmt"


def test_a_tokenizer_that_only_one_parent_has_disagrees_with_nobody(plan: Planning, parents: Path):
    (parents / "cos" / "tokenizer.json").unlink()
    plan()


def test_a_missing_tensor_is_named_with_both_parents(plan: Planning, parents: Path):
    tensors = weights("fmt")
    del tensors["model.layers.1.self_attn.q_proj.bias"]
    write_model(parents / "fmt", tensors)
    assert refusal(plan) == (
        "job.yaml:5: tensor model.layers.1.self_attn.q_proj.bias is in cos but not in fmt;"
        " parents hold the same tensors"
    )


def test_shapes_that_differ_are_shown_side_by_side(plan: Planning, parents: Path):
    write_model(parents / "fmt", {**weights("fmt"), "model.norm.weight": torch.ones(17).bfloat16()})
    assert refusal(plan) == (
        "job.yaml:5: tensor model.norm.weight is [16] in cos and [17] in fmt; only equal shapes can be merged"
    )


def test_other_architectures_are_refused(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt"), config={"model_type": "llama"})
    assert refusal(plan) == "job.yaml:5: cos is a qwen2, fmt a llama; parents share one architecture"


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "mixed"])
def test_dtypes_that_cannot_be_merged_are_refused(kind: str, plan: Planning, parents: Path):
    for who in ("cos", "fmt"):
        dtype = torch.float8_e4m3fn if kind != "mixed" else torch.int8 if who == "cos" else torch.int16
        write_model(parents / who, {**weights(who), "table": torch.zeros(2).to(dtype)})
    assert "job.yaml:5: tensor table is stored as " in refusal(plan)


def test_parents_without_numbers_are_refused(plan: Planning, parents: Path):
    for who in ("cos", "fmt"):
        write_model(parents / who, {"table": torch.zeros(2, dtype=torch.int32)})
    assert refusal(plan) == "job.yaml:5: the parents hold no floating-point tensors; there is nothing to merge"


# ---- tied and untied heads


def test_a_tied_and_an_untied_parent_need_a_word(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt", tied=False))
    line = refusal(plan)
    assert "disagree on tie_word_embeddings: cos true, fmt false; say whose holds with `config_from: PARENT`" in line


def test_a_config_that_is_silent_is_judged_by_its_head(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt", tied=False), config={"tie_word_embeddings": None})
    assert "disagree on tie_word_embeddings: cos true, fmt false" in refusal(plan)
    write_model(parents / "fmt", weights("fmt"), config={"tie_word_embeddings": None})
    plan()


def test_the_tied_config_drops_the_head_and_the_untied_one_keeps_it(plan: Planning, parents: Path):
    write_model(parents / "fmt", weights("fmt", tied=False))
    (tied,) = plan(config_from="cos").points[0].layout.shards
    assert {tensor.name for tensor in tied.tensors} == set(shapes())
    layout = plan(config_from="fmt").points[0].layout
    (head,) = [tensor for tensor in layout.shards[0].tensors if tensor.name == HEAD]
    opened = plan(config_from="fmt").parents
    assert head.sources == {"cos": opened["cos"].tensors[EMBEDDINGS], "fmt": opened["fmt"].tensors[HEAD]}
    assert layout.config["tie_word_embeddings"] is False


# ---- parents that cannot be read


def test_a_parent_that_is_not_there_is_refused_on_its_line(plan: Planning, parents: Path):
    (parents / "cos").rename(parents / "gone")
    assert refusal(plan) == (f"job.yaml:3: no folder {parents}/cos; give a path, or hf://, s3://, gs:// or az://")


def test_an_empty_parent_is_refused(plan: Planning, parents: Path):
    for path in (parents / "cos").iterdir():
        path.unlink()
    with pytest.raises(ObjectMissing, match=r"parent cos \(.*/parents/cos\): nothing there; check the path"):
        plan()


def test_a_damaged_parent_is_bad_input(plan: Planning, parents: Path):
    path = parents / "cos" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    line = refusal(plan)
    assert line.startswith(f"parent cos: {path}: the tensors end at byte ")
    assert line.endswith("it is truncated or has a tail")


def test_relative_parents_count_from_the_given_folder(job_text: Callable[..., str], parents: Path):
    text = job_text().replace(f"{parents}/", "../parents/")
    (parents.parent / "jobs").mkdir()
    planned = make_plan(load_job(text, "job.yaml"), relative_to=parents.parent / "jobs")
    assert planned.parents["cos"].url == str(parents / "cos")


def test_plan_json_pins_what_was_seen(plan: Planning, parents: Path):
    document = json.loads(json.dumps(plan().document()))
    for who in ("cos", "fmt"):
        assert document["parents"][who]["url"] == str(parents / who)
        (file,) = document["parents"][who]["files"].values()
        assert file["size"] == (parents / who / "model.safetensors").stat().st_size
        assert file["etag"]


# ---- chat templates

PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
OTHER = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
THREE = """
  merge_method: linear
  base_model: base
  models:
  - {model: base, parameters: {weight: 1}}
  - {model: cos, parameters: {weight: 1}}
  - {model: fmt, parameters: {weight: 1}}
  chat_template: auto
"""


def with_templates(parents: Path, **templates: str) -> None:
    for who, template in templates.items():
        (parents / who / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize(
    ("templates", "chosen"),
    [
        ({"base": OTHER, "cos": PLAIN, "fmt": f"\n{PLAIN}\n"}, PLAIN),
        ({"base": OTHER, "cos": PLAIN}, OTHER),
        ({"cos": PLAIN, "fmt": OTHER}, PLAIN),
        ({"fmt": OTHER}, OTHER),
        ({}, None),
    ],
    ids=["the commonest", "a tie: the tokenizer's", "a tie: the first", "the only one", "none"],
)
def test_chat_template_auto_is_the_commonest_of_the_parents(
    plan: Planning, parents: Path, templates: dict[str, str], chosen: str | None
):
    with_templates(parents, **templates)
    assert plan(recipe=THREE, grid="").points[0].layout.chat_template == chosen


def test_a_broken_template_of_a_parent_is_refused_by_the_parents_name(plan: Planning, parents: Path):
    with_templates(parents, fmt="{% for m in messages %}{{ m.content }}")
    said = refusal(plan, recipe=THREE, grid="")
    assert said.startswith("job.yaml:13: parent fmt: the chat template is not Jinja (")
    assert said.endswith("; name a template in place of `auto`")
    plan(recipe=THREE.replace("auto", "chatml"), grid="")


def test_a_chat_template_that_does_not_compile_is_refused_at_its_line(plan: Planning):
    said = refusal(plan, recipe=EVEN + "  chat_template: '{% for m in messages %}'\n", grid="")
    assert said.startswith("job.yaml:10: the chat template is not Jinja (")
    plan(recipe=EVEN + "  chat_template: '{% for m in messages %}{{ m.content }}{% endfor %}'\n", grid="")


def test_a_run_is_another_when_the_commonest_template_is(plan: Planning, parents: Path):
    with_templates(parents, fmt=OTHER)
    first = plan(recipe=THREE, grid="").digest
    with_templates(parents, fmt=PLAIN)
    assert plan(recipe=THREE, grid="").digest != first
