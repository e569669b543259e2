"""A plain language model goes into the language model of a multimodal one; the rest is the multimodal one's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from jobs.errors import BadInput
from orchestrator.planning.plan import Plan
from tests.orchestrator.models import CONFIG, write_model

Planning = Callable[..., Plan]

MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
TEXT = {**CONFIG, "model_type": "qwen2_vl_text", "rope_parameters": MROPE}
VLM: dict[str, Any] = dict.fromkeys(CONFIG) | {
    "model_type": "qwen2_vl",
    "architectures": ["Qwen2VLForConditionalGeneration"],
    "text_config": {name: value for name, value in TEXT.items() if name != "rope_theta"},
    "vision_config": {"model_type": "qwen2_vl", "depth": 1},
}
PLAIN = ["model.embed_tokens.weight", "model.norm.weight", *(f"model.layers.{number}.w" for number in range(2))]
IMAGES = ["model.visual.blocks.0.w", "model.visual.patch_embed.proj.weight", "model.visual.merger.mlp.0.weight"]
"""`cos` is the multimodal model, `fmt` the plain one."""


def inside(name: str) -> str:
    return name.replace("model.", "model.language_model.", 1)


def ones(*names: str) -> dict[str, torch.Tensor]:
    return {name: torch.ones(2) for name in names}


@pytest.fixture(autouse=True)
def models(parents: Path) -> None:
    write_model(parents / "cos", ones(*map(inside, PLAIN), *IMAGES), config=VLM)
    write_model(parents / "fmt", ones(*PLAIN))
    write_model(parents / "base", ones(*PLAIN))


LINEAR = """
  merge_method: linear
  models: [{model: fmt, parameters: {weight: 1}}, {model: cos, parameters: {weight: 1}}]
"""
TASKS = """
  merge_method: task_arithmetic
  base_model: base
  models: [{model: base}, {model: fmt, parameters: {weight: 1}}, {model: cos, parameters: {weight: 1}}]
"""
MODULE = """
  merge_method: linear
  modules:
    text_decoder:
      models: [{model: fmt, parameters: {weight: 1}}, {model: cos, parameters: {weight: 1}}]
"""
SLICES = """
  merge_method: passthrough
  modules:
    text_decoder:
      slices:
      - sources: [{model: fmt, layer_range: [0, 1]}]
      - sources: [{model: cos, layer_range: [0, 2]}]
"""


@pytest.mark.parametrize(("recipe", "members"), [(LINEAR, 2), (TASKS, 3), (MODULE, 2)])
def test_language_tensors_are_merged_and_all_others_copied(recipe: str, members: int, plan: Planning):
    planned = plan(recipe=recipe, grid="")
    layout = planned.points[0].layout
    found = {tensor.name: tensor.sources for shard in layout.shards for tensor in shard.tensors}
    assert found.keys() == {*map(inside, PLAIN), *IMAGES}
    for name in PLAIN:
        sources = found[inside(name)]
        assert len(sources) == members
        assert sources["fmt"] == planned.parents["fmt"].tensors[name]
        assert sources["cos"] == planned.parents["cos"].tensors[inside(name)]
    assert [[*found[name]] for name in IMAGES] == [["cos"]] * 3
    assert (layout.donor, layout.config["model_type"]) == ("cos", "qwen2_vl")
    assert layout.whole == (("cos",) if "modules" not in recipe else ())


def test_layers_of_a_plain_model_are_stacked_into_the_multimodal_one(plan: Planning):
    planned = plan(recipe=SLICES, grid="")
    layout = planned.points[0].layout
    origins = {tensor.name: [*tensor.sources] for shard in layout.shards for tensor in shard.tensors}
    layers = [origins[f"model.language_model.layers.{number}.w"] for number in range(3)]
    assert layers == [["fmt"], ["cos"], ["cos"]]
    assert layout.config["text_config"]["num_hidden_layers"] == 3
    assert [origins[name] for name in IMAGES] == [["cos"]] * 3


def test_a_field_of_the_language_model_that_differs_is_refused(plan: Planning, parents: Path):
    write_model(parents / "fmt", ones(*PLAIN), config={"rms_norm_eps": 1e-5})
    with pytest.raises(BadInput, match=r"disagree on text_config.rms_norm_eps: fmt 1e-05, cos 1e-06; say whose holds"):
        plan(recipe=LINEAR, grid="")
    assert plan(recipe=LINEAR, grid="", config_from="cos").points[0].layout.donor == "cos"
    with pytest.raises(BadInput, match=r"fmt is a plain language model, and the output is not; say `config_from: cos`"):
        plan(recipe=LINEAR, grid="", config_from="fmt")


def test_rope_is_compared_but_for_the_part_of_images(plan: Planning, parents: Path):
    write_model(parents / "fmt", ones(*PLAIN), config={"rope_theta": 1e6})
    with pytest.raises(BadInput, match=r"disagree on text_config.rope_theta: fmt 1000000.0, cos 10000.0; say whose"):
        plan(recipe=LINEAR, grid="")
    scaled = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
    write_model(parents / "fmt", ones(*PLAIN), config={"rope_parameters": scaled})
    with pytest.raises(BadInput, match=r"disagree on text_config.rope_scaling: "):
        plan(recipe=LINEAR, grid="")


def test_a_plain_model_of_another_family_is_refused(plan: Planning, parents: Path):
    write_model(parents / "fmt", ones(*PLAIN), config={"model_type": "llama"})
    with pytest.raises(BadInput, match="fmt is a llama, cos a qwen2_vl; parents share one architecture"):
        plan(recipe=LINEAR, grid="")
