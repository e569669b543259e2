"""Launches: rows of one kind become one table and one call of `points`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from workers.methods.gpu_kernels.language import interprets, tl
from workers.methods.gpu_kernels.points import points
from workers.methods.gpu_kernels.random import drawn
from workers.methods.gpu_kernels.rows import BLOCK, SUM, Head, Row, Term

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def launch(rows: Sequence[Row], arithmetic: str, device: torch.device) -> Tensor:
    """Writes the elements of all rows, in a launch for those of one kind, and returns before that is done.

    Of each row, the result is 1 if a written element is NaN or infinite, else 0.
    """
    import torch

    flags = torch.zeros(len(rows), dtype=torch.int32, device=device)
    groups: dict[tuple[int | str, ...], list[int]] = {}
    for index, each in enumerate(rows):
        groups.setdefault((each.kind, each.mode, each.stored, each.out, len(each.terms)), []).append(index)
    for (kind, mode, stored, out, models), members in groups.items():
        blocks = tuple(-(-rows[index].head.elements // BLOCK) for index in members)
        firsts = [0, *accumulate(blocks)]
        table: list[list[int]] = []
        addresses: list[int] = []
        for index, first in zip(members, firsts, strict=False):
            head, terms = rows[index].head._replace(flag=index, first=first), rows[index].terms
            table.append([*head, *(field for term in terms for field in term)])
            addresses += [head.output, head.base, *(term.model for term in terms)]
        with torch.cuda.device_of(flags):
            segments = _segments(blocks, device)
            if segments.is_cuda:  # another thread, with a stream of its own, may have made it and may drop it
                segments.record_stream(torch.cuda.current_stream(device))
            points[(firsts[-1],)](
                *(torch.tensor(table, device=device), segments, flags),
                *(kind, mode, models, *(getattr(tl, str(name)) for name in (stored, out, arithmetic))),
                *(16 if all(address % 16 == 0 for address in addresses) else 1, BLOCK),
                num_warps=8,
                enable_fp_fusion=False,
            )
    return flags


@lru_cache
def runs_on(device: str) -> bool:
    """Whether kernels run on a device: Triton is there and compiles, or its interpreter runs them."""
    import torch

    if interprets() or tl is None or not device.startswith("cuda"):
        return interprets()
    try:
        zeros = torch.zeros(8, device=device)
        head, term = Head(zeros.data_ptr(), 0, 0, 8, 0), Term(zeros.data_ptr(), 0)
        launch([Row(SUM, 0, "float32", "float32", head, (term, term))], "float32", zeros.device)
        drawn((0, 0), 0, 8, 0, zeros.device)
    except Exception as error:  # Triton needs a C compiler, a driver and a card that it has code for
        reason = str(error).strip().splitlines() or [type(error).__name__]
        logging.getLogger(__name__).warning(
            "Triton cannot compile for %s (%s); slower torch formulas merge there; install a C compiler, such as gcc",
            *(device, reason[0]),
        )
        return False
    return True


@lru_cache(4)
def _segments(blocks: tuple[int, ...], device: torch.device) -> Tensor:
    """The row of each program."""
    import torch

    return torch.from_numpy(np.repeat(np.arange(len(blocks), dtype=np.int32), blocks)).to(device)
