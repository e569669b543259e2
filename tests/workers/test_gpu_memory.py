"""A worker's part of a GPU: by its fraction, and never by what is free at the moment."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jobs.errors import MergeyardError
from workers.gpu_memory import OUTSIDE_BYTES, check_fits, fraction_beside, is_out_of_memory, part_of, take_part

GIB = 1 << 30


@pytest.mark.parametrize(
    ("gpus", "part"), [(2, 79 * GIB), (1, 79 * GIB), (0.5, 39 * GIB), (0.25, 19 * GIB), (0.001, 0)], ids=str
)
def test_workers_of_a_fraction_share_the_memory_of_a_card(card: Any, gpus: float, part: int) -> None:
    """Of 80 GiB: the fraction, less a GiB for what each process has beside its tensors."""
    assert OUTSIDE_BYTES == GIB
    take_part("card", gpus)
    assert part_of("card") == pytest.approx(part, abs=1)
    torch.zeros(3, device="card") if part else None
    assert part_of("card") == pytest.approx(part, abs=1), "whatever is in use"


def test_nothing_is_taken_of_a_cpu() -> None:
    take_part("cpu", 0.5)
    check_fits(1 << 60, "cpu", "anything")


def test_a_worker_runs_out_of_memory_at_its_part(card: Any) -> None:
    """Of a card of 4 GiB a quarter, less the GiB, is nothing."""
    card.total = 4 * GIB
    take_part("card", 0.25)
    with pytest.raises(torch.OutOfMemoryError):
        torch.zeros(1 << 10, device="card")


def test_what_does_not_fit_is_refused_with_the_remedy_that_helps(card: Any) -> None:
    take_part("card", 0.5)
    with pytest.raises(
        MergeyardError,
        match=r"^the parents: 60\.0 GB on card, of which this worker has 41\.9 GB; give a worker more of",
    ):
        check_fits(60 * 10**9, "card", "the parents")
    check_fits(40 * 10**9, "card", "fewer parents")
    take_part("card", 0.9)
    check_fits(60 * 10**9, "card", "the parents")


@pytest.mark.parametrize(
    ("gpus", "held", "fraction"), [(1, 0, 0.9), (1, 20 * GIB, 0.72), (0.5, 8 * GIB, 0.37), (0.5, 60 * GIB, 0.0)]
)
def test_vllm_has_what_the_parents_leave_of_the_worker(card: Any, gpus: float, held: int, fraction: float) -> None:
    """(80 · gpus − 1 − held − 1) / 80, cut at two digits; vLLM's default is 0.9 of the card, whoever else is there."""
    if gpus < 1:
        take_part("card", gpus)
    assert fraction_beside(held, "card") == fraction


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory: you tried …"),
        MemoryError(),
    ],
    ids=lambda error: str(error)[:60],
)
def test_a_lack_of_memory_is_known_by_every_library_s_words(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasSgemm(handle)`"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
        ValueError("out of memory"),
    ],
    ids=str,
)
def test_another_error_is_none(error: Exception) -> None:
    assert not is_out_of_memory(error)
