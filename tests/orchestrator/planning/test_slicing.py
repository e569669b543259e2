"""Slices and modules become plain merges of moved layers; each layer keeps its kind, and the config says so."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import BadInput
from jobs.job import Job
from jobs.sources import Filtered
from orchestrator.planning.layouts import Layout
from orchestrator.planning.plan import Plan, make_plan
from orchestrator.planning.slicing import over
from tests.orchestrator.models import CONFIG, EMBEDDINGS, HEAD, weights, write_model

Planning = Callable[..., Plan]

WHOLE = """
  merge_method: linear
  models:
  - {model: cos, parameters: {weight: [0.2, 0.8]}}
  - {model: fmt, parameters: {weight: 0.5}}
"""
ONE_SLICE = """
  merge_method: linear
  slices:
  - sources:
    - {model: cos, layer_range: [0, 2], parameters: {weight: [0.2, 0.8]}}
    - {model: fmt, layer_range: [0, 2], parameters: {weight: 0.5}}
"""
STACK = """
  merge_method: passthrough
  slices:
  - sources: [{model: cos, layer_range: [0, 2]}]
  - sources: [{model: fmt, layer_range: ["${k}", 2]}]
  - sources: [{model: cos, layer_range: [0, 1]}]
"""


def layout_of(plan: Plan) -> Layout:
    return plan.points[0].layout


def origins(plan: Plan, layout: Layout) -> dict[str, list[str]]:
    """Output tensor to `parent/tensor` of each source."""
    places = {
        (name, at): f"{name}/{tensor}" for name, parent in plan.parents.items() for tensor, at in parent.tensors.items()
    }
    return {
        tensor.name: [places[name, at] for name, at in tensor.sources.items()]  # pyright: ignore
        for shard in layout.shards
        for tensor in shard.tensors
    }


def test_one_slice_of_all_layers_is_the_merge_of_the_models(plan: Planning):
    whole, sliced = plan(recipe=WHOLE, grid=""), plan(recipe=ONE_SLICE, grid="")
    assert whole.digest == sliced.digest
    assert whole.points[0].contents == sliced.points[0].contents
    assert layout_of(sliced).whole == ("cos", "fmt")


@pytest.mark.parametrize("order", [("cos", "fmt"), ("fmt", "cos")])
def test_a_stack_of_a_tied_and_an_untied_model_has_the_head_of_its_last_slice(
    order: tuple[str, str], plan: Planning, parents: Path
):
    write_model(parents / "fmt", weights("fmt", tied=False))
    slices = ", ".join(f"{{sources: [{{model: {name}, layer_range: [0, 1]}}]}}" for name in order)
    planned = plan(recipe=f"\n  merge_method: passthrough\n  slices: [{slices}]\n", grid="")
    layout = layout_of(planned)
    found = origins(planned, layout)
    assert found[EMBEDDINGS] == [f"{order[0]}/{EMBEDDINGS}"]
    assert found[HEAD] == [f"cos/{EMBEDDINGS}" if order[1] == "cos" else f"fmt/{HEAD}"]
    assert layout.config["tie_word_embeddings"] is False


def test_two_slices_of_one_merge_are_the_merge_with_their_own_gradients(plan: Planning):
    two = ONE_SLICE.replace("[0, 2]", "[0, 1]") + ONE_SLICE.partition("slices:\n")[2].replace("[0, 2]", "[1, 2]")
    planned = plan(recipe=two, grid="")
    (shard,) = layout_of(planned).shards
    weight = {
        tensor.name: dict(planned.points[0].settings[tensor.setting].parameters)["weight"] for tensor in shard.tensors
    }
    # a slice of one layer is at the end of the gradient; embeddings and norm are at its start
    assert (
        weight["model.layers.0.mlp.up_proj.weight"] == weight["model.layers.1.mlp.up_proj.weight"] == (8 / 13, 5 / 13)
    )
    assert weight[EMBEDDINGS] == weight["model.norm.weight"] == (2 / 7, 5 / 7)


def test_layers_are_numbered_anew_and_the_ends_belong_to_the_first_and_last_slice(plan: Planning):
    planned = plan(recipe=STACK, grid="{k: [1]}")
    found = origins(planned, layout_of(planned))
    layers = ["cos/model.layers.0", "cos/model.layers.1", "fmt/model.layers.1", "cos/model.layers.0"]
    for number, origin in enumerate(layers):
        assert found[f"model.layers.{number}.mlp.up_proj.weight"] == [f"{origin}.mlp.up_proj.weight"]
    assert not any(name.startswith("model.layers.4.") for name in found)
    assert layout_of(planned).config["num_hidden_layers"] == 4
    ends = plan(recipe=STACK.rpartition("  - ")[0], grid="{k: [1]}")
    found = origins(ends, layout_of(ends))
    assert (found[EMBEDDINGS], found["model.norm.weight"]) == ([f"cos/{EMBEDDINGS}"], ["fmt/model.norm.weight"])


def test_an_axis_moves_a_range(plan: Planning):
    planned = plan(recipe=STACK, grid="{k: [0, 1]}")
    assert [point.layout.config["num_hidden_layers"] for point in planned.points] == [5, 4]
    assert len({point.digest for point in planned.points}) == 2


def test_a_parent_whose_layers_move_is_a_point_with_a_layout_of_its_own(plan: Planning):
    from orchestrator.planning.parents import parent_alone, parents_as_points

    planned = plan(recipe=STACK, grid="{k: [1]}")
    assert parents_as_points(planned, layout_of(planned)) == []
    assert parent_alone(planned, "cos").layout.config["num_hidden_layers"] == 2


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("layer_range: [0, 2]", "layer_range: [1, 3]", "layer_range [1, 3] is beyond the 2 layers of cos"),
        ("merge_method: passthrough", "merge_method: slerp", "slerp needs a base_model"),
        ("passthrough", "passthroug", 'unknown method "passthroug"; did you mean "passthrough"?'),
        ("  slices:", "  base_model: fmt\n  slices:", None),
    ],
)
def test_slices_that_cannot_be_are_refused(old: str, new: str, message: str | None, plan: Planning):
    text = STACK.replace(old, new, 1)
    if message is None:  # of a method without a base, base_model is only the donor of the config
        assert layout_of(plan(recipe=text, grid="{k: [1]}")).donor == "fmt"
        return
    with pytest.raises(BadInput) as refused:
        plan(recipe=text, grid="{k: [1]}")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


TASKS = """
  merge_method: task_arithmetic
  base_model: base
  parameters: {weight: 0.5}
  slices:
  - sources: [{model: cos, layer_range: [0, 1]}, {model: fmt, layer_range: [1, 2]}]
  - sources: [{model: base, layer_range: [0, 1]}, {model: fmt, layer_range: [1, 2]}]
