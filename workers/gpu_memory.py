"""The memory of a GPU as one worker has it: a worker of half a GPU has half of the card's memory.

A worker's part follows from its fraction and the card alone, never from the memory that is free at the moment: batches,
and with them near ties, would differ between compared points.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from jobs.errors import MergeyardError

Result = TypeVar("Result")

REMEDY = "give a worker more of a GPU under `workers:`, use a larger GPU, or merge fewer parents"

OUTSIDE_BYTES = 1 << 30
"""Of a card, what the CUDA context and the libraries of one process take beside its tensors."""

MOST_OF_ANOTHER = 0.9
"""vLLM's own default: the rest is for what it does not count."""

LACK = ("out of memory", "can't allocate memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "when calling `cublasCreate")
"""In the errors of CUDA, the host's allocator, cuBLAS, cuSOLVER and cuDNN; cuBLAS has no word for its own lack."""


def take_part(device: str, gpus: float) -> None:
    """Holds this process to its fraction of a GPU: torch runs out of memory there, not where the card is full."""
    if device != "cpu" and gpus < 1:
        card, index = _card(device)
        card.set_per_process_memory_fraction(max(0.0, gpus - OUTSIDE_BYTES / _total(device)), index)


def part_of(device: str) -> int:
    """Bytes of a GPU for the tensors of this process."""
    card, index = _card(device)
    total = _total(device)
    return min(int(total * card.get_per_process_memory_fraction(index)), total - OUTSIDE_BYTES)


def check_fits(needed: int, device: str, thing: str) -> None:
    """Refuses a thing that takes more bytes than this process has of a GPU; a CPU's are checked before it starts."""
    if device != "cpu" and needed > (part := part_of(device)):
        raise MergeyardError(
            f"{thing}: {needed / 1e9:.1f} GB on {device}, of which this worker has {part / 1e9:.1f} GB; {REMEDY}"
        )


def in_pieces(work: Callable[[int], Result], elements: int, least: int, device: str, thing: str) -> tuple[Result, int]:
    """`work(elements)`, which may be repeated, and the elements of a piece that it was given in the end.

    Where a GPU's memory ends, torch gives back what it keeps for later; then the elements are halved, down to `least`.
    """
    freed = False
    while True:
        try:
            return work(elements), elements
        except (RuntimeError, MemoryError) as error:
            if device == "cpu" or not is_out_of_memory(error):
                raise
        _card(device)[0].empty_cache()  # outside the handler, whose traceback holds the tensors that did not fit
        if freed and elements <= least:
            raise MergeyardError(f"{thing}: the memory of {device} that is left to this worker is too little; {REMEDY}")
        elements = max(least, elements // 2) if freed else elements
        freed = True


def fraction_beside(held: int, device: str) -> float:
    """The fraction of a GPU for another process of this worker, which itself holds so many bytes."""
    left = part_of(device) - held - OUTSIDE_BYTES
    return max(0.0, min(MOST_OF_ANOTHER, left * 100 // _total(device) / 100))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an operation failed for want of memory, of a GPU or of the host."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in LACK)
    )


def _card(device: str) -> tuple[Any, int]:
    """torch's module of a device, and the number of the card: it takes no "cuda" without one where memory is shared."""
    import torch

    module, number = torch.get_device_module(device), device.partition(":")[2]
    return module, int(number) if number else module.current_device()


def _total(device: str) -> int:
    card, index = _card(device)
    return card.get_device_properties(index).total_memory
