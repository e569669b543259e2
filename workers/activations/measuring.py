"""Statistics of the inputs of a model's weights while it reads texts: mean |x| for AIM, or XᵀX / tokens for regmean.

Inputs are seen by hooks on the modules that have a `weight`, and those of experts that are stored in one tensor by
looking at the products in their module. transformers itself gives the statistics the names of the checkpoint: they go
the way of the weights when a model is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput
from workers.checkpoints.canonical import is_embedding, is_head

if TYPE_CHECKING:
    from torch import Tensor, nn

Ids = Sequence[int]


@dataclass(frozen=True, eq=False)
class Measured:
    """mean |x| of the input channels by tensor, as `workers.checkpoints.activations` stores them.

    `without` are the matrices of the checkpoint that no input was seen of, and `unreached` those of experts that no
    token has reached.
    """

    means: Mapping[str, NDArray[np.float32]]
    tokens: int
    without: tuple[str, ...]
    unreached: tuple[str, ...]


def measure(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    texts: Sequence[Ids],
    device: str,
    progress: Callable[[int], None] = lambda _: None,
) -> Measured:
    """Reads texts with the checkpoint in a local folder, in its own dtype; `shapes` are those of its tensors.

    One text at a time, without padding; |x| is summed in float64. The same texts on the same device, with the same
    number of threads, give the same bits: with another, the products of a model differ in their last bits.
    `BadInput` for a model that transformers cannot read or that computes NaN.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    model = loaded(folder).to(device)
    seen = _Seen(model)
    with seen.products:
        _read(model, texts, device, progress)
    state = dict(seen.means(model))
    _check_finite(folder, {name: bool(values.isfinite().all()) for name, values in state.items()})
    with torch.inference_mode():
        converted: Mapping[str, Tensor] = revert_weight_conversion(model, state)
    means = {
        name: reduced.numpy()
        for name, values in converted.items()
        if (name in shapes or is_head(name, {})) and (reduced := _reduced(values)) is not None
    }
    matrices = [name for name, shape in shapes.items() if len(shape) > 1 and not is_embedding(name)]
    return Measured(
        means=means,
        tokens=sum(map(len, texts)),
        without=tuple(name for name in matrices if name not in means),
        unreached=tuple(name for name in means if not means[name].any()),
    )


@dataclass(frozen=True, eq=False)
class MeasuredGrams:
    """XᵀX over all tokens for each group of weights with the same inputs, float64 of blocks × size × size.

    `without` are the matrices of the checkpoint that have none: experts, and weights that are stored transposed.
    """

    sums: dict[tuple[str, ...], Tensor]
    tokens: int
    without: tuple[str, ...]

    def matrices(self) -> Iterator[tuple[tuple[str, ...], NDArray[np.float32]]]:
        """XᵀX / tokens by weights in ascending order, as `workers.checkpoints.grams` stores it; frees each sum."""
        for weights in sorted(self.sums):
            total = self.sums.pop(weights)
            yield weights, ((total + total.mT) / (2 * self.tokens)).float().cpu().numpy()


