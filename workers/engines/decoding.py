"""A pool while it decodes: its answers while they grow, and where its rows lie in the cache. No model.

A row begins at column 0 of its slot: the trunk, the branches, then each new token in the next column, whichever branch
it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from workers.engines.engine import Answer, Prompt, before_stops, split_thought, status_of
from workers.engines.packing import Pool, Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Ids = NDArray[np.int64]

Text = Callable[[list[int], bool], str]
"""The text of tokens, with or without the special ones."""

MARGIN = 4
"""Tokens before a text that is looked for: decoding may drop a space at the start, or show half a character."""


@dataclass(slots=True)
class Growing:
    """One prompt's answer while it grows. `thought` counts the tokens up to the end of the thought; None before it."""

    prompt: Prompt
    tokens_in: int
    tokens: list[int] = field(default_factory=list[int])
    finite: bool = True
    ended: bool = False
    thought: int | None = None
    _rest: str = ""
    """Text after the end tag in the token that completes it."""

    def __post_init__(self) -> None:
        if self.prompt.thinking is None:
            self.thought = 0

    @property
    def full(self) -> bool:
        """Whether the thought, or the answer, has as many tokens as it may have."""
        if self.thought is None:
            return self.prompt.thinking is not None and len(self.tokens) >= self.prompt.thinking.budget
        return len(self.tokens) >= self.thought + self.prompt.max_new_tokens

    def take(self, token: int, finite: bool, end_tokens: frozenset[int], text: Text) -> None:
        """Append a token, unless it ends the answer; a NaN, an infinite logit, a stop and the limits end it too."""
        self.finite = finite
        self.ended = not finite or token in end_tokens
        if not self.ended:
            self.tokens.append(token)
            self.ended = self._stopped(text) or self.full

    def _stopped(self, text: Text) -> bool:
        """Look for the end of the thought, and after it for a stop, in the last tokens that can have it."""
        thinking, stops = self.prompt.thinking, self.prompt.stops
        if self.thought is None and thinking is not None:
            _, end, self._rest = text(self.tokens[-_reach(thinking.end) :], True).partition(thinking.end)
            self.thought = len(self.tokens) if end else None
        if self.thought is None or not stops:
            return False
        first = max(self.thought, len(self.tokens) - max(map(_reach, stops)))
        tail = (self._rest if first == self.thought else "") + text(self.tokens[first:], True)
        return any(stop in tail for stop in stops)


def answer_of(
    prompt: Prompt,
    tokens_in: int,
    tokens: list[int],
    thought: int | None,
    text: Text,
    *,
    cut: bool,
    finite: bool,
    seconds: float,
) -> Answer:
    """The answer of the generated `tokens`, of which `thought` end the thought (None: none does).

    `cut` where they are as many as they may be.
    """
    whole = text(tokens, False)
    if prompt.thinking and thought and prompt.thinking.end not in whole:  # it is a special token
        whole = text(tokens[:thought], True) + text(tokens[thought:], False)
    thoughts, said, thought_ended = split_thought(whole, prompt.thinking)
    answer = before_stops(said, prompt.stops)
    return Answer(
        text=answer,
        tokens_in=tokens_in,
        tokens_out=len(tokens),
        seconds=seconds,
        finite=finite,
        status=status_of(answer, cut=cut and answer == said) if thought_ended else "unended",
        thought=thoughts,
        tokens_thought=len(tokens) if thought is None else thought,
    )


def _reach(text: str) -> int:
    """The most tokens that a text and its margin take: one a byte."""
    return len(text.encode()) + MARGIN


class Slots:
    """The rows of a pool that are decoded now; slot r of the cache holds `rows[r]`.

    `visible` [slots, branches, columns] are the columns that each branch sees, `places` [slots, columns] the positions
    of the tokens in them, `filled` [slots] how many there are. `tokens` and `positions` [slots, branches] go into the
    next step. `latest` is the slot whose row was placed last.
    """

    def __init__(self, pool: Pool, device: torch.device) -> None:
        self.rows: list[Row] = []
        self.visible = torch.zeros(pool.slots, pool.width, pool.columns, dtype=torch.bool, device=device)
        self.places = torch.zeros(pool.slots, pool.columns, dtype=torch.int64, device=device)
        self.filled = np.zeros(pool.slots, np.int64)
        self.tokens, self.positions = (np.zeros((pool.slots, pool.width), np.int64) for _ in range(2))
        self.latest: tuple[int, Ids] = (0, np.zeros(0, np.int64))

    def place(self, slot: int, row: Row) -> None:
        """Put a row, whose tokens lie in the cache, into a slot: the next one, or one whose row has ended."""
        self.rows[slot : slot + 1] = [row]
        trunk, column = len(row.trunk), len(row.trunk)
        visible = np.zeros((self.visible.shape[1], row.tokens), bool)
        places = np.arange(row.tokens)
        visible[: len(row.branches), :trunk] = True
        for j, branch in enumerate(row.branches):
            own = len(branch) - 1
            visible[j, column : column + own] = True
            places[column : column + own] = np.arange(trunk, trunk + own)
            column += own
            self.tokens[slot, j], self.positions[slot, j] = branch[-1], trunk + own
        self.visible[slot] = False
        self.visible[slot, :, : row.tokens] = torch.from_numpy(visible).to(self.visible.device)
        self.places[slot, : row.tokens] = torch.from_numpy(places).to(self.places.device)
        self.filled[slot] = row.tokens
        self.latest = slot, row.trunk

    def drop(self, slot: int) -> None:
        """Let the last row lie in this slot, whose own has ended."""
        last = self.rows.pop()
        if slot < len(self.rows):
            self.rows[slot] = last
            for memory in (self.visible, self.places, self.filled, self.tokens, self.positions):
                memory[slot] = memory[len(self.rows)]

    def advance(self, living: list[tuple[int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Give each living (slot, branch) a column of its slot: slots, branches and columns, on the device."""
        slots, branches = np.array(living).T
        first = np.searchsorted(slots, slots)  # the slots ascend
        columns = self.filled[slots] + np.arange(len(slots)) - first
        np.add.at(self.filled, slots, 1)
        device = self.visible.device
        cells = tuple(torch.from_numpy(vector).to(device) for vector in (slots, branches, columns))
        self.visible[cells] = True
        self.places[cells[0], cells[2]] = torch.from_numpy(self.positions[slots, branches]).to(device)
        return cells[0], cells[1], cells[2]
