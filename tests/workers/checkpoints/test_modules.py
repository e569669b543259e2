"""mergekit's names of modules, from the names of tensors that transformers gives."""

from __future__ import annotations

import pytest

from workers.checkpoints.modules import in_stack, is_before_layers, modules_of, tensors_of

QWEN2_VL = [
    "model.embed_tokens.weight",
    "model.layers.0.w",
    "lm_head.weight",
    "visual.blocks.0.w",
    "visual.merger.mlp.0.w",
]
T5 = ["shared.weight", "encoder.block.0.w", "encoder.final_layer_norm.weight", "decoder.block.0.w", "lm_head.weight"]
BERT = ["bert.embeddings.word_embeddings.weight", "bert.encoder.layer.0.w", "cls.predictions.decoder.weight"]


@pytest.mark.parametrize(
    ("names", "modules"),
    [
        (QWEN2_VL, {"text_decoder": QWEN2_VL[:3], "visual": QWEN2_VL[3:4], "multi_modal_projector": QWEN2_VL[4:]}),
        (T5, {"shared": T5[:1], "encoder": T5[1:3], "decoder": T5[3:]}),
        (BERT, {"default": BERT}),
    ],
)
def test_every_tensor_is_in_one_module(names: list[str], modules: dict[str, list[str]]):
    assert modules_of(names) == {module: {*of_module} for module, of_module in modules.items()}


def test_a_tower_has_several_names():
    modules = modules_of(QWEN2_VL)
    for name in ("vision_tower", "vision_model", "visual", "visual.blocks"):
        assert tensors_of(name, modules) == {"visual.blocks.0.w"}
    assert tensors_of("language_model", modules) == {*QWEN2_VL[:3]}
    assert tensors_of("model.layers", modules) == {"model.layers.0.w"}
    assert tensors_of("audio", modules) == set()


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight", "transformer.wte.weight", "transformer.wpe.weight", "gpt_neox.embed_in.weight",
        "bert.embeddings.LayerNorm.weight", "transformer.word_embeddings_layernorm.weight", "shared.weight",
        "model.encoder.conv1.weight", "vision_model.pre_layrnorm.weight",
    ],
)  # fmt: skip
def test_embeddings_come_before_the_layers(name: str):
    assert is_before_layers(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight", "lm_head.weight", "transformer.ln_f.weight", "gpt_neox.final_layer_norm.weight",
        "embed_out.weight", "cls.predictions.decoder.weight", "bert.pooler.dense.weight", "backbone.norm_f.weight",
    ],
)  # fmt: skip
def test_norm_and_head_come_after_the_layers(name: str):
    assert not is_before_layers(name)


def test_the_positions_of_t5_stay_with_its_first_layer():
    bias = "decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    assert in_stack(bias, "decoder.block") is None and is_before_layers(bias)
    assert in_stack("decoder.block.7.layer.0.w", "decoder.block") == 7
    assert in_stack("encoder.block.7.layer.0.w", "decoder.block") is None
