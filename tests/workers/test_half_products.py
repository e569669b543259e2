"""Layers whose products are taken in float32: the numbers of the layer itself, whatever the blocks and the rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from workers import half_products
from workers.activations.measuring import measure
from workers.engines.transformers_engine import TransformersEngine
from workers.half_products import LEAST_ROWS, LinearInFloat32, speed_up
from workers.making.gates import decoder, hidden_states

EXAMPLES = Path(__file__).parents[2] / "jobs" / "examples" / "parents"

HALVES = [torch.bfloat16, torch.float16]


class Without:
    """A CPU whose oneDNN has units for these dtypes alone."""

    def __init__(self, *units: torch.dtype) -> None:
        self._is_mkldnn_bf16_supported = lambda: torch.bfloat16 in units
        self._is_mkldnn_fp16_supported = lambda: torch.float16 in units


@pytest.fixture
def units(monkeypatch: pytest.MonkeyPatch) -> Any:
    """units(*dtypes): this CPU has units for these."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    return lambda *dtypes: monkeypatch.setattr(torch.ops, "mkldnn", Without(*dtypes))


def layer(dtype: torch.dtype, bias: bool = True, width: int = 96, height: int = 70) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(width, height, bias=bias, dtype=dtype)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 1), (1, LEAST_ROWS - 1), (LEAST_ROWS,), (2, 33)])
@pytest.mark.parametrize("block", [1, 1000, 1 << 20])
def test_a_number_is_the_sum_rounded_once(
    dtype: torch.dtype, bias: bool, shape: tuple[int, ...], block: int, units: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    units()
    monkeypatch.setattr(half_products, "BLOCK", block)
    linear = layer(dtype, bias)
    inputs = torch.randn(*shape, 96).to(dtype)
    with torch.inference_mode():
        before = linear(inputs)
        speed_up(linear)
        found = linear(inputs)
    assert type(linear) is LinearInFloat32 and (found.shape, found.dtype) == (before.shape, dtype)
    exact = inputs.double() @ linear.weight.double().T + (linear.bias.double() if bias else 0.0)
    assert (found != exact.to(dtype)).double().mean() <= 0.01, "float32 moves a sum over the middle between two numbers"
    torch.testing.assert_close(found.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    if inputs.numel() // 96 < LEAST_ROWS:
        assert torch.equal(found, before), "the kernel of PyTorch"


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_a_cpu_that_has_units_for_a_dtype_keeps_its_kernels(dtype: torch.dtype, units: Any) -> None:
    for others in ([], [each for each in HALVES if each != dtype]):
        units(*others)
        model = nn.Sequential(layer(dtype), nn.LayerNorm(70))
        names = [*model.state_dict()]
        speed_up(model)
        assert (type(model[0]) is nn.Linear) is (dtype == torch.float32)
        assert [*model.state_dict()] == names
    units(*HALVES)
    model = nn.Sequential(layer(dtype))
    speed_up(model)
    assert type(model[0]) is nn.Linear


def test_a_pytorch_that_does_not_say_has_no_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    model = nn.Sequential(layer(torch.bfloat16))
    speed_up(model)
    assert type(model[0]) is LinearInFloat32


def test_an_input_of_another_dtype_is_refused_as_before(units: Any) -> None:
    units()
    linear = layer(torch.bfloat16)
    speed_up(linear)
    assert type(linear) is LinearInFloat32
    with pytest.raises(RuntimeError, match="dtype"):
        linear(torch.randn(LEAST_ROWS, 96))


def test_without_onednn_no_half_is_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    model = nn.Sequential(layer(torch.bfloat16), layer(torch.float32))
    speed_up(model)
    assert [type(each) for each in model] == [LinearInFloat32, nn.Linear]


def test_models_that_answer_are_measured_or_open_gates_take_their_products_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_products, "_is_slow", lambda weight: True)
    forward, seen = LinearInFloat32.forward, list[int]()
    monkeypatch.setattr(LinearInFloat32, "forward", lambda self, x: seen.append(x.shape[-2]) or forward(self, x))
    folder, ids = EXAMPLES / "fmt", [5, 9, 2, 7, 3, 1]
    tensors = load_file(folder / "model.safetensors")

    engine = TransformersEngine.from_folder(folder, device="cpu")
    linear = [module for module in engine.model.modules() if isinstance(module, nn.Linear)]
    assert {type(module) for module in linear} == {LinearInFloat32}

    assert measure(folder, {name: each.shape for name, each in tensors.items()}, [ids], "cpu").tokens == 6
    assert set(seen) == {6} and len(seen) == len(linear)

    model = decoder(str(folder), tensors.__getitem__)
    hidden_states(model, {"input_ids": torch.tensor([ids])}, average=True)
    assert len(seen) > len(linear) and set(seen) == {6}