def measure_grams(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    texts: Sequence[Ids],
    device: str,
    most: int,
    progress: Callable[[int], None] = lambda _: None,
) -> MeasuredGrams:
    """Reads texts as `measure` does, and returns the Gram matrices of the inputs of the linear layers.

    Inputs wider than the model's hidden states are cut into the fewest equal parts of at most `most` channels. Products
    are in float32 over the tokens of one text, and summed over the texts in float64. Layers whose input is one and the
    same tensor share their matrix. The embeddings and the head have none. `BadInput` as of `measure`.
    """
    import torch

    model = loaded(folder).to(device)
    hidden = model.config.get_text_config().hidden_size
    sums: dict[str, Tensor] = {}
    groups: dict[str, list[str]] = {}
    last: list[Any] = [None, ""]

    def hook(name: str, _: nn.Module, args: Sequence[Any]) -> None:
        x = args[0]
        owner = last[1] if x is last[0] else name
        last[:] = [x, owner]
        if name not in groups.setdefault(owner, []):
            groups[owner].append(name)
        if owner != name:
            return
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        channels = rows.shape[1]
        blocks = 1 if channels <= hidden else -(-channels // most)
        size = -(-channels // blocks)
        if name not in sums:
            sums[name] = torch.zeros(blocks, size, size, dtype=torch.float64, device=rows.device)
        for block, part in zip(sums[name], rows.split(size, dim=1), strict=True):
            block[: part.shape[1], : part.shape[1]] += part.T @ part

    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if isinstance(module, torch.nn.Linear) and weight in shapes and not is_head(weight, {}):
            module.register_forward_pre_hook(partial(hook, weight))
    _read(model, texts, device, progress)
    tokens = sum(map(len, texts))
    grouped = {tuple(sorted(groups[name])): total for name, total in sums.items()}
    _check_finite(folder, {weights[0]: bool(total.isfinite().all()) for weights, total in grouped.items()})
    found = {weight for weights in grouped for weight in weights}
    matrices = [
        name for name, shape in shapes.items() if len(shape) > 1 and not is_embedding(name) and not is_head(name, {})
    ]
    return MeasuredGrams(grouped, tokens, tuple(name for name in matrices if name not in found))


def _read(model: nn.Module, texts: Sequence[Ids], device: str, progress: Callable[[int], None]) -> None:
    import torch

    from workers.half_products import speed_up

    speed_up(model)
    with torch.inference_mode():
        for number, ids in enumerate(texts, start=1):
            model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
            progress(number)


def _check_finite(folder: Path, finite: Mapping[str, bool]) -> None:
    if broken := [name for name, holds in finite.items() if not holds]:
        raise BadInput(f"{folder}: the inputs of {broken[0]} are NaN or infinite; give a model that reads these texts")


def loaded(folder: Path, dtype: str = "auto") -> Any:
    """The model of a folder, in its own dtype by default, to be read with and not trained. `BadInput` if it cannot."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        [name, *_] = config.architectures or ["AutoModelForCausalLM"]
        loader: Any = getattr(transformers, name, transformers.AutoModelForCausalLM)
        model = loader.from_pretrained(
            folder, config=config, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    except (ValueError, OSError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise BadInput(f"{folder}: transformers cannot load the model ({reason})") from error
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # one product for each expert, which can be seen
    return model.eval().requires_grad_(False)


class _Seen:
    """Sums of |x| in float64, and the numbers of the tokens, of the weights of one model."""

    def __init__(self, model: nn.Module) -> None:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        self._sums: dict[tuple[str, int], Tensor] = {}
        self._counts: dict[tuple[str, int], int] = {}
        self._axes: dict[str, int] = {}
        experts: dict[int, tuple[str, int]] = {}
        for name, module in model.named_modules():
            for key, weight in module.named_parameters(recurse=False):
                full = f"{name}.{key}"
                if weight.ndim == 3 and key != "weight":
                    experts.update({part.data_ptr(): (full, at) for at, part in enumerate(weight)})
                elif (
                    key == "weight"
                    and weight.ndim < 3
                    and not is_embedding(name)
                    and not isinstance(module, nn.Embedding)
                ):
                    self._axes[full] = 0 if weight.ndim == 1 or isinstance(module, Conv1D) else 1
                    size = weight.shape[self._axes[full]]
                    module.register_forward_pre_hook(partial(self._hook, full, size), with_kwargs=True)
        self.products = _products(experts, self._product)

    def _hook(self, name: str, size: int, _: nn.Module, args: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        x: Any = next(iter((*args, *keywords.values())), None)
        if hasattr(x, "is_floating_point") and x.is_floating_point() and x.shape[-1] == size:
            self._add(name, 0, x)

    def _product(self, name: str, expert: int, axis: int, x: Tensor) -> None:
        self._axes[name] = axis
        self._add(name, expert, x)

    def _add(self, name: str, expert: int, x: Tensor) -> None:
        import torch

        rows = x.detach().reshape(-1, x.shape[-1])
        total = rows.abs().sum(0, dtype=torch.float64)
        key = name, expert
        self._sums[key] = self._sums[key] + total if key in self._sums else total
        self._counts[key] = self._counts.get(key, 0) + len(rows)

    def means(self, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
        """The means of each weight in its shape: the same number along the axes that it does not depend on."""
        import torch

        weights = dict(model.named_parameters(remove_duplicate=False))
        for name in dict.fromkeys(name for name, _ in self._sums):
            shape, axis = weights[name].shape, self._axes[name]
            own = torch.zeros(shape[0] if len(shape) == 3 else 1, shape[axis], dtype=torch.float64)
            for expert in range(len(own)):
                if (name, expert) in self._sums:
                    own[expert] = (self._sums[name, expert] / self._counts[name, expert]).cpu()
            alone = [1] * len(shape)
            alone[axis] = shape[axis]
            if len(shape) == 3:
                alone[0] = shape[0]
            yield name, own.float().reshape(alone).expand(shape)


def _products(experts: Mapping[int, tuple[str, int]], found: Callable[[str, int, int, Tensor], None]) -> Any:
    """A context in which `found` is called for each product with a part of a tensor: (name, part, input axis, x).

    `experts` are the parts by their addresses.
    """
    import torch
    from torch.overrides import TorchFunctionMode

    transposed = {torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.Tensor.mm}

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if (func is torch.nn.functional.linear or func in transposed) and len(args) > 1:
                name, part = experts.get(args[1].data_ptr(), ("", 0))
                if name and args[1].ndim == 2:
                    found(name, part, 1 if func in transposed else 2, args[0])
            return func(*args, **(kwargs or {}))

    return Products()


def _reduced(values: Tensor) -> Tensor | None:
    """Statistics without the axis of the outputs, along which they are equal; None if there is no such axis."""
    if values.ndim == 1:
        return values
    first = values.ndim - 2
    axes = sorted((first, first + 1), key=lambda axis: values.stride(axis) != 0)
    for axis in axes:
        one = values.narrow(axis, 0, 1)
        if values.stride(axis) == 0 or bool((values == one).all()):
            return one.contiguous()
    return None
