"""The diagonal of a model's Fisher information: mean squares of the gradients of its log-likelihood, for `fisher`.

Matena & Raffel 2022, *Merging models with Fisher-weighted averaging*, arXiv 2111.09832. transformers itself gives the
squares the names of the checkpoint: they go the way of the weights when a model is saved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from jobs.errors import BadInput
from workers.activations.measuring import Ids, loaded
from workers.methods.kernels.random import random_bits

if TYPE_CHECKING:
    from torch import Tensor, nn

POSITIONS = 64
"""Positions whose probabilities are in memory in float64 at a time."""


@dataclass(frozen=True, eq=False)
class MeasuredFisher:
    """F of each weight of the checkpoint, float32 in its shape.

    `without` are the tensors of the checkpoint that have none, and `unreached` those whose gradients are all zero.
    """

    squares: Mapping[str, NDArray[np.float32]]
    without: tuple[str, ...]
    unreached: tuple[str, ...]


def measure_fisher(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    texts: Sequence[Ids],
    device: str,
    progress: Callable[[int], None] = lambda _: None,
) -> MeasuredFisher:
    """F = mean over texts of (∇ Σₜ log p(yₜ | x₁…xₜ))², element by element; an example is one text of T tokens.

    The labels y are drawn from the model's own p, one for each of the T positions, as the paper's expectation over
    y ~ p asks: in expectation, F is the mean over texts of Σₜ E[(∇ log p(yₜ | x₁…xₜ))²]. The draws depend on the place
    of the text and of the token alone. Everything is in float32, but the sums of probabilities in float64. A weight
    that serves as embeddings and head has one F. `shapes` are those of the checkpoint's tensors. `BadInput` for a model
    that transformers cannot read, that has no language head, or whose gradients are NaN or infinite.
    """
    import torch
    from transformers.core_model_loading import revert_weight_conversion

    model = loaded(folder, "float32")
    squares = _sums_of_squares(model.to(device))
    for number, ids in enumerate(texts):
        logits = getattr(model(input_ids=torch.tensor([list(ids)], device=device), use_cache=False), "logits", None)
        if logits is None or logits.shape[:2] != (1, len(ids)):
            raise BadInput(f"{folder}: the model has no probabilities of next tokens; give a language model")
        labels = _drawn(logits[0].detach(), number)
        torch.nn.functional.cross_entropy(logits[0].float(), labels, reduction="sum").backward()
        progress(number + 1)
    names = {name: each for name, each in model.named_parameters(remove_duplicate=False) if each in squares}
    for each in squares.values():
        each /= len(texts)
    state = {name: squares[parameter].cpu() for name, parameter in names.items()}
    if broken := [name for name, each in state.items() if not bool(each.isfinite().all())]:
        raise BadInput(f"{folder}: gradients of {broken[0]} are NaN or infinite; give a model that reads these texts")
    with torch.no_grad():
        converted: Mapping[str, Tensor] = revert_weight_conversion(model, state)
    found = {name: each.contiguous().numpy() for name, each in converted.items() if name in shapes}
    return MeasuredFisher(
        squares=found,
        without=tuple(name for name in shapes if name not in found),
        unreached=tuple(name for name, each in found.items() if not each.any()),
    )


def _sums_of_squares(model: nn.Module) -> dict[Any, Tensor]:
    """The sums by parameter, to which each backward pass adds; no gradient outlives its square."""
    import torch

    sums: dict[Any, Tensor] = {}

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None, "the hook follows its accumulation"
        gradient = parameter.grad
        if parameter not in sums:
            sums[parameter] = torch.zeros_like(parameter, requires_grad=False)
        sums[parameter].addcmul_(gradient, gradient)
        parameter.grad = None

    for each in model.parameters():
        if each.is_floating_point():
            each.requires_grad_(True).register_post_accumulate_grad_hook(add)
    return sums


def _drawn(logits: Tensor, text: int) -> Tensor:
    """A label for each row of logits, drawn by its softmax: the first whose cumulated probability reaches the draw."""
    import torch

    key = hashlib.sha256(f"fisher\0{text}".encode()).digest()
    bits = random_bits((int.from_bytes(key[:8], "little"), int.from_bytes(key[8:16], "little")), 0, len(logits))
    draws = torch.from_numpy((bits.astype(np.float64) + 0.5) / 2**32).to(logits.device)
    labels: list[Tensor] = []
    for rows, some in zip(logits.split(POSITIONS), draws.split(POSITIONS), strict=True):
        reached = rows.double().softmax(dim=-1).cumsum(dim=-1)
        found = torch.searchsorted(reached, some[:, None] * reached[:, -1:])
        labels.append(found[:, 0].clamp(max=logits.shape[1] - 1))
    return torch.cat(labels)
