"""FP8 weights with scales beside them: by what rule they are read, and the ones that stay refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from jobs.merge_tasks import Derived, ParentTensor, Scaled
from workers.checkpoints.opening import Checkpoint, Unmergeable, open_checkpoint
from workers.merging.deriving import Deriving

W = "model.layers.0.mlp.up_proj.weight"
FP8 = torch.float8_e4m3fn


def opened(folder: Path, tensors: dict[str, torch.Tensor], quantised: Any, **config: Any) -> Checkpoint:
    save_file({"model.norm.weight": torch.ones(4), **tensors}, folder / "model.safetensors")
    stated = {} if quantised is None else {"quantization_config": quantised}
    (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "dtype": "bfloat16", **config, **stated}))
    return open_checkpoint(str(folder), "cos")


BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "float-quantized"}


@pytest.mark.parametrize(
    ("weight", "scales", "kind", "stated", "rule"),
    [
        ((256, 384), (2, 3), "_scale_inv", BLOCKS, Scaled((1, 2, 3), (128, 128))),
        ((200, 130), (2, 2), "_scale_inv", BLOCKS, Scaled((1, 2, 2), (128, 128))),
        ((96, 64), (2, 4), "_scale_inv", {"quant_method": "fp8"}, Scaled((1, 2, 4), (48, 16))),
        ((6, 4), (), "_scale", COMPRESSED, Scaled((1, 1, 1), (6, 4))),
        ((6, 4), (1,), "_scale", {"quant_method": "modelopt"}, Scaled((1, 1, 1), (6, 4))),
        ((6, 4), (6, 1), "_scale", COMPRESSED, Scaled((1, 6, 1), (1, 4))),
        ((6, 4), (6,), "_scale", {"quant_method": "fbgemm_fp8"}, Scaled((1, 6, 1), (1, 4))),
        ((3, 6, 4), (3, 1, 4), "_scale", {"quant_method": "fbgemm_fp8"}, Scaled((3, 1, 4), (6, 1))),
        ((3, 256, 128), (3, 2, 1), "_scale_inv", BLOCKS, Scaled((3, 2, 1), (128, 128))),
        ((6, 4), (6, 1), "_scale", None, Scaled((1, 6, 1), (1, 4))),
    ],
)
def test_scales_are_laid_over_the_weight(
    tmp_path: Path, weight: tuple[int, ...], scales: tuple[int, ...], kind: str, stated: Any, rule: Scaled
) -> None:
    tensors = {W: torch.zeros(weight).to(FP8), f"{W}{kind}": torch.ones(scales)}
    tensors |= {W.replace("weight", "input_scale"): torch.ones(1), "model.layers.0.self_attn.k_scale": torch.ones(1)}
    found = opened(tmp_path, tensors, stated)
    assert found.tensors.keys() == found.shapes.keys() == {W, "model.norm.weight"}
    source = found.tensors[W]
    assert isinstance(source, Derived)
    assert (source.dtype, source.shape, source.rule) == ("BF16", weight, rule)
    assert [name for name, _ in source.inputs] == ["cos", "cos"]
    assert isinstance(found.tensors["model.norm.weight"], ParentTensor)
    assert "quantization_config" not in found.config


def test_scales_may_be_powers_of_two_of_one_byte(tmp_path: Path) -> None:
    weight, exponents = (
        torch.tensor([[1.5, -2.0], [0.5, 448.0]]).to(FP8),
        torch.tensor([[126], [130]], dtype=torch.uint8),
    )
    scales = {f"{W}_scale_inv": exponents.view(torch.float8_e8m0fnu)}
    found = opened(tmp_path, {W: weight, **scales}, {**BLOCKS, "scale_fmt": "ue8m0", "weight_block_size": [1, 2]})
    values = Deriving({"cos": found.parent}).whole("cos", found.tensors[W], W)
    assert values.astype("float32").tolist() == [0.75, -1.0, 4.0, 3584.0]


def test_modelopt_may_state_its_format_in_a_file_of_its_own(tmp_path: Path) -> None:
    tensors = {W: torch.zeros(6, 4).to(FP8), f"{W}_scale": torch.ones(())}
    modelopt = tmp_path / "hf_quant_config.json"
    modelopt.write_text(json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}))
    found = opened(tmp_path, tensors, None)
    assert isinstance(source := found.tensors[W], Derived) and isinstance(source.rule, Scaled)
    assert "quantization_config" not in found.config and modelopt.name not in found.side_files
    for other in ({"quantization": {"quant_algo": "NVFP4"}}, {"quantization": None}, {}):
        modelopt.write_text(json.dumps(other))
        with pytest.raises(Unmergeable, match=r"\(hf_quant_config.json\) cannot be merged"):
            opened(tmp_path, tensors, None)


def test_the_dtype_is_that_of_the_config(tmp_path: Path) -> None:
    tensors = {W: torch.zeros(6, 4).to(torch.float8_e5m2), f"{W}_scale": torch.ones(1)}
    section = {"model_type": "qwen2", "torch_dtype": "float16", "quantization_config": COMPRESSED}
    found = opened(tmp_path, tensors, None, dtype=None, text_config=section)
    assert found.tensors[W].dtype == "F16"
    assert "quantization_config" not in found.config["text_config"]
    assert opened(tmp_path, tensors, COMPRESSED, dtype=None).tensors[W].dtype == "BF16"


@pytest.mark.parametrize(
    ("tensors", "stated"),
    [
        ({W: torch.zeros(6, 4).to(FP8)}, BLOCKS),
        ({W: torch.zeros(6, 4).to(FP8), f"{W}_scale_inv": torch.ones(5, 3)}, BLOCKS),
        ({W: torch.zeros(6, 4).to(FP8), f"{W}_scale_inv": torch.ones(1, dtype=torch.uint8)}, BLOCKS),
        ({W: torch.zeros(6, 4).to(FP8), f"{W}_scale": torch.ones(1), f"{W}_zero_point": torch.zeros(1)}, COMPRESSED),
        ({W: torch.zeros(6, 4, dtype=torch.int8), f"{W}_scale": torch.ones(6, 1)}, COMPRESSED),
        ({W: torch.zeros(6, 4).to(FP8), f"{W}_scale": torch.ones(1)}, {**COMPRESSED, "transform_config": {"a": 1}}),
        ({W: torch.zeros(6, 4).to(FP8), f"{W}_scale": torch.ones(1)}, {"quant_method": "gptq"}),
        ({W: torch.zeros(6, 4)}, BLOCKS),
        (
            {W: torch.zeros(6, 4).to(FP8), f"{W}_scale": torch.ones(1), "a.weight_packed": torch.zeros(2)},
            COMPRESSED,
        ),
    ],
)
def test_other_quantised_weights_stay_refused(tmp_path: Path, tensors: dict[str, torch.Tensor], stated: Any) -> None:
    with pytest.raises(Unmergeable, match=r"quantised weights \(.*\) cannot be merged; give the checkpoint that they"):
        opened(tmp_path, tensors, stated)
