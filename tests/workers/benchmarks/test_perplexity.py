from __future__ import annotations

import numpy as np
import pytest

from jobs.errors import BadInput
from workers.benchmarks.perplexity import position_blocks, windows
from workers.benchmarks.texts.tokenizer import Tokenizer


def test_blocks_double_from_256() -> None:
    blocks = position_blocks(5000)
    changes = [0, *(int(at) + 1 for at in np.flatnonzero(np.diff(blocks)))]
    assert changes == [0, 256, 512, 1024, 2048, 4096]
    assert blocks[-1] == 5


def test_windows_of_all_lengths_end_at_the_same_tokens(tokenizer: Tokenizer) -> None:
    text = " ".join(f"Sentence {number} is here." for number in range(2000))
    ids = tokenizer.encode(text)
    found = windows(tokenizer, text, [512, 2048], items=4)
    assert [(window.length, window.index) for window in found] == [(n, i) for n in (512, 2048) for i in range(4)]
    for short, long in zip(found[:4], found[4:], strict=True):
        assert short.pair == long.pair
        assert short.tokens.tolist() == long.tokens[-512:].tolist()
        assert short.blocks[0] == -1 and (short.blocks[1:] >= 0).all()
    assert found[-1].tokens.tolist() == ids[-2048:]
    assert found[4].tokens.tolist() == ids[:2048]


def test_a_text_shorter_than_a_window_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadInput, match="5 tokens, the longest window 512; give `text:` a longer one"):
        windows(tokenizer, "Too short.", [512], items=1)
