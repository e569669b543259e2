"""Random decoding whose draws depend on the seed, the step and the token alone, not on the batch or the device.

A token is drawn by the Gumbel-max trick: the largest of `score + noise`, with independent noise for each token, is
distributed as the softmax of the scores (Gumbel 1954; Maddison, Tarlow & Minka 2014). Two models asked with one seed
meet the same noise, so that they differ in as few tokens as their distributions allow: their answers stay paired. The
noise is counted, not drawn in sequence: SplitMix64 (Steele, Lea & Flood 2014) of the seed, the step and the token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor

from workers.engines.engine import Sampling

HEAD = 1024
"""The likeliest tokens, among which those of `top_p` are looked for first; all are sorted only where these few fail."""

GOLDEN, FIRST, SECOND = (word - (1 << 64) for word in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def sample(logits: Tensor, settings: Sequence[Sampling], steps: Sequence[int]) -> Tensor:
    """A token id, int64, for each row of `logits` [rows, vocabulary]; `steps` count the tokens before it.

    A row without a finite logit gets any token.
    """
    tokens = torch.empty(len(settings), dtype=torch.int64, device=logits.device)
    for (temperature, top_p, top_k), rows in _alike(settings):
        scores = filtered(logits[rows].double() / temperature, top_p, top_k)
        of_row, token = scores.isfinite().nonzero(as_tuple=True)
        keys = torch.tensor([_key(settings[row].seed, steps[row]) for row in rows], device=logits.device)
        scores[of_row, token] += gumbel(keys[of_row], token)
        tokens[rows] = scores.argmax(-1)
    return tokens


def filtered(scores: Tensor, top_p: float, top_k: int) -> Tensor:
    """`scores` [rows, vocabulary] with -inf at the tokens that are never drawn, as transformers and vLLM have it.

    `top_k` comes first, 0 keeps all; then stay the likeliest tokens whose predecessors have less than `top_p` together.
    Tokens as likely as the last that stays stay too.
    """
    if top_k:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    if top_p < 1:
        for width in (min(HEAD, scores.shape[-1]), scores.shape[-1]):
            best = scores.topk(width).values
            mass = (best - scores.logsumexp(-1, keepdim=True)).exp()
            stays = mass.cumsum(-1) - mass < top_p
            if not stays[:, -1].any():
                break
        least = best.masked_fill(~stays, torch.inf).amin(-1, keepdim=True)
        scores = scores.masked_fill(scores < least, -torch.inf)
    return scores


def gumbel(keys: Tensor, tokens: Tensor) -> Tensor:
    """Standard Gumbel noise, float64, for each pair of a key and a token, both int64 of one shape."""
    uniform = (_shifted(_mixed(keys + tokens * GOLDEN), 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _alike(settings: Sequence[Sampling]) -> Iterator[tuple[tuple[float, float, int], list[int]]]:
    def kind(row: int) -> tuple[float, float, int]:
        return settings[row].temperature, settings[row].top_p, settings[row].top_k

    for alike, rows in groupby(sorted(range(len(settings)), key=kind), key=kind):
        yield alike, list(rows)


def _key(seed: int, step: int) -> int:
    """64 bits of a seed and a step, as a signed number."""
    words = torch.tensor([seed % (1 << 63), step])
    return int(_mixed(_mixed(words[:1]) + words[1:] * GOLDEN))


def _mixed(words: Tensor) -> Tensor:
    """SplitMix64's finaliser of int64, whose products wrap around."""
    words = (words ^ _shifted(words, 30)) * FIRST
    words = (words ^ _shifted(words, 27)) * SECOND
    return words ^ _shifted(words, 31)


def _shifted(words: Tensor, bits: int) -> Tensor:
    """A logical shift to the right; PyTorch's own keeps the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