"""


def test_a_base_beside_the_sources_has_the_range_that_they_share(plan: Planning):
    with pytest.raises(BadInput, match="the base_model base is not among the sources, whose layers differ; list it"):
        plan(recipe=TASKS, grid="")
    planned = plan(
        recipe=TASKS.replace("{model: fmt, layer_range: [1, 2]}", "{model: fmt, layer_range: [0, 1]}"), grid=""
    )
    found = origins(planned, layout_of(planned))["model.layers.0.mlp.up_proj.weight"]
    assert found == [f"{who}/model.layers.0.mlp.up_proj.weight" for who in ("cos", "fmt", "base")]


def test_a_filter_that_misses_gives_way_to_the_next_level():
    gradient = (Fraction(0), Fraction(1))
    upper = {"a": (Filtered("mlp", gradient),), "b": Fraction(1)}
    assert over(upper, {"b": Fraction(2), "c": True}) == {**upper, "c": True}
    assert over(upper, {"a": gradient})["a"] == (Filtered("mlp", gradient), Filtered(None, gradient))
    assert over(upper, {}, {"a": (Filtered("q", False),)})["a"] == (Filtered("mlp", gradient), Filtered("q", False))


# ---- kinds of layers


def write(folder: Path, who: str, layers: int, **config: Any) -> None:
    names = {f"model.layers.{number}.w": torch.ones(2).bfloat16() for number in range(layers)}
    write_model(folder / who, {**names, "model.norm.w": torch.ones(2)}, config={"num_hidden_layers": layers, **config})


def config_of(plan: Planning, slices: str) -> Any:
    recipe = f"\n  merge_method: passthrough\n  slices: [{slices}]\n"
    return layout_of(plan(recipe=recipe, grid="")).config


COS = "{sources: [{model: cos, layer_range: [%d, %d]}]}"
SLIDING, FULL = "sliding_attention", "full_attention"


def test_every_layer_keeps_its_kind(plan: Planning, parents: Path):
    lists = {"layer_types": [SLIDING, SLIDING, FULL, SLIDING], "no_rope_layers": [1, 1, 0, 1]}
    write(parents, "cos", 4, **lists, use_sliding_window=True, sliding_window=8, max_window_layers=1)
    config = config_of(plan, f"{COS % (2, 4)}, {COS % (0, 3)}")
    assert config["layer_types"] == [FULL, SLIDING, SLIDING, SLIDING, FULL]
    assert config["no_rope_layers"] == [0, 1, 1, 1, 0]
    assert (config["num_hidden_layers"], config["max_window_layers"]) == (5, 1)


def test_kinds_that_the_class_makes_from_its_defaults_are_written_out(plan: Planning, parents: Path):
    write(parents, "cos", 4, model_type="gemma2", architectures=["Gemma2ForCausalLM"])  # every other layer slides
    assert config_of(plan, f"{COS % (0, 1)}, {COS % (2, 3)}")["layer_types"] == [SLIDING, SLIDING]


def test_lists_of_the_layers_of_one_kind_are_numbered_anew(plan: Planning, parents: Path):
    write(
        parents, "cos", 6, model_type="qwen2_moe", mlp_only_layers=[2], decoder_sparse_step=2
    )  # 1, 3 and 5 are sparse
    config = config_of(plan, f"{COS % (1, 4)}, {COS % (3, 6)}")  # 1 2 3, 3 4 5
    assert (config["mlp_only_layers"], config["decoder_sparse_step"]) == ([1, 4], 1)


def test_dense_layers_before_sparse_ones_are_counted(plan: Planning, parents: Path):
    write(parents, "cos", 4, model_type="deepseek_v3", first_k_dense_replace=2)
    assert config_of(plan, f"{COS % (1, 4)}")["first_k_dense_replace"] == 1
    with pytest.raises(BadInput, match="dense layers would follow sparse ones, which first_k_dense_replace"):
        config_of(plan, f"{COS % (1, 4)}, {COS % (1, 2)}")


def test_a_period_that_the_slices_disturb_is_refused(plan: Planning, parents: Path):
    write(parents, "cos", 4, model_type="unheard-of", expert_layer_period=2)
    assert config_of(plan, f"{COS % (0, 2)}, {COS % (0, 4)}")["num_hidden_layers"] == 6
    with pytest.raises(BadInput, match=r"every 2 layers [(]expert_layer_period of config.json[)], which these"):
        config_of(plan, f"{COS % (1, 4)}")


def test_the_sources_of_a_layer_are_of_one_kind(plan: Planning, parents: Path):
    for who in ("cos", "fmt"):
        write(parents, who, 4, layer_types=[SLIDING, FULL, SLIDING, FULL])
    pair = "{sources: [{model: cos, layer_range: [0, 2]}, {model: fmt, layer_range: [%d, %d]}]}"
    recipe = "\n  merge_method: linear\n  parameters: {weight: 1}\n  slices: [%s]\n"
    assert layout_of(plan(recipe=recipe % (pair % (2, 4)), grid="")).config["layer_types"] == [SLIDING, FULL]
    with pytest.raises(BadInput, match=f"layer_types .* {SLIDING} of layer 0 in cos, {FULL} of layer 1 in fmt; take"):
        plan(recipe=recipe % (pair % (1, 3)), grid="")
    chosen = plan(recipe=recipe % (pair % (1, 3)), grid="", config_from="fmt")
    assert layout_of(chosen).config["layer_types"] == [FULL, SLIDING]


def test_a_config_that_does_not_count_its_layers_is_refused(plan: Planning, parents: Path):
    write_model(
        parents / "cos",
        {f"model.layers.{number}.w": torch.ones(2) for number in range(3)},
        config={**CONFIG, "model_type": "unheard-of", "num_hidden_layers": 4},
    )
    with pytest.raises(
        BadInput, match=r"no known field of config.json counts the 3 layers of model.layers; merge whole"
    ):
        config_of(plan, f"{COS % (1, 3)}")


def test_layers_that_share_results_are_not_taken_apart(plan: Planning, parents: Path):
    write(parents, "cos", 4, model_type="unheard-of", num_kv_shared_layers=2)
    with pytest.raises(BadInput, match=r"num_kv_shared_layers of config.json: layers share .* under `models:`"):
        config_of(plan, f"{COS % (0, 3)}")
    whole = "\n  merge_method: passthrough\n  models: [{model: cos}]\n"
    assert layout_of(plan(recipe=whole, grid="")).config["num_kv_shared_layers"] == 2


def test_a_tensor_that_only_the_first_layer_lacks_keeps_it_in_its_place(plan: Planning, parents: Path):
    model = {"model_type": "modernbert", "architectures": ["ModernBertForMaskedLM"], "hidden_size": 8}
    model |= {"num_attention_heads": 2, "intermediate_size": 8, "pad_token_id": 0, "num_hidden_layers": 2}
    parts = ("attn.Wqkv", "attn.Wo", "mlp_norm", "mlp.Wi", "mlp.Wo", "attn_norm")
    names = [f"model.layers.{layer}.{part}.weight" for layer in range(2) for part in parts]
    names.remove("model.layers.0.attn_norm.weight")
    write_model(parents / "cos", {name: torch.ones(2) for name in names}, config=model)
    assert config_of(plan, f"{COS % (0, 2)}, {COS % (1, 2)}")["num_hidden_layers"] == 3
    with pytest.raises(BadInput, match=r"the output would lack model.layers.1.attn_norm.weight, which the layer"):
        config_of(plan, f"{COS % (1, 2)}, {COS % (0, 1)}")


# ---- modules

VLM = {
    "model_type": "llava",
    "architectures": ["LlavaForConditionalGeneration"],
    "text_config": {**CONFIG, "num_hidden_layers": 3},
    "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 2, "hidden_size": 8},
}
VLM_NAMES = [
    "model.language_model.embed_tokens.weight",
    *(f"model.language_model.layers.{number}.w" for number in range(3)),
    "lm_head.weight",
    *(f"model.vision_tower.vision_model.encoder.layers.{number}.w" for number in range(2)),
    "model.vision_tower.vision_model.embeddings.class_embedding",
    "model.multi_modal_projector.linear_1.weight",
]


@pytest.fixture
def vlms(parents: Path) -> Path:
    for who in ("cos", "fmt"):
        write_model(parents / who, {name: torch.ones(2).bfloat16() for name in VLM_NAMES}, config=VLM)
    return parents


MODULES = """
  merge_method: linear
  modules:
    text_decoder:
      slices:
      - sources: [{model: fmt, layer_range: [1, 3], parameters: {weight: 1}}]
      - sources:
        - {model: cos, layer_range: [0, 3]}
        - {model: fmt, layer_range: [0, 3]}
        parameters: {weight: [1, 2]}
    %s:
      models: [{model: cos}, {model: fmt}]
      parameters: {weight: 1}
