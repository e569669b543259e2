"""Linear layers in half precision on a CPU that has no units for it: their products are taken in float32.

For bfloat16 such a CPU has no AVX-512, as most laptops have none. PyTorch's own kernel then multiplies the numbers one
by one: 4 GFLOP/s a core, where float32 has 50 to 70. The result is that of the layer but for the order of additions:
both kernels add in float32, and round once. Layers of other classes, such as the fused experts of a mixture, stay as
they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

LEAST_ROWS = 4
"""Of fewer rows, PyTorch's kernel takes less time than the conversion of the weights."""

BLOCK = 1 << 20
"""Weights that are in float32 at a time: 4 MiB, of which most stay in a processor's caches."""


def speed_up(model: nn.Module) -> None:
    """Makes the linear layers of a model on a CPU fast, if they are not."""
    for module in model.modules():
        if type(module) is nn.Linear and _is_slow(module.weight):
            module.__class__ = LinearInFloat32


def _is_slow(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dtype not in (torch.bfloat16, torch.float16):
        return False
    if not torch.backends.mkldnn.is_available():
        return True
    name = "_is_mkldnn_bf16_supported" if weight.dtype == torch.bfloat16 else "_is_mkldnn_fp16_supported"
    has = getattr(torch.ops.mkldnn, name, None)  # an older PyTorch may lack it
    return has is None or not has()


class LinearInFloat32(nn.Linear):
    """x·Wᵀ + b, for inputs [..., in] of the weights' dtype → [..., out], added in float32 and rounded once."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        if rows < LEAST_ROWS or input.dtype != self.weight.dtype or self.weight.device.type != "cpu":
            return linear(input, self.weight, self.bias)
        wide, output = input.float(), input.new_empty(*input.shape[:-1], self.out_features)
        bias = self._parameters["bias"]
        step = max(1, BLOCK // self.in_features)
        for first in range(0, self.out_features, step):
            some = slice(first, first + step)
            added = None if bias is None else bias[some].float()
            output[..., some] = linear(wide, self.weight[some].float(), added)
        return output