"""


@pytest.mark.usefixtures("vlms")
@pytest.mark.parametrize("tower", ["vision_tower", "vision_model", "model.vision_tower.vision_model.encoder.layers"])
def test_each_module_is_merged_by_itself_and_the_others_are_copied(plan: Planning, tower: str):
    planned = plan(recipe=MODULES % tower, grid="")
    found = origins(planned, layout_of(planned))
    names = [name for name in VLM_NAMES if ".language_model.layers." not in name]
    assert found.keys() == {*names, *(f"model.language_model.layers.{number}.w" for number in range(5))}
    for number, origin in enumerate(["fmt/1", "fmt/2", "cos/0 fmt/0", "cos/1 fmt/1", "cos/2 fmt/2"]):
        expected = [part.replace("/", "/model.language_model.layers.") + ".w" for part in origin.split()]
        assert found[f"model.language_model.layers.{number}.w"] == expected
    assert found["model.language_model.embed_tokens.weight"] == ["fmt/model.language_model.embed_tokens.weight"]
    assert found["lm_head.weight"] == ["cos/lm_head.weight", "fmt/lm_head.weight"]
    assert [len(found[name]) for name in VLM_NAMES[5:8]] == [2, 2, 1 if "layers" in tower else 2]
    assert found["model.multi_modal_projector.linear_1.weight"] == ["fmt/model.multi_modal_projector.linear_1.weight"]
    config = layout_of(planned).config
    assert (config["text_config"]["num_hidden_layers"], config["vision_config"]["num_hidden_layers"]) == (5, 2)


@pytest.mark.usefixtures("vlms")
def test_default_is_all_that_no_other_module_has(plan: Planning):
    stack = "model.language_model.layers"
    modules = (MODULES % "default").replace("text_decoder", stack)
    planned = plan(recipe=modules, grid="")
    found = origins(planned, layout_of(planned))
    assert [len(found[name]) for name in VLM_NAMES if stack not in name] == [2] * 6
    assert len(found[f"{stack}.0.w"]) == 1
    with pytest.raises(BadInput, match=r'"text_decoder" and "language_model" share tensors; take one out'):
        plan(recipe=MODULES % "language_model", grid="")


@pytest.mark.usefixtures("vlms")
def test_slices_of_a_model_of_several_modules_need_their_name(plan: Planning):
    with pytest.raises(BadInput, match=r"has the modules .*; write the slices under `modules:`"):
        plan(recipe=ONE_SLICE, grid="")
    with pytest.raises(BadInput, match=r'has no module "audio"; its modules are .*text_decoder'):
        plan(recipe=MODULES % "audio", grid="")


@pytest.mark.usefixtures("parents")
def test_residual_weight_has_no_effect_and_is_remarked(job: Callable[..., Job]):
    text = ONE_SLICE.replace("  - sources:", "  - residual_weight: 0.5\n    sources:")
    planned = make_plan(job(recipe=text, grid=""))
    assert [line for line in planned.remarks if "residual_weight has no effect, as in mergekit" in line]
